"""Counts the bytes of tensors that are alive while torch code runs, on the meta device as well as anywhere else."""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Of what an operator takes or gives: tensors, and lists and tuples of them."""
    if isinstance(value, torch.Tensor):
        return [value]
    found: list[torch.Tensor] = []
    if isinstance(value, list | tuple):
        for one in value:
            if isinstance(one, torch.Tensor):
                found.append(one)
            elif isinstance(one, list | tuple):
                found += tensors_in(one)
    return found


class Shape(NamedTuple):
    """What a tensor without memory has."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


SHAPES: dict[Any, Shape | None] = {}
"""What operators made on the meta device, by what they were given; None of one that only wrote into its first argument.
Finding it out anew, which PyTorch does in Python, would be most of a test's time: layers and steps are alike."""


@functools.cache
def only_makes(func: Any) -> bool:
    """Whether the operator gives one new tensor and changes none; its schema is made anew whenever it is asked for."""
    schema = func._schema
    return not schema.is_mutable and len(schema.returns) == 1 and schema.returns[0].alias_info is None


@functools.cache
def only_writes(func: Any) -> bool:
    """Whether the operator changes its first argument alone, and gives it back."""
    schema = func._schema
    written = [argument.alias_info.before_set for argument in schema.arguments if argument.is_write]
    given_back = [result.alias_info and result.alias_info.before_set for result in schema.returns]
    return len(written) == 1 and schema.arguments[0].is_write and given_back == written


def made(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the operator gives, as a new tensor of the shape that is known where it only makes one, or as the one that
    it is known to leave in its shape."""
    if not (only_makes(func) or only_writes(func)):
        return func(*args, **kwargs)
    key = func, given(args), given(tuple(kwargs.items()))
    try:
        known = SHAPES[key]
    except KeyError:
        return tried(func, args, kwargs, key)
    except TypeError:  # something that cannot be a key
        return func(*args, **kwargs)
    if known is None:
        return args[0]
    return torch.empty_strided(known.size, known.stride, dtype=known.dtype, device="meta")


def tried(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any) -> Any:
    """What the operator gives, which is known by the key from then on if it has no memory."""
    before = [layout(one) for one in args[:1] if isinstance(one, torch.Tensor)]
    result = func(*args, **kwargs)
    if not (isinstance(result, torch.Tensor) and result.is_meta and all(one.is_meta for one in tensors_in(args))):
        return result
    if only_writes(func):
        if result is args[0] and before == [layout(result)]:
            SHAPES[key] = None
        return result
    shape = Shape(tuple(result.shape), result.stride(), result.dtype)
    alone = torch.empty_strided(*shape[:2], dtype=shape.dtype, device="meta").untyped_storage().nbytes()
    inputs = {one.untyped_storage()._cdata for one in tensors_in((args, tuple(kwargs.values())))}
    storage = result.untyped_storage()
    if storage.nbytes() == alone and storage._cdata not in inputs:
        SHAPES[key] = shape
    return result


def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.untyped_storage().nbytes()


def given(value: Any) -> Any:
    """An argument as part of a key: of a tensor all that decides the shape of a result."""
    if isinstance(value, torch.Tensor):
        return value.device, value.dtype, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return tuple(map(given, value))
    return type(value), value


class LiveMemory(TorchDispatchMode):
    """Inside, `peak` is the most bytes that tensors made since then held at once; views and reuse cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._on_meta = torch.get_default_device().type == "meta"
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, tuple((kwargs or {}).values()))):
            self._ignore(tensor.untyped_storage())
        result = made(func, args, kwargs or {})
        if not self._on_meta and (kwargs or {}).get("device") == torch.device("meta"):
            return result  # asked for by name: a shape without memory on any device
        for tensor in tensors_in(result):
            self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        nbytes = storage.nbytes()
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, nbytes))

    def _ignore(self, storage: torch.UntypedStorage) -> None:
        """Storage from before does not count, for as long as it lives: its address may come again."""
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, 0))

    def _forget(self, key: int, nbytes: int) -> None:
        del self._known[key]
        self.now -= nbytes

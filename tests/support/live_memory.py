"""Counts the bytes of tensors that are alive while torch code runs, on the meta device as well as anywhere else."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Of what an operator takes or gives: tensors, and lists and tuples of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


class LiveMemory(TorchDispatchMode):
    """Inside, `peak` is the most bytes that tensors made since then held at once; views and reuse cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._on_meta = torch.get_default_device().type == "meta"
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, tuple((kwargs or {}).values()))):
            self._ignore(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        if not self._on_meta and (kwargs or {}).get("device") == torch.device("meta"):
            return result  # asked for by name: a shape without memory on any device
        for tensor in tensors_in(result):
            self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _ignore(self, storage: torch.UntypedStorage) -> None:
        """Storage from before does not count, for as long as it lives: its address may come again."""
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._known.discard, key)

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes

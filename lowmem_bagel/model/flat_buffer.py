"""One flat buffer for all tensors of a module: the unit that is loaded, kept or streamed.

The layout is derived from the module as built on the meta device, so that resident, streamed and converted weights
cannot disagree about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

ALIGNMENT = 256
"""Bytes; what cudaMalloc guarantees, and enough for any vector load."""


Copy = Callable[[Tensor, str, Tensor], None]
"""(target, stored name, what was read under it) -> None: fills the target, which is contiguous."""


def plainly(target: Tensor, name: str, value: Tensor) -> None:
    """As PyTorch copies."""
    target.copy_(value)


@dataclass(frozen=True)
class Field:
    """One tensor of the module: `path` is its dotted name in the module, `offset` its place in bytes."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor inside a uint8 buffer."""
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """The layout of a module's parameters and buffers, in their order."""
        fields, offset = [], 0
        for path, tensor in named_tensors(module):
            fields.append(Field(path, tensor.dtype, tuple(tensor.shape), offset))
            offset += -(-fields[-1].nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(fields), offset)

    def bind(self, module: nn.Module, buffer: Tensor) -> None:
        """Point the module's tensors into the buffer (uint8, at least `nbytes` long)."""
        assert buffer.dtype == torch.uint8 and buffer.numel() >= self.nbytes
        owners = dict(module.named_modules())
        for field in self.fields:
            owner, _, name = field.path.rpartition(".")
            _set(owners[owner], name, field.view(buffer))

    def fill(
        self, buffer: Tensor, sources: Mapping[str, Sequence[str]], read: Callable[[str], Tensor], copy: Copy = plainly
    ) -> None:
        """Copy stored tensors into the buffer, stacked by rows where several make one field.

        Raises:
            CheckpointError: a stored tensor has the wrong shape or kind of dtype.
        """
        assert set(sources) == {field.path for field in self.fields}, set(sources) ^ {f.path for f in self.fields}
        for field in self.fields:
            stack(field.view(buffer), sources[field.path], read, copy)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, by dotted name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def set_tensor(module: nn.Module, path: str, value: Tensor) -> None:
    """Replace the parameter or buffer at a dotted path."""
    owner, _, name = path.rpartition(".")
    _set(module.get_submodule(owner), name, value)


def _set(owner: nn.Module, name: str, value: Tensor) -> None:
    if name in owner._buffers:
        owner._buffers[name] = value
    else:
        assert name in owner._parameters, name
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)


def stack(target: Tensor, names: Sequence[str], read: Callable[[str], Tensor], copy: Copy = plainly) -> None:
    """Copy stored tensors one under the other into the target, converting between float dtypes.

    Raises:
        CheckpointError: their shapes do not add up to the target's, or one is an integer and the other is not.
    """
    row = 0
    for name in names:
        part = read(name)
        rows = part.shape[0] if part.dim() else 0
        if part.shape[1:] != target.shape[1:] or row + rows > target.shape[0]:
            raise CheckpointError(
                f"tensor {name} has the wrong shape {list(part.shape)}; the folder does not belong to its configuration"
            )
        same_kind = part.dtype == target.dtype or (part.dtype.is_floating_point and target.dtype.is_floating_point)
        if not same_kind:
            raise CheckpointError(
                f"tensor {name} is {part.dtype} where {target.dtype} is due; convert the folder again"
            )
        copy(target[row : row + rows], name, part)
        row += rows
    if row != target.shape[0]:
        raise CheckpointError(
            f"{', '.join(names)}: {row} rows where {target.shape[0]} are due; convert the folder again"
        )

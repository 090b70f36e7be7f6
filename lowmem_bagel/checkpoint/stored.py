"""Where a tensor of the model lies, and what is made of the bytes that lie there.

Nearly always they are the tensor. Where they are not, a view says how it is made of them: it is then made in memory
whenever it is asked for, and nothing can read it from the disk as it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import CheckpointError
from .gguf_blocks import BLOCK_TYPES, decoded
from .safetensors_file import DTYPE_BYTES, TensorEntry, TensorFile, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Piece:
    """A tensor in a file."""

    file: TensorFile
    entry: TensorEntry

    def tensor(self) -> Tensor:
        """A read-only view of the file."""
        return self.file.tensor(self.entry.name)


class View(Protocol):
    """How a tensor is made of pieces."""

    @property
    def encoding(self) -> str:
        """What the bytes on disk are, in a word."""
        ...

    def made(self, pieces: Sequence[Piece], entry: TensorEntry) -> Tensor:
        """The tensor, of the entry's dtype and shape, in memory of its own."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the model.

    `entry` is what the model sees: its own name, dtype and shape, and where the bytes are, if they are those of one
    piece as they stand. `view` makes it of the pieces where they are not.
    """

    pieces: tuple[Piece, ...]
    entry: TensorEntry
    view: View | None = None

    @classmethod
    def plain(cls, file: TensorFile, entry: TensorEntry, name: str = "", shape: tuple[int, ...] = ()) -> StoredTensor:
        """A tensor that lies in a file as it is used, perhaps under another name or in another shape."""
        seen = TensorEntry(name or entry.name, entry.dtype, shape or entry.shape, entry.start, entry.nbytes)
        return cls((Piece(file, entry),), seen)

    @classmethod
    def viewed(cls, view: View, name: str, dtype: str, shape: tuple[int, ...], *pieces: Piece) -> StoredTensor:
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        return cls(pieces, TensorEntry(name, dtype, shape, 0, nbytes), view)

    @classmethod
    def blocks(cls, file: TensorFile, entry: TensorEntry, name: str) -> StoredTensor:
        """A weight in blocks of GGUF's, which is used as the bytes [nbytes] that it lies in the file as."""
        return cls.plain(file, entry, name, (entry.nbytes,))

    @property
    def encoded(self) -> bool:
        """Whether it is the bytes of a weight in blocks."""
        return self.view is None and self.entry.dtype in BLOCK_TYPES

    @property
    def as_it_is(self) -> bool:
        """Whether its bytes can be read from `file` at `entry.start`."""
        return self.view is None

    @property
    def file(self) -> TensorFile:
        """The file that it lies in; of those with a view the first. What is computed has none."""
        return self.pieces[0].file

    @property
    def disk_bytes(self) -> int:
        return sum(piece.entry.nbytes for piece in self.pieces)

    def tensor(self) -> Tensor:
        """The tensor: a read-only view of the file where it lies there as it is."""
        if self.view is not None:
            return self.view.made(self.pieces, self.entry)
        return self.pieces[0].tensor().view(self.entry.shape)

    def raw(self) -> memoryview:
        """The tensor's bytes, not copied where they lie in a file as they are."""
        import torch

        if self.view is None:
            return self.file.raw(self.pieces[0].entry.name)
        data = self.tensor().contiguous()
        return data.view(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class PatchConvolution:
    """A patch embedding kept as a convolution [out, channels, row, column], perhaps in FP8: the model multiplies by
    rows of values ordered (row, column, channel)."""

    encoding: str = "conv"

    def made(self, pieces: Sequence[Piece], entry: TensorEntry) -> Tensor:
        value = pieces[0].tensor()
        if len(pieces) > 1 or pieces[0].entry.dtype in FP8:
            value = dequantized(value, pieces[1].tensor() if len(pieces) > 1 else None, torch_dtype(entry.dtype))
        return value.permute(0, 2, 3, 1).flatten(1).contiguous()


@dataclass(frozen=True)
class Dequantized:
    """An FP8 tensor with its scale, if any: the second piece, one number, one a row or one a block."""

    encoding: str = "fp8"

    def made(self, pieces: Sequence[Piece], entry: TensorEntry) -> Tensor:
        scale = pieces[1].tensor() if len(pieces) > 1 else None
        return dequantized(pieces[0].tensor(), scale, torch_dtype(entry.dtype))


@dataclass(frozen=True)
class Decoded:
    """A tensor in blocks of a GGUF type that is used as floats."""

    kind: str

    @property
    def encoding(self) -> str:
        return self.kind.lower()

    def made(self, pieces: Sequence[Piece], entry: TensorEntry) -> Tensor:
        import torch

        with torch.device("cpu"):  # also while a model is built on the meta device
            return decoded(pieces[0].tensor(), self.kind, entry.shape, torch_dtype(entry.dtype))


DEQUANTIZED_AT_ONCE = 1 << 22
"""Values, so that what is between is small beside the largest tensor."""
BLOCK = 128
"""Side of the blocks that have a scale each, where blocks have."""


def dequantized(value: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """FP8 values times their scale: the product is float32's, and rounded once more to `dtype`."""
    import torch

    if scale is None:
        return value.to(dtype)
    kind = scale_kind(tuple(value.shape), tuple(scale.shape))
    rows = value.reshape(value.shape[0] if value.dim() else 1, -1)
    factors = scale.to(torch.float32).reshape(scale.shape if kind == "block" else (-1, 1))
    with torch.device("cpu"):  # also while a model is built on the meta device
        out = torch.empty(rows.shape, dtype=dtype)
        of_row = torch.arange(len(rows)) // BLOCK if kind == "block" else None
    step = max(1, DEQUANTIZED_AT_ONCE // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        here = factors if kind == "tensor" else factors[part]
        if of_row is not None:
            here = factors[of_row[part]].repeat_interleave(BLOCK, 1)[:, : rows.shape[1]]
        out[part] = rows[part].to(torch.float32).mul_(here)
    return out.reshape(value.shape)


def scale_kind(weight: tuple[int, ...], scale: tuple[int, ...]) -> str | None:
    """What a scale of this shape belongs to: "tensor", "row" or "block"; None where it fits nothing."""
    if math.prod(scale) == 1:
        return "tensor"
    if scale[:1] == weight[:1] and math.prod(scale) == math.prod(scale[:1]):
        return "row"
    if len(weight) == len(scale) == 2 and scale == tuple(-(-n // BLOCK) for n in weight):
        return "block"
    return None


@dataclass(frozen=True)
class Sines:
    """A table of two-dimensional positions, [side * side, width]: sines and cosines of the column, then of the row.

    What the published code makes when it is built, and never trains.
    """

    side: int
    encoding: str = "computed"

    def made(self, pieces: Sequence[Piece], entry: TensorEntry) -> Tensor:
        import torch

        quarter = entry.shape[1] // 4
        numbers = torch.arange(max(self.side, quarter), dtype=torch.float64, device="cpu")
        frequencies = 1.0 / 10000 ** (numbers[:quarter] / quarter)
        angles = numbers[: self.side, None] * frequencies
        line = torch.cat((angles.sin(), angles.cos()), dim=1)
        columns = line[None].expand(self.side, -1, -1)
        rows = line[:, None].expand(-1, self.side, -1)
        table = torch.cat((columns, rows), dim=2).view(entry.shape)
        # float32 first, as the published code keeps it: rounding once more is what its bf16 files were made by.
        return table.to(torch.float32).to(torch_dtype(entry.dtype))


def check_scale(path: str, weight: TensorEntry, scale: TensorEntry) -> None:
    """Raises CheckpointError where a scale does not fit its weight."""
    if scale.dtype not in ("F32", "BF16", "F16") or scale_kind(weight.shape, scale.shape) is None:
        raise CheckpointError(
            f"{path}: scale {scale.name} is {scale.dtype} {list(scale.shape)}, which is none for the FP8 weight "
            f"{list(weight.shape)}: one number, one a row or one a block of {BLOCK} x {BLOCK} is"
        )

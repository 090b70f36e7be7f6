"""Linears on DFloat11 weights: decoded on the GPU at every use, or on the CPU once, at load."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...checkpoint.config import read_json
from ...checkpoint.folder import ModelFolder
from ...checkpoint.tensors import LM_HEAD, tensor_table
from ...ops.dtypes import wide
from ...ops.linear import Linear, Product, Stored, Weights
from ..base import DenseLinears, StoredLinears
from .codec import Encoded, check_shapes, decode_weights, from_tensors, import_loops
from .groups import COMPONENTS, Group, read_config, resolve_groups, stored_name

if TYPE_CHECKING:
    from .kernels import KernelGroup

STREAMED_COMPONENTS = ("encoded_exponent", "sign_mantissa", "output_positions", "gaps")
"""What the GPU reads; luts become its tables when the linear is prepared."""


class CompressedGroups:
    """The groups of a DFloat11 folder, of whatever grouping, checked as they are read."""

    def __init__(self, folder: ModelFolder) -> None:
        import_loops()
        self.folder = folder
        self.table = tensor_table(folder.config)
        patterns = read_config(read_json(folder.path / "config.json"))
        groups = resolve_groups(patterns, folder.stored, self.table)
        self.owner: Mapping[str, Group] = {weight: group for group in groups for weight in group.weights}
        self._decoded: dict[str, Tensor] = {}
        self._decoding = threading.Lock()
        """Held by one thread at a time, which takes all cores; others go on reading what is stored as it is used."""

    def encoded(self, group: Group) -> Encoded:
        """A group's components.

        Raises:
            CheckpointError: damaged, or not the shapes that the configuration demands.
        """
        with torch.device("cpu"):  # also while the model is built on the meta device
            tensors = {c: self.folder.tensor(stored_name(group.module, c)) for c in COMPONENTS}
            encoded = from_tensors(tensors, group.module)
        check_shapes(encoded, [[n or 0 for n in self.table[w].shape] for w in group.weights], group.module)
        return encoded

    def weight(self, name: str) -> Tensor | None:
        """A compressed weight decoded on the CPU, bf16; the rest of its group is kept until asked for."""
        if name not in self.owner:
            return None
        with self._decoding:
            if name not in self._decoded:
                group = self.owner[name]
                shapes = [[n or 0 for n in self.table[w].shape] for w in group.weights]
                decoded = decode_weights(self.encoded(group), shapes, name=group.module)
                self._decoded.update(zip(group.weights, decoded, strict=True))
            return self._decoded.pop(name)


class GroupDecoder(Protocol):
    """What decodes the groups of a linear; see `formats.dfloat11.kernels.CudaDecoder`."""

    numel: int

    def decode_into(self, out: Tensor, base: int = 0) -> None: ...


MakeDecoder = Callable[["Sequence[KernelGroup]", torch.device, torch.dtype], GroupDecoder]


@dataclass(frozen=True)
class PartSizes:
    """Bytes of each streamed component of one stacked linear."""

    nbytes: Mapping[str, int]


class Scratch:
    """One device buffer that every DFloat11 linear decodes into, as large as the largest of them."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.wanted = 0
        self._buffer: Tensor | None = None

    def reserve(self, numel: int) -> None:
        """Called while the model is built; the buffer is allocated when it is first used."""
        assert self._buffer is None or numel <= self._buffer.numel()
        self.wanted = max(self.wanted, numel)

    def view(self, rows: int, columns: int) -> Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(self.wanted, dtype=self.dtype, device=self.device)
        return self._buffer[: rows * columns].view(rows, columns)


class DFloat11Linear(Linear):
    """Decodes its weight into the scratch, for a product of dense weights.

    Its tensors are the components of each stacked part, `partN_COMPONENT` uint8, and the bias.
    """

    side_by_side = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: torch.dtype | None,
        product: Product,
        parts: Sequence[PartSizes],
        groups: CompressedGroups,
        names: Sequence[Group],
        scratch: Scratch,
        make_decoder: MakeDecoder,
    ) -> None:
        tensors: dict[str, Stored] = {
            f"part{index}_{component}": ((nbytes,), torch.uint8)
            for index, part in enumerate(parts)
            for component, nbytes in part.nbytes.items()
        }
        super().__init__(in_features, out_features, tensors, product, bias)
        self._groups, self._stored, self._scratch, self._make_decoder = groups, tuple(names), scratch, make_decoder
        self._decoder: GroupDecoder | None = None
        scratch.reserve(in_features * out_features)

    def prepare(self) -> None:
        """Build the decoder's tables; the tensors must be bound, to any buffer of the layout."""
        from .kernels import KernelGroup

        base = self._base()
        groups = []
        for index, name in enumerate(self._stored):
            encoded = self._groups.encoded(name)
            offsets = {c: getattr(self, f"part{index}_{c}").data_ptr() - base for c in STREAMED_COMPONENTS}
            positions = encoded.positions().astype(np.uint32)
            groups.append(
                KernelGroup(
                    encoded.luts.numpy(), positions, encoded.num_weights, encoded.encoded_exponent.numel(), **offsets
                )
            )
        self._decoder = self._make_decoder(groups, self._scratch.device, self._scratch.dtype)
        assert self._decoder.numel == self.in_features * self.out_features, "parts must adjoin in the scratch"

    def weights(self) -> Weights:
        assert self._decoder is not None, "prepare() was not called"
        weight = self._scratch.view(self.out_features, self.in_features)
        self._decoder.decode_into(weight, self._base())
        return Weights(weight, None, self._parameters["bias"])

    def _base(self) -> int:
        first: Tensor = getattr(self, f"part0_{STREAMED_COMPONENTS[0]}")
        return first.data_ptr()


class DFloat11Linears(StoredLinears):
    """Weights stay compressed where they are stored and are decoded by a kernel at every use."""

    def __init__(
        self, groups: CompressedGroups, dense: DenseLinears, scratch: Scratch, make_decoder: MakeDecoder, by: str = ""
    ) -> None:
        self.groups, self.dense, self.scratch, self.make_decoder = groups, dense, scratch, make_decoder
        self.name = f"dfloat11 (decoded at use{by})"

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        if modules == [LM_HEAD.removesuffix(".weight")]:
            # Decoded at load: as scratch it would be the largest by far, and text needs it often.
            return self.dense.build(modules, in_features, out_features, bias)
        names = [self.groups.owner[f"{module}.weight"] for module in modules]
        parts = []
        for group in names:
            encoded = self.groups.encoded(group)
            sizes = {c: encoded.tensors[c].numel() for c in STREAMED_COMPONENTS}
            parts.append(PartSizes(sizes | {"output_positions": 4 * len(encoded.positions())}))
        return DFloat11Linear(
            in_features,
            out_features,
            wide(self.dense.dtype) if bias else None,
            self.dense.product(modules),
            parts,
            self.groups,
            names,
            self.scratch,
            self.make_decoder,
        )

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        if modules == [LM_HEAD.removesuffix(".weight")]:
            return self.dense.sources(modules)
        names = [self.groups.owner[f"{module}.weight"].module for module in modules]
        return {
            f"part{index}_{component}": (stored_name(name, component),)
            for index, name in enumerate(names)
            for component in STREAMED_COMPONENTS
        }

    def prepare(self, module: nn.Module) -> None:
        for linear in module.modules():
            if isinstance(linear, DFloat11Linear):
                linear.prepare()

    def read(self, name: str) -> Tensor | None:
        module, _, component = name.rpartition(".")
        if component == "output_positions":
            # A file may lack the last entry, which the kernel reads.
            group = self.groups.owner[f"{module}.weight"]
            positions = self.groups.encoded(group).positions().astype("<u4")
            return torch.from_numpy(positions.view(np.uint8).copy())
        return self.groups.weight(name)


class DecodedAtLoad(StoredLinears):
    """Weights decoded on the CPU while loading, then dense: for devices without our kernel, and for any grouping."""

    name = "dfloat11 (decoded at load)"

    def __init__(self, groups: CompressedGroups, dense: DenseLinears) -> None:
        self.groups, self.dense = groups, dense

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        return self.dense.build(modules, in_features, out_features, bias)

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return self.dense.sources(modules)

    def read(self, name: str) -> Tensor | None:
        return self.groups.weight(name)

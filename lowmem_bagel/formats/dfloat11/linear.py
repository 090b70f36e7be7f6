"""Linears on DFloat11 weights: decoded on the GPU at every use, or on the CPU once, at load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...checkpoint.config import read_json
from ...checkpoint.folder import ModelFolder
from ...checkpoint.tensors import LM_HEAD, tensor_table
from ...errors import SettingError
from ...ops.linear import DenseLinear, Linear
from .codec import Encoded, check_shapes, decode_weights, from_tensors
from .groups import COMPONENTS, Group, read_config, resolve_groups, stored_name

if TYPE_CHECKING:
    from ..base import DenseLinears, StoredLinears
    from .kernels import Group as KernelGroup

STREAMED_COMPONENTS = ("encoded_exponent", "sign_mantissa", "output_positions", "gaps")
"""What the GPU reads; luts become its tables when the linear is prepared."""


class CompressedGroups:
    """The groups of a DFloat11 folder, of whatever grouping, checked as they are read."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self.table = tensor_table(folder.config)
        patterns = read_config(read_json(folder.path / "config.json"))
        groups = resolve_groups(patterns, folder.stored, self.table)
        self.owner: Mapping[str, Group] = {weight: group for group in groups for weight in group.weights}
        self._decoded: dict[str, Tensor] = {}

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

    def stored(self, name: str) -> tuple[str, ...]:
        """The stored tensors that a tensor of the checkpoint is part of."""
        group = self.owner.get(name)
        return (name,) if group is None else tuple(stored_name(group.module, c) for c in COMPONENTS)

    def weight(self, name: str) -> Tensor | None:
        """A compressed weight decoded on the CPU, bf16; the rest of its group is kept until asked for."""
        if name not in self.owner:
            return None
        if name not in self._decoded:
            group = self.owner[name]
            shapes = [[n or 0 for n in self.table[w].shape] for w in group.weights]
            decoded = decode_weights(self.encoded(group), shapes, name=group.module)
            self._decoded.update(zip(group.weights, decoded, strict=True))
        return self._decoded.pop(name)


class Decoder(Protocol):
    """What decodes the groups of a linear; see `formats.dfloat11.kernels.Decoder`."""

    numel: int

    def decode_into(self, out: Tensor, base: int = 0) -> None: ...


MakeDecoder = Callable[["Sequence[KernelGroup]", torch.device, torch.dtype], Decoder]


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
    """Decodes its weight into the scratch, then multiplies as the dense linear would.

    Its tensors are the components of each stacked part, `partN_COMPONENT` uint8, and the bias.
    """

    def __init__(self, dense: DenseLinear, parts: Sequence[PartSizes], groups: CompressedGroups, names: Sequence[Group],
                 scratch: Scratch, make_decoder: MakeDecoder) -> None:  # fmt: skip
        super().__init__(dense.in_features, dense.out_features)
        self.bias = dense.bias
        for index, part in enumerate(parts):
            for component, nbytes in part.nbytes.items():
                self.register_buffer(f"part{index}_{component}", torch.empty(nbytes, dtype=torch.uint8))
        # In a tuple, so that the dense linear's weight, which is scratch, is not one of this module's tensors.
        self._dense = (dense,)
        self._groups, self._names, self._scratch, self._make_decoder = groups, tuple(names), scratch, make_decoder
        self._decoder: Decoder | None = None
        scratch.reserve(dense.in_features * dense.out_features)

    def prepare(self) -> None:
        """Build the decoder's tables; the tensors must be bound, to any buffer of the layout."""
        from .kernels import Group as KernelGroup

        base = self._base()
        groups = []
        for index, name in enumerate(self._names):
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
        (dense,) = self._dense
        weight = self._scratch.view(self.out_features, self.in_features)
        dense._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._decoded().forward(x)

    def after_rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._decoded().after_rmsnorm(x, weight, eps)

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        return self._decoded().after_swiglu(gate_up)

    def activates(self, tokens: int) -> bool:
        return self._dense[0].activates(tokens)

    def activated(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._decoded().activated(x, weight, eps)

    def added(self, residual: Tensor, x: Sequence[Tensor]) -> Tensor:
        return self._decoded().added(residual, x)

    def added_after_swiglu(self, residual: Tensor, gate_up: Tensor) -> Tensor:
        return self._decoded().added_after_swiglu(residual, gate_up)

    def _decoded(self) -> Linear:
        (dense,) = self._dense
        assert self._decoder is not None, "prepare() was not called"
        self._decoder.decode_into(dense.weight, self._base())
        dense._parameters["bias"] = self.bias
        return dense

    def _base(self) -> int:
        first: Tensor = getattr(self, f"part0_{STREAMED_COMPONENTS[0]}")
        return first.data_ptr()


class DFloat11Linears:
    """Weights stay compressed where they are stored and are decoded by a kernel at every use."""

    def __init__(
        self, groups: CompressedGroups, dense: DenseLinears, scratch: Scratch, make_decoder: MakeDecoder, by: str
    ) -> None:
        self.groups, self.dense, self.scratch, self.make_decoder = groups, dense, scratch, make_decoder
        self.name = f"dfloat11 (decoded at use{by})"

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        linear = self.dense.build(modules, in_features, out_features, bias)
        if modules == [LM_HEAD.removesuffix(".weight")]:
            return linear  # decoded at load: as scratch it would be the largest by far, and text needs it often
        names = [self.groups.owner[f"{module}.weight"] for module in modules]
        parts = []
        for group in names:
            encoded = self.groups.encoded(group)
            sizes = {c: encoded.tensors[c].numel() for c in STREAMED_COMPONENTS}
            parts.append(PartSizes(sizes | {"output_positions": 4 * len(encoded.positions())}))
        assert isinstance(linear, DenseLinear) or hasattr(linear, "weight")
        return DFloat11Linear(linear, parts, self.groups, names, self.scratch, self.make_decoder)  # type: ignore[arg-type]

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        if modules == [LM_HEAD.removesuffix(".weight")]:
            return self.dense.sources(modules)
        names = [self.groups.owner[f"{module}.weight"].module for module in modules]
        return {
            f"part{index}_{component}": (stored_name(name, component),)
            for index, name in enumerate(names)
            for component in STREAMED_COMPONENTS
        }

    def stored(self, name: str) -> tuple[str, ...]:
        return self.groups.stored(name)

    def read(self, name: str) -> Tensor | None:
        module, _, component = name.rpartition(".")
        if component == "output_positions":
            # A file may lack the last entry, which the kernel reads.
            group = self.groups.owner[f"{module}.weight"]
            positions = self.groups.encoded(group).positions().astype("<u4")
            return torch.from_numpy(positions.view(np.uint8).copy())
        return self.groups.weight(name)


class DecodedAtLoad:
    """Weights decoded on the CPU while loading, then dense: for devices without our kernel, and for any grouping."""

    name = "dfloat11 (decoded at load)"

    def __init__(self, groups: CompressedGroups, dense: DenseLinears) -> None:
        self.groups, self.dense = groups, dense

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        return self.dense.build(modules, in_features, out_features, bias)

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return self.dense.sources(modules)

    def stored(self, name: str) -> tuple[str, ...]:
        return self.groups.stored(name)

    def read(self, name: str) -> Tensor | None:
        return self.groups.weight(name)


def dfloat11_linears(
    folder: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    dense: DenseLinears,
    reasons: dict[str, str],
) -> StoredLinears:
    """Our kernel where it runs and the grouping allows it, else decoding at load; `reasons` says why.

    Raises:
        SettingError: the backend was asked for and cannot run here.
        CheckpointError: the folder's groups contradict its configuration.
    """
    groups = CompressedGroups(folder)
    if backend == "cpu" or dtype == torch.float32:
        return DecodedAtLoad(groups, dense)
    why = _why_not_compressed(groups, device)
    if backend == "dfloat11" and why is None:
        make, by = _package_decoders(device, dtype)
        return DFloat11Linears(groups, dense, Scratch(device, dtype), make, by)
    from . import kernels as kernel

    why = why or kernel.why_unavailable(device)
    if why is None:
        return DFloat11Linears(groups, dense, Scratch(device, dtype), kernel.Decoder, "")
    if backend == "native" and device.type != "cpu":
        raise SettingError(f"the DFloat11 kernel cannot run here ({why}); choose backend auto or cpu")
    reasons["DFloat11 kernel"] = why
    return DecodedAtLoad(groups, dense)


def _package_decoders(device: torch.device, dtype: torch.dtype) -> tuple[MakeDecoder, str]:
    """The dfloat11 package's kernel, and how it is launched.

    Raises:
        MissingExtraError: the package is not installed.
        SettingError: it is switched off, or cannot write what is asked for.
    """
    from ...hardware.features import why_off
    from . import package_kernel as package_dfloat11

    off = why_off("dfloat11")
    if off is not None:
        raise SettingError(f"the dfloat11 package is {off}; unset it, or choose another backend")
    if dtype != torch.bfloat16:
        raise SettingError("the dfloat11 package's kernel writes bfloat16 alone; choose backend auto")
    launch, by = package_dfloat11.load(device)

    def make(groups: Sequence[KernelGroup], on: torch.device, wanted: torch.dtype) -> Decoder:
        return package_dfloat11.PackageDecoder(groups, on, wanted, launch)

    return make, f" by the dfloat11 package's kernel through {by}"


def _why_not_compressed(groups: CompressedGroups, device: torch.device) -> str | None:
    """None where weights can stay compressed, whichever kernel decodes them."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, not {device.type}"
    joint = next((g.module for g in groups.owner.values() if len(g.weights) > 1), None)
    if joint is not None:
        return f"{joint} groups several linears; convert the source to group each by itself"
    return None

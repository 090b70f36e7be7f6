"""What formats share: work on blocks of rows, dequantising as the reference, and how a folder's linears are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.folder import ModelFolder
from ..checkpoint.safetensors_file import torch_dtype
from ..errors import CheckpointError
from ..kernels.cuda_source import CudaSource
from ..kernels.trial_inputs import Sizes
from ..kernels.trials import Kernel, choose_elementwise, why_not
from ..ops.dtypes import wide
from ..ops.elementwise import Elementwise
from ..ops.linear import Before, Dense, Linear, Product, Stored, Weights
from ..ops.routed import Groups
from .spec import FormatSpec, Part

Dequantize = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""(weight, scales, dtype) -> dense weight [out, in] of that dtype, for the stored tensors of one format."""

BLOCK_VALUES = 1 << 24
"""Values handled at a time where float32 copies are needed: 64 MiB a copy, however large the tensor is."""
CPU_BLOCK_VALUES = 1 << 18
"""The same where the copies should stay in a CPU's cache; 3 to 5 times faster there than going through memory."""


class Dequantized(Product):
    """Dequantizes the whole weight into x's dtype, then multiplies: the reference, and the way that always works."""

    def __init__(self, dequantize: Dequantize) -> None:
        self.dequantize = dequantize

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        weight, scales, bias = weights
        assert scales is not None
        return F.linear(x, self.dequantize(weight, scales, x.dtype), None if bias is None else bias.to(x.dtype))

    def grouped(self, x: Tensor, weights: Weights, groups: Groups, before: Before = None) -> Tensor:
        weight, scales, _ = weights
        assert scales is not None
        return Dense().grouped(x, Weights(self.dequantize(weight, scales, x.dtype)), groups, before)


def row_blocks(rows: int, width: int, values: int = BLOCK_VALUES) -> Iterator[slice]:
    """Slices of whole rows of a matrix, each of at most about `values` values and of at least one row."""
    step = max(1, values // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def dequantize_blocks(dense: Tensor) -> Iterator[slice]:
    """Row blocks of the size that suits filling the dense matrix on its device."""
    rows, width = dense.shape
    return row_blocks(rows, width, CPU_BLOCK_VALUES if dense.device.type == "cpu" else BLOCK_VALUES)


class Refused(Exception):
    """Raised while a way is being made: the text is why it cannot be used here."""


@dataclass
class Site:
    """What a way is made from, at loading.

    backend: as asked for. reasons: gets what is worth knowing of a choice, by its name. dense: how weights are
    multiplied that the folder's format leaves dense, or makes dense. tune: whether a way may measure its settings.
    dequantizes: whether the way that was taken makes weights dense for every product.
    """

    folder: ModelFolder
    device: torch.device
    dtype: torch.dtype
    backend: str
    reasons: dict[str, str]
    dense: DenseLinears | None = None
    tune: bool = True
    dequantizes: bool = False

    @property
    def sizes(self) -> Sizes:
        """What kernels' settings are chosen by."""
        return Sizes(self.folder.config.decoder, self.dtype)

    @cached_property
    def source(self) -> CudaSource:
        """The CUDA sources for this arithmetic."""
        return CudaSource(self.device, self.dtype)

    @cached_property
    def around(self) -> Elementwise:
        """What surrounds products of fp16 arithmetic, and of bf16 where Triton's kernels do not run on a card."""
        found, why = choose_elementwise(self.source)
        if why is not None:
            self.reasons["elementwise kernels"] = f"{found.name}: {why}"
        return found

    def runs_groups(self, *kernels: Kernel | str) -> bool:
        """Whether the kernels of routed experts are needed and run; without them experts take turns."""
        if self.folder.config.decoder.routed is None or self.dtype == torch.float32:
            return False
        why = next((why for kernel in kernels if (why := why_not(kernel, self.device, self.sizes)) is not None), None)
        if why is not None:
            self.reasons["routed experts"] = f"one after the other: {why}"
        return why is None

    def require(self, *kernels: Kernel | str) -> None:
        """Raises Refused where a kernel does not run on the device or gives a wrong answer."""
        for kernel in kernels:
            why = why_not(kernel, self.device, self.sizes)
            if why is not None:
                raise Refused(why)


class StoredLinears:
    """How a folder stores the decoder's linears, and what multiplies by them: what a way makes.

    This class is for weights under their own names, each in the parts that its encoding declares; a weight that is not
    encoded is dense. `modules` are the checkpoint's module names that a (fused) linear stacks by rows.

    name: format and way, as `doctor` and plans show it.
    """

    def __init__(self, site: Site, spec: FormatSpec, product: Product, name: str) -> None:
        assert site.dense is not None
        self.folder, self.dense, self.spec, self._product, self.name = site.folder, site.dense, spec, product, name

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        """The linear, to be built on the meta device; its tensors' shapes and dtypes are what memory must hold."""
        parts = self._parts(modules)
        if not parts:
            return self.dense.build(modules, in_features, out_features, bias)
        bias_dtype = wide(self.dense.dtype) if bias else None
        return encoded_linear(self.spec, in_features, out_features, self.product(modules), bias_dtype)

    def product(self, modules: Sequence[str]) -> Product:
        """What multiplies by these modules' encoded weights."""
        return self._product

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The linear's tensors, bias aside: path in the linear -> stored names, stacked by rows."""
        parts = self._parts(modules)
        if not parts:
            return self.dense.sources(modules)
        return {part.path: tuple(f"{module}.weight{part.suffix}" for module in modules) for part in parts}

    def read(self, name: str) -> Tensor | None:
        """A tensor that is not stored plainly (a weight that is decoded at load); None for all others. Several threads
        ask at once."""
        return None

    def prepare(self, module: nn.Module) -> None:
        """Called when the tensors of the linears in a module are bound for the first time."""

    def shared(self, modules: Sequence[str], what: str, values: Sequence[object]) -> str:
        """The value that all modules of a linear have.

        Raises:
            CheckpointError: they differ.
        """
        if len(set(values)) != 1:
            raise CheckpointError(f"{', '.join(modules)}: differ in their {what}; convert the folder again")
        return str(values[0])

    def _parts(self, modules: Sequence[str]) -> tuple[Part, ...]:
        manifest = self.folder.manifest
        if manifest is None:
            return ()
        encodings = [manifest.tensors[f"{module}.weight"].encoding for module in modules]
        return self.spec.parts if self.shared(modules, "encoding", encodings) == self.spec.name else ()


def encoded_linear(
    spec: FormatSpec, in_features: int, out_features: int, product: Product, bias: torch.dtype | None = None
) -> Linear:
    """A linear that holds the parts of a format's encoded weight."""
    shape = out_features, in_features
    tensors: dict[str, Stored] = {part.path: (part.shape(shape), torch_dtype(part.dtype)) for part in spec.parts}
    return Linear(in_features, out_features, tensors, product, bias)


class DenseLinears(StoredLinears):
    """Weights used as they are stored, but for a conversion of dtype."""

    def __init__(self, dtype: torch.dtype, product: Product, name: str = "dense") -> None:
        self.dtype, self._product, self.name = dtype, product, name

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        weight: dict[str, Stored] = {"weight": ((out_features, in_features), self.dtype)}
        return Linear(in_features, out_features, weight, self._product, wide(self.dtype) if bias else None)

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {"weight": tuple(f"{module}.weight" for module in modules)}

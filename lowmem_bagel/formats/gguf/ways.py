"""Products of weights in GGUF's blocks, made for a device: see `spec`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch

from ...checkpoint.folder import ModelFolder
from ...checkpoint.gguf_blocks import BLOCK_TYPES
from ...errors import CheckpointError
from ...ops.dtypes import wide
from ...ops.linear import Linear, Product
from ..base import Refused, Site, StoredLinears
from ..registry import format_spec
from ..scaled_matmul import choose_matmul
from .packed import CudaPackedBlocks, PackedBlocks
from .products import BlocksAsFp16, DecodedBlocks, ElementwiseBlocks, MixedBlocks
from .trial import TRITON, why_not_packed

Make = Callable[[str], Product]
"""Makes the product of a type."""


class BlockLinears(StoredLinears):
    """Weights in the types that the file has them in, as the bytes [nbytes] that they are there."""

    def __init__(self, site: Site, make: Make, name: str) -> None:
        spec = format_spec(site.folder.format)
        kinds = kinds_of(site.folder)
        self._products = {kind: make(kind) for kind in kinds}
        said = ", ".join((name, *kinds)) if len(kinds) > 1 else name
        super().__init__(site, spec, self._products[kinds[0]], f"{spec.name} ({said})")

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        if not self._encoded(modules):
            return self.dense.build(modules, in_features, out_features, bias)
        nbytes = sum(self.folder.entry(f"{module}.weight").nbytes for module in modules)
        bias_dtype = wide(self.dense.dtype) if bias else None
        return Linear(
            in_features, out_features, {"weight": ((nbytes,), torch.uint8)}, self.product(modules), bias_dtype
        )

    def product(self, modules: Sequence[str]) -> Product:
        entries = [self.folder.located(f"{module}.weight").pieces[0].entry for module in modules]
        parts = [
            (kind, sum(entry.shape[0] for entry in same)) for kind, same in groupby(entries, lambda entry: entry.dtype)
        ]
        return self._products[parts[0][0]] if len(parts) == 1 else MixedBlocks(parts, self._products)

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {"weight": tuple(f"{module}.weight" for module in modules)}

    def _encoded(self, modules: Sequence[str]) -> bool:
        """Whether the weights are in blocks.

        Raises:
            CheckpointError: some are, and some are not.
        """
        stored = [self.folder.stored.get(f"{module}.weight") for module in modules]
        encoded = {one is not None and one.encoded for one in stored}
        if len(encoded) > 1:
            raise CheckpointError(
                f"{self.folder.path}: of {', '.join(modules)} some are quantised and some are not, and they are "
                "multiplied together; make the file anew with all of them quantised, or none"
            )
        return encoded == {True}


def kinds_of(folder: ModelFolder) -> list[str]:
    """The types that a folder's weights have."""
    found = {stored.entry.dtype for stored in folder.stored.values() if stored.encoded}
    return [kind for kind in BLOCK_TYPES if kind in found]


def fp16(site: Site) -> StoredLinears:
    matmul = choose_matmul(site.device)
    packed = _packed(site)
    return BlockLinears(site, lambda kind: BlocksAsFp16(matmul, site.around, packed(kind)), "decoded to fp16")


def triton(site: Site) -> StoredLinears:
    from .kernels import TritonBlocks

    site.require("fused", *(TRITON[kind] for kind in kinds_of(site.folder)))
    assert site.dense is not None
    dense = site.dense.product(())
    return BlockLinears(site, lambda kind: TritonBlocks(kind, dense), "TritonBlocks")


def cuda(site: Site) -> StoredLinears:
    if not site.around.compiled:
        raise Refused(site.reasons["elementwise kernels"])
    around, packed = site.around, _packed(site)
    return BlockLinears(site, lambda kind: ElementwiseBlocks(around, packed(kind)), f"decoded, {around.name} around it")


def dequantized(site: Site) -> StoredLinears:
    return BlockLinears(site, lambda kind: DecodedBlocks(PackedBlocks(kind)), "decoded")


def _packed(site: Site) -> Callable[[str], PackedBlocks]:
    """By our kernels where they run."""
    if site.device.type == "cpu":
        return PackedBlocks
    why = why_not_packed(site.source, kinds_of(site.folder))
    if why is None:
        return lambda kind: CudaPackedBlocks(kind, site.source)
    site.reasons["packed GGUF"] = f"PyTorch's operations: {why}"
    return PackedBlocks

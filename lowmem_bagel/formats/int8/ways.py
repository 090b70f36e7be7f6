"""INT8 products, made for a device: see `spec`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checkpoint.tensors import EMBEDDING
from ...errors import CheckpointError
from ...ops.device import on
from ...ops.dtypes import wide
from ...ops.errors import relative_l2
from ...ops.int8 import pairs_overflow
from ...ops.linear import Product, Weights
from ..base import Refused, Site, StoredLinears
from ..scaled_matmul import choose_matmul
from .codec import IntMm, WeightOnly, dequantize, quantize
from .packed import CudaPackedInt8, PackedInt8
from .pairs import Pairs
from .rotation import Rotated, Rotation, group_size
from .scaled import Int8AsFp16, Int8Products
from .spec import SPEC
from .trial import GROUPED, MATMUL, why_not_packed, why_not_pairs
from .tuning import tuned_tiles

TRIAL_ERROR = 0.05
"""Largest relative L2 error of a trial of PyTorch's int8 matmul, activations quantized."""

WITHOUT_VNNI = "torch._int_mm is wrong on a processor without VNNI: products are added in 16 bits"


class Int8Linears(StoredLinears):
    """A rotated weight's inputs are rotated alike; an embedding, which is not multiplied by, is dequantized at load."""

    def __init__(self, site: Site, product: Product, name: str) -> None:
        super().__init__(site, SPEC, product, f"int8 ({name})")
        assert site.folder.manifest is not None
        self.records = site.folder.manifest.tensors

    def product(self, modules: Sequence[str]) -> Product:
        groups = [self.records[f"{module}.weight"].options.get("rotation_group", 0) for module in modules]
        group = self.shared(modules, "rotation_group", groups)
        if group == "0":
            return self._product
        width = self.folder.entry(f"{modules[0]}.weight").shape[-1]
        if group != str(group_size(width)):
            raise CheckpointError(
                f"{self.folder.path}: rotation_group of {modules[0]} is {group}, and rows of {width} values are "
                f"rotated in groups of {group_size(width)}; convert the folder again"
            )
        return Rotated(self._product, Rotation(group_size(width)))

    def read(self, name: str) -> Tensor | None:
        if name != EMBEDDING or self.records[name].encoding != SPEC.name:
            return None
        weight, scale = self.folder.tensor(name), self.folder.tensor(f"{name}_scale")
        return dequantize(weight, scale, wide(self.dense.dtype))


def triton(site: Site) -> Int8Linears:
    from .kernels import TritonInt8

    site.require("fused", MATMUL)
    tiles, site.reasons["int8 tiles"] = tuned_tiles(site.device, site.sizes, site.tune)
    why = why_not_pairs(site.source)
    site.reasons["int8 many tokens"] = "by pairs of blocks" if why is None else f"by Triton's tiles: {why}"
    pairs = Pairs(site.source, tiles.processors) if why is None else None
    return Int8Linears(site, TritonInt8(tiles, site.runs_groups(GROUPED, "grouped_matmul"), pairs), "TritonInt8")


def int_mm(site: Site) -> Int8Linears:
    _try_int_mm(site.device)
    packed = _packed(site)
    if not (packed.compiled and site.around.compiled):
        return Int8Linears(site, IntMm(), "IntMm")
    return Int8Linears(site, Int8Products(site.around, packed), f"IntMm, {site.around.name} around it")


def processor(site: Site) -> Int8Linears:
    _try_int_mm(site.device)
    if site.backend != "auto":
        return Int8Linears(site, IntMm(), "IntMm")
    from .cpu_choice import choose_by_trial

    product, why = choose_by_trial(IntMm(), _floats(site), site.dtype)
    return Int8Linears(site, product, f"{type(product).__name__}; {why}")


def dequantized(site: Site) -> Int8Linears:
    product = _floats(site)
    return Int8Linears(site, product, "dequantised to fp16" if site.dtype == torch.float16 else type(product).__name__)


def _floats(site: Site) -> Product:
    """Weights made floats for each product."""
    if site.dtype != torch.float16:
        return WeightOnly()
    return Int8AsFp16(choose_matmul(site.device), site.around, _packed(site))


def _packed(site: Site) -> PackedInt8:
    """By our kernels where they run; float32 has none."""
    if site.dtype == torch.float32 or site.device.type == "cpu":
        return PackedInt8(site.dtype)
    why = why_not_packed(site.source)
    if why is None:
        return CudaPackedInt8(site.source)
    site.reasons["packed INT8"] = f"PyTorch's operations: {why}"
    return PackedInt8(site.dtype)


def _try_int_mm(device: torch.device) -> None:
    """Raises Refused where PyTorch's int8 matmul does not run or is wrong."""
    generator = torch.Generator().manual_seed(0)
    dense, x = (torch.randn(rows, 128, generator=generator) for rows in (48, 32))
    weight, scale = quantize(dense)
    try:
        overflows = device.type == "cpu" and pairs_overflow()
        with on(device):
            result = IntMm().multiply(x.to(device), Weights(weight.to(device), scale.to(device))).cpu()
    except Exception as error:  # what cuBLAS lacks on a card shows only when it is called
        raise Refused(f"its trial failed ({type(error).__name__})") from error
    if overflows:
        raise Refused(WITHOUT_VNNI)
    expected = x @ dequantize(weight, scale, x.dtype).T
    distance = relative_l2(result, expected)
    if not distance <= TRIAL_ERROR:
        raise Refused(f"its trial was wrong by {distance:.1e}")

"""NF4 products, made for a device: see `spec`."""

from __future__ import annotations

from ...ops.linear import Product
from ..base import Dequantized, Refused, Site, StoredLinears
from ..scaled_matmul import choose_matmul
from .codec import dequantize
from .packed import CudaPackedNf4, PackedNf4
from .scaled import ElementwiseNf4, Nf4AsFp16
from .spec import SPEC
from .trial import TRITON, why_not_packed


def fp16(site: Site) -> StoredLinears:
    return _linears(site, Nf4AsFp16(choose_matmul(site.device), site.around, _packed(site)), "dequantised to fp16")


def triton(site: Site) -> StoredLinears:
    from .kernels import TritonNf4

    site.require("fused", TRITON)
    assert site.dense is not None
    return _linears(site, TritonNf4(site.dense.product(())), "TritonNf4")


def cuda(site: Site) -> StoredLinears:
    if not site.around.compiled:
        raise Refused(site.reasons["elementwise kernels"])
    return _linears(site, ElementwiseNf4(site.around, _packed(site)), f"dequantised, {site.around.name} around it")


def dequantized(site: Site) -> StoredLinears:
    return _linears(site, Dequantized(dequantize), "Dequantized")


def _linears(site: Site, product: Product, name: str) -> StoredLinears:
    return StoredLinears(site, SPEC, product, f"nf4 ({name})")


def _packed(site: Site) -> PackedNf4:
    """By our kernels where they run."""
    if site.device.type == "cpu":
        return PackedNf4(site.dtype)
    why = why_not_packed(site.source)
    if why is None:
        return CudaPackedNf4(site.source)
    site.reasons["packed NF4"] = f"PyTorch's operations: {why}"
    return PackedNf4(site.dtype)

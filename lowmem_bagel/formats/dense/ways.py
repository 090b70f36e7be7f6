"""Dense products, made for a device: see `spec.DENSE_WAYS`."""

from __future__ import annotations

import torch

from ...ops.linear import Dense
from ..base import DenseLinears, Refused, Site
from ..scaled_matmul import Fp16Weights, choose_matmul
from .elementwise import ElementwiseDense


def triton_swiglu(site: Site) -> DenseLinears:
    from .triton import TritonDense

    site.require("fused", "gemv", "swiglu_matmul")
    processors = torch.cuda.get_device_properties(site.device).multi_processor_count
    return DenseLinears(site.dtype, TritonDense(processors, site.runs_groups("grouped_matmul")), "dense (Triton)")


def triton(site: Site) -> DenseLinears:
    from .triton import TritonDense

    site.require("fused", "gemv")
    return DenseLinears(site.dtype, TritonDense(groups=site.runs_groups("grouped_matmul")), "dense (Triton)")


def cuda(site: Site) -> DenseLinears:
    if not site.around.compiled:
        raise Refused(site.reasons["elementwise kernels"])
    return DenseLinears(site.dtype, ElementwiseDense(site.around), f"dense ({site.around.name} around it)")


def fp16(site: Site) -> DenseLinears:
    product = Fp16Weights(choose_matmul(site.device), site.around)
    if product.way.reason:
        site.reasons["fp16 matmul"] = product.way.reason
    return DenseLinears(site.dtype, product, f"dense ({product.way.name})")


def torch_(site: Site) -> DenseLinears:
    return DenseLinears(site.dtype, Dense())

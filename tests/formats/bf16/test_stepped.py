"""Linears of cards without Triton, by our CUDA kernels' steps, against the plain ones: emulated, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.cuda_emulation import CudaSources
from support.numeric import gaussian, relative_l2

from lowmem_bagel.formats.base import Dequantized
from lowmem_bagel.formats.bf16.stepped import SteppedDenseLinear, SteppedNf4
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.nf4 import codec as nf4
from lowmem_bagel.formats.scaled_matmul import (
    Fp16Weights,
    Int8Products,
    Nf4AsFp16,
    ScaledFp16Linear,
    choose_matmul,
)
from lowmem_bagel.kernels.elementwise_cuda import CudaTokenSteps
from lowmem_bagel.ops.linear import DenseLinear, Linear

IN, OUT = 128, 96
BF16, FP16 = torch.bfloat16, torch.float16


def make(form: str, half: torch.dtype, bias: bool, sources: CudaSources) -> tuple[Linear, Linear]:
    """The linear with steps, and the plain one in float32 that computes the same."""
    device, wide = sources.device, torch.float32 if half == FP16 else half
    steps = CudaTokenSteps(device, half, sources.load)
    with torch.device("cpu"):
        stepped: Linear
        plain: Linear
        if form == "dense":
            way = Fp16Weights(choose_matmul(device), steps)
            stepped = (
                ScaledFp16Linear(IN, OUT, bias, way) if half == FP16 else SteppedDenseLinear(IN, OUT, bias, half, steps)
            )
            plain = DenseLinear(IN, OUT, bias, torch.float32)
            tensors = {"weight": gaussian(OUT, IN, std=0.1, dtype=half)}
        elif form == "int8":
            stepped = int8.Int8Linear(IN, OUT, bias, wide, Int8Products(steps))
            plain = int8.Int8Linear(IN, OUT, bias, torch.float32, Dequantized(int8.dequantize))
            tensors = dict(zip(("weight", "scale"), int8.quantize(gaussian(OUT, IN, std=0.1)), strict=True))
        else:
            matmul = Nf4AsFp16(choose_matmul(device), steps)
            stepped = nf4.Nf4Linear(IN, OUT, bias, wide, matmul if half == FP16 else SteppedNf4(steps))
            plain = nf4.Nf4Linear(IN, OUT, bias, torch.float32, Dequantized(nf4.dequantize))
            codes = (gaussian(OUT, IN // 2, std=100).int() & 255).to(torch.uint8)
            tensors = {"weight": codes, "absmax": gaussian(OUT, IN // 64, seed=2).abs() * 0.1}
        if bias:
            tensors["bias"] = gaussian(OUT, seed=3, dtype=wide)
        for linear in (stepped, plain):
            for name, value in tensors.items():
                linear.get_parameter(name).data.copy_(value)
    return stepped.to(device), plain.to(device)


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "forward": lambda linear, x, norm, residual: linear(x),
    "after_rmsnorm": lambda linear, x, norm, residual: linear.after_rmsnorm(x, norm, 1e-6),
    "activated": lambda linear, x, norm, residual: linear.activated(x, norm, 1e-6),
    "added": lambda linear, x, norm, residual: linear.added(residual.clone(), x.split([1] * len(x))),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("half", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("form", ["dense", "int8", "nf4"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 19), (2, 20)])
def test_each_way_to_call_a_linear(
    cuda_sources: CudaSources, shape: tuple[int, int], form: str, half: torch.dtype, bias: bool, call: str
) -> None:
    stepped, plain = make(form, half, bias, cuda_sources)
    wide = torch.float32 if half == FP16 else half
    with torch.device("cpu"):
        x, residual = gaussian(*shape, IN, seed=4, dtype=wide), gaussian(*shape, OUT, seed=5, dtype=wide)
        norm = gaussian(IN, seed=6, dtype=wide)
    x, residual, norm = (tensor.to(cuda_sources.device) for tensor in (x, residual, norm))
    with torch.no_grad():
        found = CALLS[call](stepped, x, norm, residual)
        wanted = CALLS[call](plain, x.float(), norm.float(), residual.float())
    assert found.dtype == wide
    assert found.shape == wanted.shape
    quantised = form == "int8" and shape != (1, 1)
    assert relative_l2(found, wanted) < (0.015 if quantised else 1.5e-3 if half == FP16 else 0.012)

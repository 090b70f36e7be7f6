"""Linears of cards without Triton, by our CUDA kernels' steps, against the plain ones: emulated, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from support.cuda_emulation import CudaSources
from support.linears import PAIRS, call, linear
from support.numeric import gaussian, relative_l2

from lowmem_bagel.formats.dense.elementwise import ElementwiseDense
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.int8.packed import CudaPackedInt8
from lowmem_bagel.formats.int8.scaled import Int8Products
from lowmem_bagel.formats.nf4 import codec as nf4
from lowmem_bagel.formats.nf4.packed import CudaPackedNf4
from lowmem_bagel.formats.nf4.scaled import ElementwiseNf4, Nf4AsFp16
from lowmem_bagel.formats.scaled_matmul import Fp16Weights, choose_matmul
from lowmem_bagel.kernels.cuda_source import CudaSource
from lowmem_bagel.kernels.elementwise_cuda import CudaElementwise
from lowmem_bagel.ops.linear import Linear, Product

IN, OUT = 128, 96
BF16, FP16 = torch.bfloat16, torch.float16


def make(form: str, half: torch.dtype, bias: bool, sources: CudaSources) -> tuple[Linear, torch.Tensor]:
    """The linear with steps, and its dense weight in float32 on the CPU."""
    source = CudaSource(sources.device, half, sources.load)
    around = CudaElementwise(source)
    way = choose_matmul(sources.device)
    product: Product
    with torch.device("cpu"):
        weight, scales = gaussian(OUT, IN, std=0.1, dtype=half), None
        dense = weight.float()
        if form == "dense":
            product = Fp16Weights(way, around) if half == FP16 else ElementwiseDense(around)
        elif form == "int8":
            product = Int8Products(around, CudaPackedInt8(source))
            weight, scales = int8.quantize(gaussian(OUT, IN, std=0.1))
            dense = int8.dequantize(weight, scales, torch.float32)
        else:
            packed = CudaPackedNf4(source)
            product = Nf4AsFp16(way, around, packed) if half == FP16 else ElementwiseNf4(around, packed)
            weight = (gaussian(OUT, IN // 2, std=100).int() & 255).to(torch.uint8)
            scales = gaussian(OUT, IN // 64, seed=2).abs() * 0.1
            dense = nf4.dequantize(weight, scales, torch.float32)
        added = gaussian(OUT, seed=3, dtype=around.wide) if bias else None
        return linear(product, weight, scales, added).to(sources.device), dense


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("half", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("form", ["dense", "int8", "nf4"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (2, 9)])
def test_each_way_to_call_a_linear(
    cuda_sources: CudaSources, shape: tuple[int, int], form: str, half: torch.dtype, bias: bool, pair: tuple[str, str]
) -> None:
    stepped, dense = make(form, half, bias, cuda_sources)
    wide = torch.float32 if half == FP16 else half
    given = call(pair, shape, (OUT, IN), seed=4).to(wide)
    stored_bias = stepped.weights().bias
    wanted = given.exact(dense, None if stored_bias is None else stored_bias.cpu())
    bound = 1.5e-3 if half == FP16 else 0.012
    if form == "int8" and shape != (1, 1):  # activations are quantised; SwiGLU's have larger peaks
        bound = 0.03 if pair[0] == "swiglu" else 0.015
    rows = [given.in_rows([1] * shape[0])] if shape != (1, 17) else []  # as one token's
    for same in (given, *rows):
        with torch.no_grad():
            found = stepped(*same.to(cuda_sources.device)).cpu()
        assert found.dtype == wide
        assert found.shape == wanted.shape
        assert relative_l2(found, wanted) < bound
    assert stepped.fuses(shape[0] * shape[1], given.before, given.after) == (pair[1] == "swiglu")

"""Weights in GGUF's blocks by CUDA kernels against PyTorch's operations: emulated, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from support.cuda_emulation import CudaSources
from support.numeric import gaussian, relative_l2

from lowmem_bagel.checkpoint.gguf_blocks import BLOCK_TYPES
from lowmem_bagel.formats.gguf import trial
from lowmem_bagel.formats.gguf.packed import CudaPackedBlocks, PackedBlocks
from lowmem_bagel.formats.gguf.products import BlocksAsFp16, DecodedBlocks, ElementwiseBlocks
from lowmem_bagel.formats.gguf.trial import random_blocks
from lowmem_bagel.formats.scaled_matmul import UPCAST
from lowmem_bagel.kernels import nvrtc
from lowmem_bagel.kernels.cuda_source import CudaSource
from lowmem_bagel.ops.elementwise import Elementwise
from lowmem_bagel.ops.linear import SWIGLU, Add, RMSNorm, Weights

CLOSE = 2e-6


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def source(request: pytest.FixtureRequest, cuda_sources: CudaSources) -> CudaSource:
    return CudaSource(cuda_sources.device, request.param, cuda_sources.load)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize(("rows", "width"), [(3, 256), (17, 3584)])
def test_weights_become_halves_to_the_bit(source: CudaSource, kind: str, rows: int, width: int) -> None:
    weight = random_blocks(source.device, kind, rows, width).flatten()
    found = CudaPackedBlocks(kind, source).decoded(weight, width, source.half)
    assert (found.dtype, found.shape) == (source.half, (rows, width))
    assert torch.equal(found, PackedBlocks(kind).decoded(weight, width, source.half))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize(("rows", "width"), [(3, 256), (33, 3584), (5, 18944), (1, 4352)])
def test_one_token_is_multiplied_as_the_weights_are_read(source: CudaSource, kind: str, rows: int, width: int) -> None:
    weight = random_blocks(source.device, kind, rows, width).flatten()
    token = gaussian(1, width, seed=7).half().to(source.device)
    found = CudaPackedBlocks(kind, source).times_token(token, weight)
    assert (found.dtype, found.shape) == (torch.float32, (1, rows))
    wanted = token.double() @ PackedBlocks(kind).decoded(weight, width, torch.float64).t()
    assert relative_l2(found, wanted) < CLOSE


def test_the_trial_before_use_accepts_them_and_refuses_wrong_ones(
    source: CudaSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "why_unavailable", lambda _: None)
    assert trial.why_not_packed(source) is None
    right = CudaPackedBlocks.decoded
    monkeypatch.setattr(CudaPackedBlocks, "decoded", lambda *given: right(*given) * 1.0625)
    assert (trial.why_not_packed(source, ["Q5_K"]) or "").startswith("its trial was wrong by 6.")


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_products_in_fp16_and_in_bf16_without_triton(kind: str, tokens: int) -> None:
    """In PyTorch's operations, as the reference has them in float32."""
    weight, norm = random_blocks(torch.device("cpu"), kind, 48, 256, 1 / 16).flatten(), gaussian(256, seed=2)
    reference = DecodedBlocks(PackedBlocks(kind))
    for before, after, width in ((None, None, 256), (RMSNorm(norm, 1e-6), SWIGLU, 256), (SWIGLU, "add", 512)):
        x = gaussian(tokens, width, seed=3)
        residual = gaussian(tokens, 48, seed=4)
        bias = None if after == "add" else gaussian(48, seed=5)
        wanted = reference.product(x, Weights(weight, None, bias), before, Add(residual) if after == "add" else after)
        fp16 = BlocksAsFp16(UPCAST, Elementwise(), PackedBlocks(kind))
        found = fp16.product(x, Weights(weight, None, bias), before, Add(residual.clone()) if after == "add" else after)
        assert relative_l2(found, wanted) < 2e-3
        if tokens == 1:
            continue
        plain = ElementwiseBlocks(Elementwise(torch.bfloat16), PackedBlocks(kind))
        low = RMSNorm(norm.bfloat16(), 1e-6) if isinstance(before, RMSNorm) else before
        held = Weights(weight, None, None if bias is None else bias.bfloat16())
        found = plain.product(x.bfloat16(), held, low, Add(residual.bfloat16()) if after == "add" else after)
        assert relative_l2(found.float(), wanted) < 3e-2

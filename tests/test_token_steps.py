"""The steps of fp16 arithmetic by our CUDA kernels, against PyTorch's operations: emulated on the CPU, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulation
import pytest
import torch
from numeric import gaussian, relative_l2
from torch import Tensor

from lowmem_bagel.kernels import nvrtc
from lowmem_bagel.kernels.token_steps import WIDE_FROM, CudaTokenSteps
from lowmem_bagel.model.decoder import qk_norm_rope, rope_at
from lowmem_bagel.model.linear import rms_norm
from lowmem_bagel.quant import int8
from lowmem_bagel.quant.narrow import INTEGERS_DOWN, TokenSteps

REFERENCE = TokenSteps()
EXPONENT = 15
CLOSE = 2e-6
"""Relative L2 of float32 results: sums and exponentials are not taken in the same order and way."""


@pytest.fixture(
    params=[
        pytest.param("ascending", marks=pytest.mark.skipif(cuda_emulation.compiler() is None, reason="needs g++")),
        pytest.param("descending", marks=pytest.mark.skipif(cuda_emulation.compiler() is None, reason="needs g++")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def steps(request: pytest.FixtureRequest) -> Iterator[CudaTokenSteps]:
    """Kernels on their device, which is torch's default in the test."""
    if request.param == "cuda":
        device = torch.device("cuda")
        if reason := nvrtc.why_unavailable(device):
            pytest.skip(reason)
        with device:
            yield CudaTokenSteps(device)
        return
    descending = request.param == "descending"
    yield CudaTokenSteps(
        torch.device("cpu"), lambda source, defines: cuda_emulation.Module(source, defines, descending)
    )


def random(*shape: int, std: float = 1.0, seed: int = 0) -> Tensor:
    device = torch.get_default_device()
    with torch.device("cpu"):
        return gaussian(*shape, std=std, seed=seed).to(device)


WIDTHS = [64, 3584, 18944, WIDE_FROM - 4, 66, 7]
"""Of the 7B model, and such as are not multiples of four or of a warp."""
SIZES = [0.0, 1e-30, 1e-3, 1.0, 1e6, 1e34]


def of_all_sizes(width: int) -> Tensor:
    """A token of each size."""
    return random(len(SIZES), width).clamp(-1, 1) * torch.tensor(SIZES)[:, None]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_are_halved_as_the_reference_does(steps: CudaTokenSteps, width: int, dtype: torch.dtype) -> None:
    x = of_all_sizes(width)
    x = x.to(dtype) if dtype == torch.float32 else x.clamp(-6e4, 6e4).to(dtype)
    values, back = steps.halved(x, EXPONENT)
    wanted, wanted_back = REFERENCE.halved(x, EXPONENT)
    assert torch.equal(values, wanted)
    assert torch.equal(back, wanted_back)
    assert torch.isfinite(values).all()
    assert values[-1].abs().max() >= 2 ** (EXPONENT - 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_normalised_tokens_are_halved(steps: CudaTokenSteps, width: int) -> None:
    x, norm = of_all_sizes(width)[2:5], random(width, seed=1)
    values, back = steps.halved(x, EXPONENT, norm, 1e-6)
    wanted = rms_norm(x.double(), norm.double(), 1e-6)
    assert relative_l2(values.double() * back[:, None].double(), wanted) < 3e-4
    other, other_back = REFERENCE.halved(x, EXPONENT, norm, 1e-6)
    assert (values * back[:, None] == other * other_back[:, None]).float().mean() > 0.99


@pytest.mark.parametrize("width", WIDTHS)
def test_tokens_are_quantised_as_the_reference_does(steps: CudaTokenSteps, width: int) -> None:
    x = of_all_sizes(width)
    for found, wanted in zip(steps.quantised(x), REFERENCE.quantised(x), strict=True):
        assert torch.equal(found, wanted)
    norm = random(width, seed=1)
    values, back = steps.quantised(x[2:5], norm, 1e-6)
    wanted, wanted_back = REFERENCE.quantised(x[2:5], norm, 1e-6)
    assert relative_l2(back, wanted_back) < CLOSE
    apart = (values.int() - wanted.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", [None, "norm"])
def test_what_is_not_finite_stays_visible(steps: CudaTokenSteps, bad: float, norm: str | None) -> None:
    x, weight = random(3, 96), random(8, 96, seed=1)
    x[1, 40] = bad
    given = None if norm is None else torch.ones(96)
    values, back = steps.halved(x, EXPONENT, given, 1e-6)
    y = steps.widened(values.float() @ weight.T, back, None, None)
    assert torch.isfinite(y).all(1).tolist() == [True, False, True]
    values, back = steps.quantised(x, given, 1e-6)
    product = int8.int_mm(values, int8.quantize(weight)[0]).contiguous()
    y = steps.widened(product, back, None, None)
    assert torch.isfinite(y).any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("width", [4608, 96, 66, 6])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(("scaled", "biased"), [(False, False), (False, True), (True, False), (True, True)])
def test_products_become_results(steps: CudaTokenSteps, width: int, integers: bool, scaled: bool, biased: bool) -> None:
    rows = 5
    product = random(rows, width, std=1e4)
    product = product.to(torch.int32) if integers else product
    back = random(rows, seed=2).exp()
    columns = random(width, seed=3).abs() if scaled else None
    bias = random(width, seed=4) if biased else None
    given = (back, columns, bias)
    wanted = REFERENCE.widened(product.clone(), *given)
    assert relative_l2(steps.widened(product.clone(), *given), wanted) < CLOSE
    residual = random(rows, width, std=1e4, seed=5)
    result = steps.added(residual.clone(), product.clone(), *given)
    assert relative_l2(result, residual + wanted) < CLOSE
    small = REFERENCE.widened(product.clone(), back * 1e-4, *given[1:])
    gate, up = small.double().chunk(2, dim=-1)
    found = steps.activated(product, back * 1e-4, *given[1:])
    assert relative_l2(found, torch.nn.functional.silu(gate) * up) < CLOSE


def test_swiglu_of_large_gates_is_finite(steps: CudaTokenSteps) -> None:
    product = torch.tensor([[-1e6, -100.0, 100.0, 1e6, 2.0, 3.0, 4.0, 5.0]])
    found = steps.activated(product, torch.ones(1), None, None)
    assert torch.equal(found, torch.tensor([[0.0, -0.0, 400.0, 5e6]]))


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(28, 4, 128), (4, 2, 32), (3, 1, 80)])
@pytest.mark.parametrize("batch", [1, 3])
def test_heads_are_rotated_into_their_places(
    steps: CudaTokenSteps, heads: int, kv_heads: int, d: int, batch: int
) -> None:
    tokens, room = 5, 9
    qkv = random(batch, tokens, (heads + 2 * kv_heads) * d)
    norms = random(d, seed=1), random(d, seed=2)
    rope = rope_at(torch.arange(3, 3 + tokens)[None], d, 1e6)
    found = []
    for rotate in (steps.rotate, qk_norm_rope):
        q = torch.full((batch, room, heads, d), torch.nan, dtype=torch.float16)
        arena = torch.full((2, batch, kv_heads, room, d), torch.nan, dtype=torch.float16).transpose(2, 3)
        into = q[:, 2 : 2 + tokens], arena[0][:, 4:], arena[1][:, 4:]
        rotate(qkv, *norms, 1e-6, rope, heads, kv_heads, into)
        found.append([torch.cat([t.flatten() for t in (q, arena)]), *into])
    for ours, wanted in zip(found[0][1:], found[1][1:], strict=True):
        assert relative_l2(ours, wanted) < 1e-4
    assert torch.equal(found[0][0].isnan(), found[1][0].isnan()), "nothing beside its place is written"
    assert torch.equal(found[0][3], found[1][3])


def packed(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Random NF4 bytes and their absmax."""
    codes = (random(rows, width // 2, std=100.0).int() & 255).to(torch.uint8)
    return codes, random(rows, width // 64, seed=1).abs() * 0.02


@pytest.mark.parametrize(("rows", "width"), [(3, 64), (33, 3584), (16, 448)])
def test_weights_become_fp16_to_the_bit(steps: CudaTokenSteps, rows: int, width: int) -> None:
    codes, absmax = packed(rows, width)
    assert torch.equal(steps.levels(codes, absmax), REFERENCE.levels(codes, absmax))
    weight = (codes.view(torch.int8)).contiguous()
    found = steps.integers(weight)
    assert torch.equal(found, REFERENCE.integers(weight))
    assert torch.equal(found.double() / INTEGERS_DOWN, weight.double())


@pytest.mark.parametrize(("rows", "width"), [(3, 64), (33, 3584), (16, 18944), (17, 2112), (1, 2048)])
def test_one_token_is_multiplied_as_the_weights_are_read(steps: CudaTokenSteps, rows: int, width: int) -> None:
    codes, absmax = packed(rows, width)
    integers = int8.quantize(random(rows, width, seed=6))[0]
    token, _ = REFERENCE.halved(random(1, width, seed=7), EXPONENT)
    for weight, scales in ((codes, absmax), (integers, None)):
        found = steps.times_token(token, weight, scales)
        dense = REFERENCE.times_token(torch.eye(width).half()[:1], weight, scales)
        assert found.shape == dense.shape == (1, rows)
        wide = weight.double() if scales is None else (REFERENCE.levels(weight, scales * 0 + 1).double())
        wide = wide if scales is None else wide * scales.double().repeat_interleave(64, dim=1)
        assert relative_l2(found, token.double() @ wide.T) < (1e-6 if scales is None else 1e-3)
        assert relative_l2(found, REFERENCE.times_token(token, weight, scales)) < CLOSE


def test_tensors_that_do_not_begin_at_sixteen_bytes(steps: CudaTokenSteps) -> None:
    """A token of a view may begin anywhere."""
    x = random(4, 131)[:, 3:]
    for narrow in ("halved", "quantised"):
        args = (EXPONENT,) if narrow == "halved" else ()
        for found, wanted in zip(getattr(steps, narrow)(x, *args), getattr(REFERENCE, narrow)(x, *args), strict=True):
            assert torch.equal(found, wanted)
    product = random(1, 133)[:, 5:]
    bias = random(129, seed=3)[1:]
    wanted = REFERENCE.widened(product.clone(), torch.ones(1), None, bias)
    assert relative_l2(steps.widened(product, torch.ones(1), None, bias), wanted) < CLOSE


def test_no_tokens_are_no_work(steps: CudaTokenSteps) -> None:
    values, back = steps.halved(torch.empty(0, 64), EXPONENT)
    assert steps.widened(torch.empty(0, 32), back, None, None).shape == (0, 32)
    assert values.shape == (0, 64)

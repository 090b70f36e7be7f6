"""The steps around matmuls by our CUDA kernels, against PyTorch's operations: emulated on the CPU, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from support.cuda_emulation import CudaSources
from support.numeric import HALF_STEP, gaussian, relative_l2
from torch import Tensor

from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.kernels import elementwise_cuda, nvrtc
from lowmem_bagel.kernels import trials as availability
from lowmem_bagel.kernels.cuda_source import CudaSource
from lowmem_bagel.kernels.elementwise_cuda import WIDE_FROM, CudaElementwise
from lowmem_bagel.ops.elementwise import Elementwise
from lowmem_bagel.ops.int8 import int_mm
from lowmem_bagel.ops.linear import rms_norm, swiglu
from lowmem_bagel.ops.rope import qk_norm_rope, rope_at

EXPONENT = 15
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
"""Relative L2 of results: sums and exponentials are not taken in the same order and way, and bf16 is rounded to once
where the reference may round several times."""

SUMMED = 32 * 2.0**-24
"""Relative error of a number that follows from a sum of 18944 squares in float32, in whatever order they are added."""


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def half(request: pytest.FixtureRequest) -> torch.dtype:
    """The arithmetic."""
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def steps(cuda_sources: CudaSources, half: torch.dtype) -> CudaElementwise:
    return CudaElementwise(CudaSource(cuda_sources.device, half, cuda_sources.load))


@pytest.fixture
def reference(half: torch.dtype) -> Elementwise:
    return Elementwise(half)


def random(*shape: int, std: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    device = torch.get_default_device()
    with torch.device("cpu"):
        return gaussian(*shape, std=std, seed=seed).to(device, dtype)


WIDTHS = [64, 3584, 18944, WIDE_FROM - 4, 66, 7]
"""Of the 7B model, and such as are not multiples of four or of a warp."""
SIZES = [0.0, 1e-30, 1e-3, 1.0, 1e6, 1e34]


def of_all_sizes(width: int, dtype: torch.dtype) -> Tensor:
    """A token of each size."""
    x = random(len(SIZES), width).clamp(-1, 1) * torch.tensor(SIZES)[:, None]
    return x.clamp(-6e4, 6e4).half() if dtype == torch.float16 else x.to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("given", ["wide", "fp16"])
def test_tokens_are_halved_as_the_reference_does(
    steps: CudaElementwise, reference: Elementwise, width: int, given: str
) -> None:
    x = of_all_sizes(width, steps.wide if given == "wide" else torch.float16)
    values, back = steps.to_fp16(x, EXPONENT)
    wanted, wanted_back = reference.to_fp16(x, EXPONENT)
    assert torch.equal(values, wanted)
    assert torch.equal(back, wanted_back)
    assert torch.isfinite(values).all()
    assert values[-1].abs().max() >= 2 ** (EXPONENT - 1)
    if steps.wide == torch.bfloat16:
        assert torch.equal(values[2:5] * back[2:5, None], x[2:5].float()), "fp16 holds bf16 exactly on its scale"


@pytest.mark.parametrize("width", WIDTHS)
def test_normalised_tokens(steps: CudaElementwise, reference: Elementwise, width: int) -> None:
    x, norm = of_all_sizes(width, steps.wide)[2:5], random(width, seed=1, dtype=steps.wide)
    wanted = rms_norm(x.double(), norm.double(), 1e-6)
    normed = steps.rms_norm(x, norm, 1e-6)
    assert normed.dtype == steps.wide
    rounded = 4 * HALF_STEP[steps.wide] if steps.wide == torch.bfloat16 else 0.0
    torch.testing.assert_close(normed.double(), wanted, rtol=SUMMED + rounded, atol=0)
    if steps.wide == torch.bfloat16:
        assert (normed == reference.rms_norm(x, norm, 1e-6)).float().mean() > 0.99, "rounded where the reference rounds"
    values, back = steps.to_fp16(x, EXPONENT, norm, 1e-6)
    found, other, other_back = values.double() * back[:, None], *reference.to_fp16(x, EXPONENT, norm, 1e-6)
    bound = (SUMMED + rounded + 2 * HALF_STEP[torch.float16]) * wanted.abs() + 2.0**-25 * back[:, None]
    for given in (found, other.double() * other_back[:, None]):
        assert ((given - wanted).abs() <= bound).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_tokens_are_quantised_as_the_reference_does(steps: CudaElementwise, reference: Elementwise, width: int) -> None:
    x = of_all_sizes(width, steps.wide)
    for found, wanted in zip(steps.to_int8(x), reference.to_int8(x), strict=True):
        assert torch.equal(found, wanted)
    norm = random(width, seed=1, dtype=steps.wide)
    values, back = steps.to_int8(x[2:5], norm, 1e-6)
    wanted, wanted_back = reference.to_int8(x[2:5], norm, 1e-6)
    assert relative_l2(back, wanted_back) < CLOSE[steps.wide]
    apart = (values.int() - wanted.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", [None, "norm"])
def test_what_is_not_finite_stays_visible(steps: CudaElementwise, bad: float, norm: str | None) -> None:
    x, weight = random(3, 96, dtype=steps.wide), random(8, 96, seed=1)
    x[1, 40] = bad
    given = None if norm is None else torch.ones(96, dtype=steps.wide)
    values, back = steps.to_fp16(x, EXPONENT, given, 1e-6)
    y = steps.epilogue(values.float() @ weight.T, back, None, None)
    assert torch.isfinite(y).all(1).tolist() == [True, False, True]
    values, back = steps.to_int8(x, given, 1e-6)
    product = int_mm(values, int8.quantize(weight)[0]).contiguous()
    y = steps.epilogue(product, back, None, None)
    assert torch.isfinite(y).any(1).tolist() == [True, False, True]
    assert torch.isfinite(steps.swiglu(x)).all(1).tolist()[::2] == [True, True]


@pytest.mark.parametrize("width", [4608, 96, 66, 6])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(("scaled", "biased"), [(False, False), (False, True), (True, False), (True, True)])
def test_products_become_results(
    steps: CudaElementwise, reference: Elementwise, width: int, integers: bool, scaled: bool, biased: bool
) -> None:
    rows, close = 5, CLOSE[steps.wide]
    product = random(rows, width, std=1e4)
    product = product.to(torch.int32) if integers else product
    back = random(rows, seed=2).exp()
    columns = random(width, seed=3).abs() if scaled else None
    bias = random(width, seed=4, dtype=steps.wide) if biased else None
    wanted = Elementwise().epilogue(product.clone(), back, columns, None if bias is None else bias.float()).double()
    found = steps.epilogue(product.clone(), back, columns, bias)
    assert found.dtype == steps.wide
    assert relative_l2(found, wanted) < close
    assert relative_l2(found, reference.epilogue(product.clone(), back, columns, bias)) < close / 10
    residual = random(rows, width, std=1e4, seed=5, dtype=steps.wide)
    result = steps.epilogue_add(residual.clone(), product.clone(), back, columns, bias)
    assert relative_l2(result, residual.double() + wanted) < close
    small = back * 1e-4
    wanted = Elementwise().epilogue(product.clone(), small, columns, None if bias is None else bias.float()).double()
    assert relative_l2(steps.epilogue_swiglu(product, small, columns, bias), swiglu(wanted)) < close


@pytest.mark.parametrize("width", [18944, 96, 66, 3])
def test_gates(steps: CudaElementwise, reference: Elementwise, width: int) -> None:
    gate_up = random(5, 2 * width, std=3, dtype=steps.wide)
    found = steps.swiglu(gate_up)
    assert found.dtype == steps.wide
    assert relative_l2(found, swiglu(gate_up.double())) < CLOSE[steps.wide]
    if steps.wide == torch.bfloat16:
        assert (found == reference.swiglu(gate_up)).float().mean() > 0.99, "rounded where the reference rounds"


def test_swiglu_of_large_gates_is_finite(steps: CudaElementwise) -> None:
    product = torch.tensor([[-(2.0**20), -100.0, 100.0, 2.0**20, 2.0, 3.0, 4.0, 5.0]])
    wanted = torch.tensor([[0.0, -0.0, 400.0, 5 * 2.0**20]]).to(steps.wide)
    assert torch.equal(steps.swiglu(product.to(steps.wide)).float().abs(), wanted.float().abs())
    assert torch.equal(steps.epilogue_swiglu(product, torch.ones(1), None, None), wanted)


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(28, 4, 128), (4, 2, 32), (3, 1, 80)])
@pytest.mark.parametrize("batch", [1, 3])
def test_heads_are_rotated_into_their_places(
    steps: CudaElementwise, heads: int, kv_heads: int, d: int, batch: int
) -> None:
    tokens, room = 5, 9
    qkv = random(batch, tokens, (heads + 2 * kv_heads) * d, dtype=steps.wide)
    norms = random(d, seed=1, dtype=steps.wide), random(d, seed=2, dtype=steps.wide)
    rope = rope_at(torch.arange(3, 3 + tokens)[None], d, 1e6)
    found = []
    for rotate in (steps.rotate, qk_norm_rope):
        q = torch.full((batch, room, heads, d), torch.nan, dtype=steps.half)
        cache = torch.full((2, batch, kv_heads, room, d), torch.nan, dtype=steps.half).transpose(2, 3)
        into = q[:, 2 : 2 + tokens], cache[0][:, 4:], cache[1][:, 4:]
        rotate(qkv, *norms, 1e-6, rope, heads, kv_heads, into)
        found.append([torch.cat([t.flatten() for t in (q, cache)]), *into])
    for ours, wanted in zip(found[0][1:], found[1][1:], strict=True):
        assert relative_l2(ours, wanted) < 3e-4
    assert torch.equal(found[0][0].isnan(), found[1][0].isnan()), "nothing beside its place is written"
    assert torch.equal(found[0][3], found[1][3])


def test_tensors_that_do_not_begin_at_sixteen_bytes(steps: CudaElementwise, reference: Elementwise) -> None:
    """A token of a view may begin anywhere."""
    x = random(4, 131, dtype=steps.wide)[:, 3:]
    for found, wanted in zip(steps.to_fp16(x, EXPONENT), reference.to_fp16(x, EXPONENT), strict=True):
        assert torch.equal(found, wanted)
    for found, wanted in zip(steps.to_int8(x), reference.to_int8(x), strict=True):
        assert torch.equal(found, wanted)
    product = random(1, 133)[:, 5:]
    bias = random(129, seed=3, dtype=steps.wide)[1:]
    wanted = reference.epilogue(product.clone(), torch.ones(1), None, bias)
    assert relative_l2(steps.epilogue(product, torch.ones(1), None, bias), wanted) < CLOSE[steps.wide]


def test_the_trial_before_use_accepts_them_and_refuses_wrong_ones(
    steps: CudaElementwise, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = CudaSource(torch.get_default_device(), half)
    monkeypatch.setattr(nvrtc, "why_unavailable", lambda _: None)
    monkeypatch.setattr(elementwise_cuda, "CudaElementwise", lambda _: steps)
    chosen, why = availability.choose_elementwise(source)
    assert (chosen, why) == (steps, None)
    right = steps.swiglu
    monkeypatch.setattr(steps, "swiglu", lambda x: right(x) * 1.03)
    chosen, why = availability.choose_elementwise(source)
    assert type(chosen) is Elementwise
    assert why is not None
    assert why.startswith("its trial was wrong by 3.0e-02")


def test_no_tokens_are_no_work(steps: CudaElementwise) -> None:
    nothing = torch.empty(0, 64, dtype=steps.wide)
    values, back = steps.to_fp16(nothing, EXPONENT)
    assert steps.epilogue(torch.empty(0, 32), back, None, None).shape == (0, 32)
    assert values.shape == steps.rms_norm(nothing, torch.ones(64, dtype=steps.wide), 1e-6).shape == (0, 64)
    assert steps.swiglu(nothing).shape == (0, 32)

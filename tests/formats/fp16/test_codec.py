"""fp16: the range report counted by hand, and arithmetic that stays right where plain fp16 overflows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.linears import linear
from support.numeric import gaussian, relative_l2
from torch import Tensor

from lowmem_bagel.errors import ConversionError
from lowmem_bagel.formats import scaled_matmul
from lowmem_bagel.formats.fp16 import codec as fp16
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.int8.scaled import Int8AsFp16
from lowmem_bagel.formats.nf4 import codec as nf4
from lowmem_bagel.formats.nf4.scaled import Nf4AsFp16
from lowmem_bagel.formats.scaled_matmul import FLOAT16_RESULT, UPCAST, Fp16Matmul, Fp16Weights
from lowmem_bagel.ops.linear import SWIGLU, Dense, Linear, RMSNorm, Weights, rms_norm, swiglu

pytestmark = pytest.mark.usefixtures("poisoned")

WAYS = [UPCAST, FLOAT16_RESULT]
LIMIT = 5e-3
"""Relative L2 against float32 that the arithmetic must keep to."""


# --- the codec


def test_bfloat16_inside_the_normal_range_keeps_its_bits() -> None:
    weight = gaussian(40, 70, dtype=torch.bfloat16)
    weight[weight.abs() < 1e-3] = 0
    half, report = fp16.convert(weight)
    assert half.dtype == torch.float16
    assert torch.equal(half.float(), weight.float())
    assert report == fp16.RangeReport(float(weight.abs().max()), 0, 0, 0.0, 0.0, 0.0)


def test_the_report_measures_what_small_values_lose() -> None:
    # 2^-20 * 1.5 is 24 * 2^-24 exactly; 2^-23 * 1.75 = 3.5 steps rounds to 4; 2^-26 vanishes.
    weight = torch.tensor([1.0, -(2.0**-20) * 1.5, 2.0**-23 * 1.75, 2.0**-26, 0.0], dtype=torch.bfloat16)
    half, report = fp16.convert(weight)
    assert half.tolist() == [1.0, -(2.0**-20) * 1.5, 2.0**-22, 0.0, 0.0]
    assert (report.largest, report.below_normal, report.vanished) == (1.0, 3, 1)
    assert report.largest_relative_loss == 1.0
    assert report.largest_absolute_loss == 2.0**-25
    assert report.relative_l2 == pytest.approx(math.hypot(2.0**-25, 2.0**-26), rel=1e-3)


@settings(max_examples=200)
@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=8))
def test_any_bfloat16_is_kept_reported_or_refused(bits: list[int]) -> None:
    weight = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    if not bool((weight.double().abs() < 65520).all()):  # 65520 and more round to infinity; NaN compares as False
        with pytest.raises(ConversionError):
            fp16.convert(weight)
        return
    half, report = fp16.convert(weight)
    exact, kept = weight.double(), half.double()
    nonzero = exact != 0
    loss = ((kept - exact).abs() / exact.abs())[nonzero]
    assert report.largest_relative_loss == pytest.approx(float(loss.max()) if len(loss) else 0.0, rel=1e-6)
    assert report.vanished == int((nonzero & (kept == 0)).sum())
    assert torch.equal(kept[exact.abs() >= 2.0**-14], exact[exact.abs() >= 2.0**-14])


@pytest.mark.parametrize(
    ("value", "what"), [(7e4, "beyond float16's 65504"), (float("inf"), "infinite"), (float("nan"), "NaN")]
)
def test_what_float16_cannot_hold_is_refused(value: float, what: str) -> None:
    weight = gaussian(4, 8, dtype=torch.bfloat16)
    weight[2, 1] = value
    with pytest.raises(ConversionError, match=what):
        fp16.convert(weight)


def test_tensors_of_any_shape_and_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp16, "CONVERTED_AT_ONCE", 7)
    weight = gaussian(3, 5, 2)
    weight[2, 4, 1] = 2.0**-30
    half, report = fp16.convert(weight)
    assert torch.equal(half, weight.half())
    assert (report.vanished, report.largest) == (1, float(weight.abs().max()))
    assert fp16.convert(torch.empty(0, 4, dtype=torch.bfloat16))[0].shape == (0, 4)


# --- the arithmetic


def pair(in_features: int, out_features: int, way: Fp16Matmul) -> tuple[Linear, Linear]:
    """The scaled linear, and the plain fp16 one with the same numbers."""
    weight, bias = gaussian(out_features, in_features, std=0.02).half(), gaussian(out_features, seed=1)
    return linear(Fp16Weights(way), weight, bias=bias), linear(Dense(), weight, bias=bias.half())


def exact(scaled: Linear, x: Tensor) -> Tensor:
    weight, _, bias = scaled.weights()
    assert bias is not None
    return F.linear(x.double(), weight.double(), bias.double())


def with_outliers(tokens: int, width: int, size: float) -> Tensor:
    """Activations of the order of 1 with three outlier channels of about `size`."""
    x = gaussian(tokens, width, seed=5)
    x[:, [3, width // 2, width - 1]] *= size
    return x


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("size", [1e3, 1e5, 1e6])
def test_outlier_channels_come_out_right_where_plain_fp16_overflows(way: Fp16Matmul, size: float) -> None:
    scaled, plain = pair(512, 96, way)
    x = with_outliers(12, 512, size)
    y = scaled(x)
    assert y.dtype == torch.float32
    assert relative_l2(y, exact(scaled, x)) < LIMIT
    if size > 65504:
        assert not torch.isfinite(plain(x.half())).all()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_an_outlier_that_the_weight_ignores_does_not_drown_the_rest(way: Fp16Matmul) -> None:
    scaled, _ = pair(512, 96, way)
    scaled.weight[:, 3] = 0
    x = gaussian(12, 512, seed=5)
    x[:, 3] = 1e6
    assert relative_l2(scaled(x), exact(scaled, x)) < LIMIT


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_token_is_right_on_its_own_scale_beside_larger_ones(way: Fp16Matmul) -> None:
    scaled, _ = pair(256, 64, way)
    x = gaussian(5, 256, seed=2) * torch.tensor([[1e-9], [1e-3], [1.0], [1e6], [0.0]])
    assert scaled.bias is not None
    scaled.bias.zero_()
    y = scaled(x)
    for token in range(4):
        assert relative_l2(y[token], exact(scaled, x)[token]) < LIMIT
    assert torch.equal(y[4], torch.zeros(64))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_after_swiglu_with_products_beyond_fp16(way: Fp16Matmul) -> None:
    scaled, plain = pair(256, 64, way)
    gate_up = gaussian(6, 512, seed=5)
    gate_up[:, 3], gate_up[:, 256 + 3] = 900.0, -1100.0
    product = swiglu(gate_up.double())
    assert product.abs().max() > 65504 > gate_up.abs().max()
    assert relative_l2(scaled(gate_up, SWIGLU), exact(scaled, product)) < LIMIT
    assert not torch.isfinite(plain(gate_up.half(), SWIGLU)).all()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_after_rmsnorm_of_a_massive_residual_stream(way: Fp16Matmul) -> None:
    scaled, plain = pair(256, 64, way)
    x, norm = with_outliers(6, 256, 1e6), gaussian(256, seed=9, std=1e4).half()
    normed = rms_norm(x.double(), norm.double(), 1e-6)
    assert normed.abs().max() > 65504
    assert relative_l2(scaled(x, RMSNorm(norm, 1e-6)), exact(scaled, normed)) < LIMIT
    assert not torch.isfinite(plain(x.half(), RMSNorm(norm, 1e-6))).all()


def test_a_result_beyond_fp16_is_right_though_every_input_is_small() -> None:
    for way in WAYS:
        scaled, plain = pair(64, 8, way)
        scaled.weight.fill_(12.0)
        plain.weight.fill_(12.0)
        x = torch.full((1, 64), 400.0)
        assert relative_l2(scaled(x), exact(scaled, x)) < LIMIT
        assert not torch.isfinite(plain(x.half())).any()


@settings(max_examples=60)
@given(exponent=st.integers(-115, 110), seed=st.integers(0, 2**31))
@example(exponent=-115, seed=0)
def test_scaling_by_powers_of_two_changes_nothing_but_the_exponent(exponent: int, seed: int) -> None:
    scaled, _ = pair(64, 8, UPCAST)
    assert scaled.bias is not None
    scaled.bias.zero_()
    x = gaussian(2, 64, seed=seed)
    y, expected = scaled(x * 2.0**exponent), scaled(x) * 2.0**exponent
    if exponent > -80:
        assert torch.equal(y, expected)
    else:  # the shift is limited here, so small values of a token lose bits
        assert relative_l2(y, expected) < LIMIT


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_activation_stays_visible(bad: float) -> None:
    scaled, _ = pair(64, 8, UPCAST)
    x = gaussian(3, 64)
    x[1, 4] = bad
    finite = torch.isfinite(scaled(x)).all(-1)
    assert finite.tolist() == [True, False, True]


def test_quantised_weights_in_this_arithmetic() -> None:
    values, scale = int8.quantize(gaussian(48, 256, std=0.02))
    codes, absmax = values.view(torch.uint8)[:, :128].contiguous(), gaussian(48, 4, seed=9).abs()
    x = with_outliers(7, 256, 1e6)
    for product, codec, stored in (
        (Int8AsFp16(UPCAST), int8, (values, scale)),
        (Nf4AsFp16(UPCAST), nf4, (codes, absmax)),
    ):
        y = product.product(x, Weights(*stored))
        assert y.dtype == torch.float32
        assert relative_l2(y, F.linear(x.double(), codec.dequantize(*stored, torch.float64))) < LIMIT


def test_the_choice_is_made_by_trying_and_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scaled_matmul.choose_matmul(torch.device("cpu")) is UPCAST

    def refuses(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("out_dtype is not supported here\nsecond line")

    monkeypatch.setattr(scaled_matmul, "_float32_result", refuses)
    chosen = scaled_matmul.choose_matmul(torch.device("meta"))
    assert chosen.exponent == FLOAT16_RESULT.exponent
    assert chosen.reason.endswith("out_dtype is not supported here")


def test_the_smallest_normal_number_is_not_counted_as_lost() -> None:
    below = math.nextafter(2.0**-14, 0)
    for value, counted in ((2.0**-14, 0), (-(2.0**-14), 0), (below, 1), (0.0, 0)):
        _, report = fp16.convert(torch.tensor([1.0, value], dtype=torch.float64))
        assert report.below_normal == counted, value

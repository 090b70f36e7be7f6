"""INT8: the stored numbers against optimum-quanto, the arithmetic against integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.numeric import FLOATS, gaussian, relative_l2
from torch import Tensor

from lowmem_bagel.errors import ConversionError
from lowmem_bagel.formats.base import Dequantized
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.measure import output_error, weight_error
from lowmem_bagel.ops import int8 as ops_int8
from lowmem_bagel.ops.int8 import int_mm
from lowmem_bagel.ops.linear import Weights

pytestmark = pytest.mark.usefixtures("poisoned")


# --- the codec


def quanto_qint8(weight: Tensor) -> tuple[Tensor, Tensor]:
    quanto = pytest.importorskip("optimum.quanto")
    scale = quanto.AbsmaxOptimizer()(weight, quanto.qint8, 0)
    quantized = quanto.quantize_weight(weight, quanto.qint8, 0, scale)
    return quantized._data, quantized._scale.squeeze(-1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 8), (37, 129), (256, 1024)])
def test_values_and_scales_equal_quantos(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape, seed=shape[0], dtype=dtype, std=0.02)
    weight[0] = 0
    values, scale = int8.quantize(weight)
    expected_values, expected_scale = quanto_qint8(weight.float())
    assert torch.equal(values, expected_values)
    assert torch.equal(scale, expected_scale)


def test_quanto_rounds_the_scale_of_a_bfloat16_weight_and_loses_by_it() -> None:
    weight = gaussian(64, 512, dtype=torch.bfloat16)
    values, scale = int8.quantize(weight)
    their_values, their_scale = quanto_qint8(weight)
    assert torch.equal(their_scale, scale.to(torch.bfloat16))
    assert not torch.equal(their_values, values)
    theirs = weight_error(weight, their_values, their_scale.float(), int8.dequantize)
    assert weight_error(weight, values, scale, int8.dequantize) < theirs


@settings(max_examples=60)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
    zero_row=st.booleans(),
)
def test_each_value_is_within_half_a_step(rows: int, width: int, exponent: int, seed: int, zero_row: bool) -> None:
    weight = gaussian(rows, width, seed=seed) * 2.0**exponent
    if zero_row:
        weight[0] = 0
    values, scale = int8.quantize(weight)
    step = scale[:, None].double()
    assert ((values.double() * step - weight.double()).abs() <= step * (0.5 + 1e-4)).all()
    peak = values.abs().amax(-1)
    assert torch.equal(peak, torch.where(scale > 0, 127, 0).to(torch.int8))
    assert values.min() >= -127


@settings(max_examples=40)
@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=4, max_size=4))
def test_any_bfloat16_bits_are_quantised_or_refused(bits: list[int]) -> None:
    weight = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(2, 2)
    if not torch.isfinite(weight).all():
        with pytest.raises(ConversionError):
            int8.quantize(weight)
        return
    values, scale = int8.quantize(weight)
    # A subnormal scale has few bits, so the bound is absolute there.
    bound = scale[:, None].double() * 0.5001 + 127 * 2.0**-149
    assert ((values.double() * scale[:, None].double() - weight.double()).abs() <= bound).all()


def test_a_row_with_a_subnormal_scale_stays_symmetric() -> None:
    # 186 / 127 rounds to one step of the smallest float32, and the values would be +-186.
    peak = 186 * 2.0**-149
    values, scale = int8.quantize(torch.tensor([[-peak, peak, 0.0]]))
    assert scale.tolist() == [2.0**-149]
    assert values.tolist() == [[-127, 127, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(bad: float) -> None:
    weight = gaussian(5, 16, dtype=torch.bfloat16)
    weight[3, 7] = bad
    with pytest.raises(ConversionError, match="infinite or NaN"):
        int8.quantize(weight)


def test_a_matrix_larger_than_a_block_is_quantised_row_by_row() -> None:
    weight = gaussian(1030, 16384, dtype=torch.bfloat16)
    values, scale = int8.quantize(weight)
    for row in (0, 1023, 1024, 1029):
        one_value, one_scale = int8.quantize(weight[row : row + 1])
        assert torch.equal(values[row], one_value[0])
        assert torch.equal(scale[row], one_scale[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_multiplies_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    values, scale = int8.quantize(gaussian(33, 65))
    assert torch.equal(int8.dequantize(values, scale, dtype), (values.float() * scale[:, None]).to(dtype))


# --- the arithmetic


@settings(max_examples=40)
@given(m=st.integers(0, 40), k=st.integers(1, 50), n=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_int_mm_is_exact_for_every_shape(m: int, k: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    assert torch.equal(int_mm(a, b).long(), a.long() @ b.long().t())


@pytest.mark.usefixtures("saturating_int_mm")
def test_int_mm_is_exact_on_a_processor_that_adds_pairs_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_int8, "FLOAT_ROWS", 3)
    generator = torch.Generator().manual_seed(1)
    for k in (64, 2048, 20001):
        a, b = (torch.randint(-127, 128, (8, k), generator=generator, dtype=torch.int8) for _ in range(2))
        a[0] = b[0] = 127
        assert not torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.long().t())
        assert torch.equal(int_mm(a, b).long(), a.long() @ b.long().t())
        assert int_mm(a, b).dtype == torch.int32


@pytest.mark.usefixtures("exact_int_mm")
def test_int_mm_keeps_to_what_cuda_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    on_this_device = torch._int_mm

    def strict(a: Tensor, b: Tensor) -> Tensor:
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == 0
        assert b.shape[1] % 8 == 0
        return on_this_device(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    for m, k, n in ((0, 8, 8), (1, 8, 8), (16, 64, 7), (17, 65, 8), (18, 3, 3)):
        a, b = torch.full((m, k), 3, dtype=torch.int8), torch.full((n, k), -2, dtype=torch.int8)
        assert torch.equal(int_mm(a, b), torch.full((m, n), -6 * k, dtype=torch.int32))


def w8a8_in_numpy(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The arithmetic as int8.py states it, written independently with numpy and 64-bit integers."""
    wide = x.float().numpy()
    token_scale = np.abs(wide).max(-1, keepdims=True) / np.float32(127)
    divisor = np.where(token_scale > 0, token_scale, np.float32(1))
    q = np.clip(np.rint(wide / divisor), -127, 127).astype(np.int64)
    y = (q @ weight.numpy().astype(np.int64).T).astype(np.float32) * scale.numpy() * token_scale
    if bias is not None:
        y = y + bias.float().numpy()
    assert y.dtype == np.float32
    return torch.from_numpy(y).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "width", "rows"), [(1, 64, 8), (2, 129, 7), (17, 3584, 40), (50, 256, 24)])
def test_int_mm_matmul_has_the_stated_bits(dtype: torch.dtype, tokens: int, width: int, rows: int) -> None:
    x = gaussian(tokens, width, seed=tokens, dtype=dtype)
    x[0, 0] = 3e4
    x[-1] = 0 if tokens > 1 else x[-1]
    bias = gaussian(rows, seed=2, dtype=dtype)
    weight, scale = int8.quantize(gaussian(rows, width, seed=1, std=0.02))
    for b in (bias, None):
        y = int8.IntMm().product(x, Weights(weight, scale, b))
        assert y.dtype == dtype
        assert torch.equal(y, w8a8_in_numpy(x, weight, scale, b))


def test_blocks_of_tokens_change_nothing() -> None:
    x, weights = gaussian(3, 41, 96), Weights(*int8.quantize(gaussian(50, 96)))
    whole = int8.IntMm().product(x, weights)
    assert whole.shape == (3, 41, 50)
    assert torch.equal(int8.IntMm(block_values=500).product(x, weights), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_activation_spoils_its_own_token_only(bad: float) -> None:
    x, weights = gaussian(20, 64), Weights(*int8.quantize(gaussian(16, 64)))
    spoiled = x.clone()
    spoiled[5, 3] = bad
    y, clean = (int8.IntMm().product(v, weights) for v in (spoiled, x))
    assert not torch.isfinite(y[5]).any()
    others = torch.arange(20) != 5
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("width", [3584, 18944])
def test_output_error_on_gaussian_data(width: int) -> None:
    weight = gaussian(256, width, std=0.02, dtype=torch.bfloat16)
    values, scale = int8.quantize(weight)
    x = gaussian(32, width, seed=1)
    of_the_file = output_error(weight, values, scale, Dequantized(int8.dequantize), x)
    assert 0.004 < of_the_file <= 0.012
    # Gaussian activations lose to int8 as much as Gaussian weights do, and the two errors are independent.
    w8a8 = output_error(weight, values, scale, int8.IntMm(), x)
    assert w8a8 == pytest.approx(2**0.5 * of_the_file, rel=0.05)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_weights_as_they_are_times_scaled_products(
    tokens: int, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "CPU_WEIGHT_VALUES", 7 * 300)  # blocks of seven rows, and an eighth block of four
    weight, scale = int8.quantize(gaussian(53, 300, std=0.02))
    scale[5] = 0.0
    bias, x = gaussian(53, seed=1, dtype=dtype), gaussian(2, tokens, 300, seed=2, dtype=dtype)
    exact = F.linear(x.double(), int8.dequantize(weight, scale, torch.float64), bias.double())
    y = int8.WeightOnly().product(x, Weights(weight, scale, bias))
    assert y.dtype == dtype
    assert relative_l2(y, exact) < bound
    assert float((y.double() - exact).abs().max()) < 4 * bound * float(exact.abs().max())


def test_bitsandbytes_own_quantiser_makes_the_same_values_up_to_ties() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = gaussian(64, 512, dtype=torch.float16)
    theirs, absmax, _ = functional.int8_vectorwise_quant(weight)
    values, scale = int8.quantize(weight)
    assert torch.equal(absmax / 127, scale)
    differs = theirs != values
    assert differs.float().mean() < 1e-3
    assert (theirs.int() - values.int()).abs().max() <= 1

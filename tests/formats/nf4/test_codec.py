"""NF4: the stored bytes and the dequantised values against bitsandbytes, and the linear with either backend."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem_bagel.benchmarks.baselines.nf4 import BitsandbytesNf4
from support.numeric import FLOATS, HALF_STEP, gaussian, relative_l2

from lowmem_bagel.errors import ConversionError, MissingExtraError
from lowmem_bagel.formats.base import Dequantized
from lowmem_bagel.formats.measure import output_error
from lowmem_bagel.formats.nf4 import codec as nf4
from lowmem_bagel.ops.linear import Product, Weights

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True, scope="module")
def _bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 64), (5, 128), (40, 512)])
def test_bytes_and_values_equal_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape, dtype=dtype, std=0.02)
    weight[0, :64] = 0
    packed, absmax = nf4.quantize(weight)
    from bitsandbytes import functional

    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert packed.shape == (shape[0], shape[1] // 2)
    assert torch.equal(packed.flatten(), theirs.flatten())
    assert torch.equal(absmax.flatten(), state.absmax)
    assert torch.equal(torch.tensor(nf4.CODEBOOK), state.code)
    # The linears give them weights in the arithmetic's dtype, so this is their dequantised weight.
    assert torch.equal(nf4.dequantize(packed, absmax, dtype), functional.dequantize_4bit(theirs, state))


@settings(max_examples=40)
@given(rows=st.integers(1, 4), blocks=st.integers(1, 3), exponent=st.integers(-30, 30), seed=st.integers(0, 2**31))
def test_each_value_becomes_its_nearest_level(rows: int, blocks: int, exponent: int, seed: int) -> None:
    weight = gaussian(rows, 64 * blocks, seed=seed) * 2.0**exponent
    packed, absmax = nf4.quantize(weight)
    levels = torch.tensor(nf4.CODEBOOK, dtype=torch.float64)
    unit = weight.double().view(rows, blocks, 64) / absmax.double()[..., None]
    nearest = (unit[..., None] - levels).abs().amin(-1)
    stored = nf4.dequantize(packed, absmax, torch.float64).view(rows, blocks, 64) / absmax.double()[..., None]
    assert ((stored - unit).abs() <= nearest + 1e-6).all()
    assert torch.equal(absmax, weight.view(rows, blocks, 64).abs().amax(-1))


def test_the_first_value_of_a_byte_is_in_its_high_bits() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([1.0, -1.0, 0.0, 0.5626170039176941])
    packed, absmax = nf4.quantize(weight)
    assert packed[0, :3].tolist() == [0xF0, 0x7D, 0x77]
    assert absmax.tolist() == [[1.0]]


def test_rows_of_a_fused_weight_are_the_concatenation_of_its_parts() -> None:
    parts = [gaussian(rows, 128, seed=rows) for rows in (3, 8)]
    whole = nf4.quantize(torch.cat(parts))
    pieces = [nf4.quantize(part) for part in parts]
    assert torch.equal(whole[0], torch.cat([p[0] for p in pieces]))
    assert torch.equal(whole[1], torch.cat([p[1] for p in pieces]))


def test_a_matrix_larger_than_a_block_is_quantised_row_by_row() -> None:
    weight = gaussian(1030, 16384, dtype=torch.bfloat16)
    packed, absmax = nf4.quantize(weight)
    for rows in (slice(0, 1), slice(1022, 1026), slice(1029, 1030)):
        some_packed, some_absmax = nf4.quantize(weight[rows])
        assert torch.equal(packed[rows], some_packed)
        assert torch.equal(absmax[rows], some_absmax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad: float) -> None:
    weight = gaussian(5, 64, dtype=torch.bfloat16)
    weight[3, 7] = bad
    with pytest.raises(ConversionError, match="infinite or NaN"):
        nf4.quantize(weight)


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ConversionError, match="not a multiple of 64"):
        nf4.quantize(gaussian(4, 96))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("product", [lambda: Dequantized(nf4.dequantize), BitsandbytesNf4], ids=["ours", "theirs"])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_products_round_no_more_than_their_dtype(
    dtype: torch.dtype, product: Callable[[], Product], tokens: int
) -> None:
    weight, absmax = nf4.quantize(gaussian(256, 128, std=0.02))
    x, bias = gaussian(1, tokens, 128, seed=2, dtype=dtype), gaussian(256, seed=1, dtype=dtype)
    y = product().product(x, Weights(weight, absmax, bias))
    assert (y.shape, y.dtype) == ((1, tokens, 256), dtype)
    exact = F.linear(x.double(), nf4.dequantize(weight, absmax, torch.float64), bias.double())
    assert relative_l2(y, exact) < 4 * HALF_STEP[dtype] + 1e-6


def test_output_error_on_gaussian_data() -> None:
    weight = gaussian(128, 3584, std=0.02, dtype=torch.bfloat16)
    error = output_error(weight, *nf4.quantize(weight), Dequantized(nf4.dequantize), gaussian(16, 3584, seed=1))
    assert 0.08 < error < 0.10


def test_without_bitsandbytes_all_but_its_own_linear_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    weights = Weights(*nf4.quantize(gaussian(64, 64)))
    assert torch.isfinite(Dequantized(nf4.dequantize).product(gaussian(2, 64), weights)).all()
    with pytest.raises(MissingExtraError, match=r'pip install "lowmem-bagel\[bitsandbytes\]"'):
        BitsandbytesNf4()

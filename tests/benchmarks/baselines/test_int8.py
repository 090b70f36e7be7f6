"""bitsandbytes' LLM.int8() and quanto's qint8 on our stored numbers."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from lowmem_bagel.benchmarks.baselines.int8 import BitsandbytesInt8, QuantoInt8
from support.numeric import FLOATS, HALF_STEP, gaussian, relative_l2

from lowmem_bagel.errors import MissingExtraError
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.ops.linear import Product, Weights

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.usefixtures("exact_int_mm")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_bitsandbytes_runs_the_stored_numbers(dtype: torch.dtype, threshold: float) -> None:
    pytest.importorskip("bitsandbytes")
    weight, scale = int8.quantize(gaussian(48, 128))
    x, bias = gaussian(2, 11, 128, dtype=dtype), gaussian(48, seed=1, dtype=dtype)
    x[..., 5] *= 40
    y = BitsandbytesInt8(threshold).product(x, Weights(weight, scale, bias))
    assert (y.shape, y.dtype) == ((2, 11, 48), dtype)
    exact = F.linear(x.double(), int8.dequantize(weight, scale, torch.float64), bias.double())
    # Without the outlier columns in float16, the large channel costs the others their resolution.
    bound = 0.03 if threshold == 0 else 0.01
    assert relative_l2(y, exact) < bound


@pytest.mark.usefixtures("exact_int_mm")
def test_bitsandbytes_without_outlier_columns_is_the_w8a8_arithmetic() -> None:
    pytest.importorskip("bitsandbytes")
    weights = Weights(*int8.quantize(gaussian(48, 128)))
    x = gaussian(30, 128, seed=1, dtype=torch.float16)
    theirs = BitsandbytesInt8(0.0).product(x, weights)
    assert relative_l2(theirs, int8.IntMm().product(x, weights)) < 1e-3


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_quanto_runs_the_stored_numbers_wherever_they_lie(dtype: torch.dtype, offset: int) -> None:
    pytest.importorskip("optimum.quanto")
    values, scale = int8.quantize(gaussian(64, 256))
    buffer = torch.empty(values.numel() + 64, dtype=torch.int8)
    start = -buffer.data_ptr() % 64 + offset
    weight = buffer[start : start + values.numel()].view(values.shape).copy_(values)
    x, bias = gaussian(2, 16, 256, seed=1, dtype=dtype), gaussian(64, seed=2, dtype=dtype)
    y = QuantoInt8().product(x, Weights(weight, scale, bias))
    assert (y.shape, y.dtype) == ((2, 16, 64), dtype)
    exact = F.linear(x.double(), int8.dequantize(values, scale, torch.float64), bias.double())
    assert relative_l2(y, exact) < 4 * HALF_STEP[dtype] + 1e-6


@pytest.mark.parametrize(
    ("backend", "module", "extra"),
    [(BitsandbytesInt8, "bitsandbytes", "bitsandbytes"), (QuantoInt8, "optimum.quanto", "quanto")],
)
def test_a_missing_package_names_its_extra(
    backend: type[Product], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "lowmem-bagel\[{extra}\]"'):
        backend()

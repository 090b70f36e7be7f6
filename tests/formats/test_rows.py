"""The compiled loops: the bytes of PyTorch's operations for any bf16 weight, and the errors of what they made."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.numeric import gaussian, relative_l2
from torch import Tensor

from lowmem_bagel.errors import ConversionError
from lowmem_bagel.formats import blocks, rows
from lowmem_bagel.formats.fp16 import codec as fp16
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.nf4 import codec as nf4

pytestmark = pytest.mark.usefixtures("poisoned")

CODECS = {"int8": int8, "nf4": nf4}


def any_finite(seed: int, *shape: int) -> Tensor:
    """Every finite bit pattern is as likely as any other: zeros, subnormals and the largest numbers included."""
    bits = torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    values = bits.view(torch.bfloat16)
    return torch.where(values.isfinite(), values, torch.zeros_like(values))


def of_one_size(seed: int, *shape: int) -> Tensor:
    """Small multiples of one number, so that many lie right between two levels."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-254, 255, shape, generator=generator) * 2.0 ** (seed % 40 - 20)).bfloat16()


@pytest.mark.parametrize("make", [any_finite, of_one_size])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), height=st.integers(1, 5), width=st.integers(1, 5))
def test_the_loop_makes_the_bytes_of_pytorch(
    codec: ModuleType, make: Callable[..., Tensor], seed: int, height: int, width: int
) -> None:
    weight = make(seed, height, 64 * width)
    for made, wanted in zip(codec.encode(weight)[:2], codec.quantize(weight), strict=True):
        assert made.dtype == wanted.dtype
        assert torch.equal(made, wanted)


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_the_error_is_that_of_what_was_stored(monkeypatch: pytest.MonkeyPatch, codec: ModuleType, cores: int) -> None:
    monkeypatch.setattr(blocks, "usable_cores", lambda: cores)
    monkeypatch.setattr(rows, "TASK_VALUES", 7 * 192)
    weight = gaussian(101, 192, dtype=torch.bfloat16, std=0.02)
    values, scales, error = codec.encode(weight)
    assert error == pytest.approx(
        relative_l2(codec.dequantize(values, scales, torch.float32), weight.float()), rel=1e-5
    )
    assert codec.encode(weight)[2] == error
    wide = codec.encode(weight.float())
    assert torch.equal(wide[0], values)
    assert wide[2] == pytest.approx(error, rel=1e-5)
    assert codec.encode(torch.zeros(3, 64, dtype=torch.bfloat16))[2] == 0


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_what_is_not_finite_is_refused(codec: ModuleType, value: float) -> None:
    weight = gaussian(70, 128, dtype=torch.bfloat16)
    assert rows.all_finite(weight)
    weight[69, 127] = value
    assert not rows.all_finite(weight)
    assert not rows.all_finite(weight.float())
    for wrong in (weight, weight.float()):
        with pytest.raises(ConversionError, match="infinite or NaN"):
            codec.encode(wrong)


@pytest.mark.parametrize("in_place", [False, True])
def test_fp16_of_every_bfloat16(in_place: bool) -> None:
    """All 65536 patterns but those that are refused, against PyTorch's rounding and the report of its operations."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weight = every[every.abs() < 65536]
    wanted, report = fp16.convert(weight.float())
    memory = weight.clone()
    half, found = fp16.convert(memory, memory.view(torch.float16) if in_place else None)
    assert torch.equal(half.view(torch.int16), weight.half().view(torch.int16))
    assert torch.equal(half.view(torch.int16), wanted.view(torch.int16))
    assert (half.data_ptr() == memory.data_ptr()) == in_place
    assert found.relative_l2 == pytest.approx(report.relative_l2, rel=1e-6)
    for name in ("largest", "below_normal", "vanished", "largest_relative_loss", "largest_absolute_loss"):
        assert getattr(found, name) == getattr(report, name), name

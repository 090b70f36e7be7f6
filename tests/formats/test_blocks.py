"""Blocks on threads: order, exceptions, and results that do not depend on how many threads there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lowmem_bagel.converters.engine.rows import quantize_rows
from support.numeric import gaussian, relative_l2
from torch import Tensor

from lowmem_bagel.formats import base as linear
from lowmem_bagel.formats import blocks
from lowmem_bagel.formats.base import Dequantize
from lowmem_bagel.formats.fp16 import codec as fp16
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.nf4 import codec as nf4

pytestmark = pytest.mark.usefixtures("poisoned")

CODECS: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Dequantize]] = {
    "int8": (int8.quantize, int8.dequantize),
    "nf4": (nf4.quantize, nf4.dequantize),
}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_in_order_and_torch_s_setting_put_back(threads: int) -> None:
    before = torch.get_num_threads()
    assert blocks.map_blocks(lambda n: n * n, iter(range(40)), threads) == [n * n for n in range(40)]
    assert blocks.map_blocks(str, [], threads) == []
    with pytest.raises(ZeroDivisionError):
        blocks.map_blocks(lambda n: 1 / n, [2, 1, 0, 3], threads)
    assert torch.get_num_threads() == before


def test_operations_run_on_one_thread_each() -> None:
    seen = blocks.map_blocks(lambda _: torch.get_num_threads(), range(8), threads=4)
    assert seen == [1] * 8


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("name", CODECS)
def test_blocks_of_rows_make_the_bytes_of_one_call(monkeypatch: pytest.MonkeyPatch, name: str, cores: int) -> None:
    quantize, dequantize = CODECS[name]
    monkeypatch.setattr(blocks, "usable_cores", lambda: cores)
    monkeypatch.setattr(linear, "CPU_BLOCK_VALUES", 7 * 192)
    weight = gaussian(101, 192, dtype=torch.bfloat16, std=0.02)
    values, scales, error = quantize_rows(weight, quantize, dequantize)
    whole_values, whole_scales = quantize(weight)
    assert torch.equal(values, whole_values)
    assert torch.equal(scales, whole_scales)
    exact = dequantize(values, scales, torch.float32)
    assert error == pytest.approx(relative_l2(exact, weight.float()), rel=1e-5)


def test_the_fp16_report_does_not_depend_on_threads_or_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(300, 70, dtype=torch.bfloat16, std=1e-4)
    monkeypatch.setattr(blocks, "usable_cores", lambda: 1)
    half, whole = fp16.convert(weight)
    monkeypatch.setattr(blocks, "usable_cores", lambda: 3)
    monkeypatch.setattr(fp16, "CONVERTED_AT_ONCE", 1000)
    pieces, report = fp16.convert(weight)
    assert torch.equal(half, weight.half())
    assert torch.equal(half, pieces)
    assert whole.below_normal > 1000
    assert report.relative_l2 == pytest.approx(whole.relative_l2, rel=1e-6)
    for name in ("largest", "below_normal", "vanished", "largest_relative_loss", "largest_absolute_loss"):
        assert getattr(report, name) == getattr(whole, name), name

"""One measure of errors: its edge cases, and that no trial passes a kernel whose result is no number."""

from __future__ import annotations

import math

import pytest
import torch
from support.numeric import gaussian

from lowmem_bagel.kernels import nvrtc, trials
from lowmem_bagel.kernels.cuda_source import CudaSource
from lowmem_bagel.ops.errors import relative_l2, relative_l2_of

NAN = torch.tensor([1.0, math.nan])


def test_it_is_the_ratio_of_norms() -> None:
    wanted, other = gaussian(300, 7), gaussian(300, 7, seed=1)
    found = wanted + 1e-3 * other
    expected = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    assert relative_l2(found, wanted) == pytest.approx(expected, rel=1e-12)
    assert relative_l2_of(zip(found.split(9), wanted.split(9), strict=True)) == pytest.approx(expected, rel=1e-4)


def test_what_half_cannot_hold_is_measured_in_float64() -> None:
    large = torch.full((8,), 60000.0, dtype=torch.float16)
    assert relative_l2(-large, large) == 2


@pytest.mark.parametrize(
    ("found", "wanted"), [(NAN, torch.ones(2)), (torch.ones(2), NAN), (torch.ones(2), torch.zeros(2))]
)
def test_what_is_no_number_is_infinite(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert relative_l2(found, wanted) == math.inf
    assert relative_l2(torch.zeros(2), torch.zeros(2)) == 0


def test_a_trial_whose_second_result_is_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "why_unavailable", lambda device: None)
    right, source = torch.ones(2), CudaSource(torch.device("cpu"), torch.float16)
    why = trials.why_not_compiled(source, lambda: ([right, NAN], [right, right]))
    assert why == "its trial was wrong by inf"

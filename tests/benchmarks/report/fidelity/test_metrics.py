"""PSNR, SSIM, divergences and agreements beside computations of their own."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from lowmem_bagel.benchmarks.report.fidelity.metrics import agreeing, as_json, kl_nats, psnr, ssim
from numpy.typing import NDArray
from support.pictures import noise

RNG = np.random.default_rng(5)


def some_pair(strength: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    picture = noise(19, 23, seed=3)
    off = np.clip(picture + RNG.normal(0, strength, picture.shape), 0, 255).astype(np.uint8)
    return off, picture


def by_definition(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """SSIM window by window, each with its weighted means, variances and covariance about them."""
    gray = [picture.astype(float) @ np.array([0.299, 0.587, 0.114]) for picture in (a, b)]
    one = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(one, one) / one.sum() ** 2
    found = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = (picture[top : top + 11, left : left + 11] for picture in gray)
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy, cov = ((window * p * q).sum() for p, q in ((x - mx, x - mx), (y - my, y - my), (x - mx, y - my)))
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("strength", [0.5, 20.0, 200.0])
def test_ssim_is_the_published_formula(strength: float) -> None:
    a, b = some_pair(strength)
    assert ssim(a, b) == pytest.approx(by_definition(a, b), rel=1e-10)


def test_equal_pictures_are_exactly_so() -> None:
    picture = noise(16, 16, seed=1)
    assert psnr(picture, picture.copy()) == math.inf
    assert ssim(picture, picture.copy()) == 1.0
    assert json.loads(json.dumps(as_json(math.inf), allow_nan=False)) == "inf"
    assert as_json(31.5) == 31.5


def test_psnr_of_a_constant_difference() -> None:
    picture = np.full((16, 16, 3), 100, dtype=np.uint8)
    assert psnr(picture + 5, picture) == pytest.approx(20 * math.log10(255 / 5))
    one = picture.copy()
    one[0, 0, 0] += 255 - 100
    assert psnr(one, picture) == pytest.approx(10 * math.log10(255**2 / (155**2 / one.size)))


def test_divergence_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.25, 0.5, 0.25]]).double()
    assert kl_nats(p.log() + 3, q.log()).tolist() == pytest.approx([0.25 * math.log(2)], rel=1e-12)
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)) * 30
    assert kl_nats(logits, logits.clone()).tolist() == [0.0] * 4
    assert (kl_nats(logits, logits.roll(1, 0)) > 1).all()


@pytest.mark.parametrize(
    ("found", "wanted", "tokens"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 9, 3], [1, 2, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3, 4], [1, 2, 3], 2)],
)
def test_tokens_until_the_first_difference(found: list[int], wanted: list[int], tokens: int) -> None:
    """An answer that ends early or goes on differs where it does."""
    assert agreeing(found, wanted) == tokens

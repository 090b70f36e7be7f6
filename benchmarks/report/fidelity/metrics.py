"""How far a result is from the one it stands for: pictures, distributions of the next token, answers, tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]
"""[height, width, 3]."""

WINDOW, SIGMA = 11, 1.5
K1, K2, PEAK = 0.01, 0.03, 255.0
LUMA = (0.299, 0.587, 0.114)
"""Of BT.601, as the published code makes pictures gray."""
MISSING = (
    "LPIPS, DISTS: the packages lpips and DISTS_pytorch leave their backbone's weights to a download, and "
    "stlpips_pytorch, which carries them, has parts under CC BY-NC-SA"
)
"""Why no learned distance is measured: weights must come inside a registry package, under a free license."""


def psnr(found: Pixels, wanted: Pixels) -> float:
    """Peak signal-to-noise ratio in dB over all three channels; infinite where the pictures are equal."""
    error = float(np.square(found.astype(np.float64) - wanted.astype(np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def ssim(found: Pixels, wanted: Pixels) -> float:
    """Mean structural similarity of the luma (Wang et al. 2004): a Gaussian window of 11x11 with sigma 1.5 wherever it
    lies whole inside the picture, in float64. 1 where the pictures are equal."""
    x, y = (torch.from_numpy(picture.astype(np.float64) @ np.array(LUMA)) for picture in (found, wanted))
    moments = _windowed(torch.stack((x, y, x * x, y * y, x * y)))
    mean_x, mean_y, square_x, square_y, product = moments
    both = mean_x * mean_y
    squares = mean_x.square() + mean_y.square()
    spread = square_x + square_y - squares
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similar = (2 * both + c1) * (2 * (product - both) + c2) / ((squares + c1) * (spread + c2))
    return float(similar.mean())


def _windowed(planes: Tensor) -> Tensor:
    """Means under the window: float64 [N, H, W] -> [N, H - 10, W - 10]."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights /= weights.sum()
    down = F.conv2d(planes[:, None], weights.view(1, 1, -1, 1))
    return F.conv2d(down, weights.view(1, 1, 1, -1))[:, 0]


def kl_nats(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found) of the distributions that logits [T, V] give: float64 [T], in nats."""
    p, q = (logits.double().log_softmax(-1) for logits in (wanted, found))
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def agreeing(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Tokens until the first that differs; all that are wanted where the answers are equal."""
    same = 0
    for a, b in zip(found, wanted, strict=False):
        if a != b:
            break
        same += 1
    # An answer that stops early or goes on differs from the other at its end, which is no token of either.
    return same if len(found) == len(wanted) else min(same, len(wanted) - 1)


def as_json(value: float) -> Any:
    """JSON has no infinity: "inf", which `float` reads."""
    return value if math.isfinite(value) else "inf"

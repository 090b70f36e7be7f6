"""Pictures and tensors: the resize rule, and pixels in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint.config import ResizeRule

if TYPE_CHECKING:
    from PIL import Image


def resize(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """The picture at the rule's size, bicubic and antialiased, still 8-bit."""
    from PIL import Image

    return image.resize(rule.resized(*image.size), Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture -> float32 [3, H, W] in [-1, 1]."""
    import numpy as np

    values = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return (values.float() / 255 - 0.5) / 0.5


def from_pixels(pixels: Tensor) -> Image.Image:
    """[3, H, W], nominally in [-1, 1] -> RGB picture, clamped and truncated to 8 bits as upstream does."""
    from PIL import Image

    values = (pixels.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    return Image.fromarray(values.to("cpu", torch.uint8).numpy())

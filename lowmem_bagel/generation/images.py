"""Pictures and tensors: the resize rule, and pixels in and out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint.config import ResizeRule
from ..runtime.loaded import LoadedModel

if TYPE_CHECKING:
    from PIL import Image


PARTS = 4
"""Of a picture, that are resized at the same time."""
WORTH_PARTS = 1 << 18
"""Pixels from which threads are worth their start."""
SLENDER = 8
"""Sides' ratio from which a picture is left to Pillow, which takes the passes of very slender ones in another order."""


def resize(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """The picture at the rule's size, bicubic and antialiased, still 8-bit."""
    from PIL import Image

    size = rule.resized(*image.size)
    slender = max(image.size) > SLENDER * min(image.size)
    if size == image.size or image.width * image.height < WORTH_PARTS or slender:
        return image.resize(size, Image.Resampling.BICUBIC)
    with ThreadPoolExecutor(PARTS) as pool:
        return _along(_along(image, 0, size[0], pool), 1, size[1], pool)


def _along(image: Image.Image, axis: int, length: int, pool: ThreadPoolExecutor) -> Image.Image:
    """The picture with another width (axis 0) or height (1), cut across that axis into parts that know nothing of each
    other: Pillow's resize is these two passes, in this order, with 8 bits in between."""
    from PIL import Image

    across = 1 - axis
    ends = [image.size[across] * part // PARTS for part in range(PARTS + 1)]

    def of_part(ends: tuple[int, int]) -> Image.Image:
        begin, end = ends
        box = (0, begin, image.width, end) if across else (begin, 0, end, image.height)
        size = (length, end - begin) if across else (end - begin, length)
        return image.crop(box).resize(size, Image.Resampling.BICUBIC)

    whole = Image.new(image.mode, (length, image.height) if across else (image.width, length))
    for begin, part in zip(ends, pool.map(of_part, pairwise(ends)), strict=False):
        whole.paste(part, (0, begin) if across else (begin, 0))
    return whole


def to_bytes(image: Image.Image) -> Tensor:
    """An RGB picture -> uint8 [H, W, 3]."""
    import numpy as np

    return torch.from_numpy(np.array(image, dtype=np.uint8))


def in_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 of any shape, on any device -> the same in [-1, 1]: (value / 255 - 0.5) / 0.5 in float32, made `dtype`.

    Looked up, so that it is the same to the bit everywhere: a card multiplies by 1 / 255.
    """
    shades = ((torch.arange(256).float() / 255 - 0.5) / 0.5).to(dtype)
    return shades.to(values.device).index_select(0, values.flatten().int()).view(values.shape)


def from_pixels(pixels: Tensor) -> Image.Image:
    """[3, H, W], nominally in [-1, 1] -> RGB picture, clamped and truncated to 8 bits as upstream does."""
    from PIL import Image

    values = (pixels.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    return Image.fromarray(values.to("cpu", torch.uint8).numpy())


def decoded(model: LoadedModel, latent: Tensor) -> Image.Image:
    """The picture of a scaled latent [z_channels, h, w] on any device."""
    vae = model.vae
    assert vae is not None
    with model.using("vae"):
        weight = vae.decoder.conv_in.weight
        return from_pixels(vae.decode(latent[None].to(weight.device, weight.dtype))[0])

"""Rendering many scenes at once with PyTorch; the same pictures as `scenes.render`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .scenes import COLOURS, SHAPES, Scene, signed_distance, turned_back

MAX_ITEMS = 3
_COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}
VALUES = 6
"""Of an item in a row."""
ROW = VALUES * MAX_ITEMS + 1


def scene_rows(scenes: Sequence[Scene]) -> NDArray[np.float32]:
    """float32 [N, ROW]: per item shape (-1: none), colour, x, y, radius, angle; then the background's colour."""
    rows = np.full((len(scenes), ROW), -1, np.float32)
    for row, scene in zip(rows, scenes, strict=True):
        for slot, item in enumerate(scene.items):
            row[VALUES * slot : VALUES * (slot + 1)] = (
                SHAPES.index(item.shape), _COLOUR_INDEX[item.colour], item.x, item.y, item.radius, item.angle,
            )  # fmt: skip
        row[-1] = _COLOUR_INDEX[scene.background]
    return rows


@dataclass(frozen=True)
class Canvas:
    height: int
    width: int


def palette_on(device: torch.device) -> Tensor:
    """The colours, float32 [8, 3]."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device)


def render_rows(rows: Tensor, canvas: Canvas, palette: Tensor | None = None) -> Tensor:
    """rows [B, ROW] -> uint8 [B, 3, height, width]. With `palette_on` handed in, nothing is copied to the device."""
    palette = palette_on(rows.device) if palette is None else palette
    ys = torch.arange(canvas.height, device=rows.device)[:, None] + 0.5
    xs = torch.arange(canvas.width, device=rows.device)[None] + 0.5
    picture = palette[rows[:, -1].long()][:, :, None, None].expand(-1, -1, canvas.height, canvas.width)
    for slot in range(MAX_ITEMS):
        values = rows[:, VALUES * slot : VALUES * (slot + 1)]
        shape, colour, x, y, radius, angle = (v[:, None, None] for v in values.unbind(1))
        angle = torch.deg2rad(angle)
        dx, dy = turned_back(xs - x, ys - y, angle.cos(), angle.sin())
        distance = torch.full_like(dx, 1e3)
        for index, name in enumerate(SHAPES):
            distance = torch.where(shape == index, signed_distance(torch, name, dx, dy, radius), distance)
        cover = (0.5 - distance).clamp(0, 1)[:, None]
        own = palette[colour.flatten().long().clamp(min=0)][:, :, None, None]
        picture = picture + cover * (own - picture)
    return picture.round().to(torch.uint8)


def to_signed(pictures: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def vit_patches(pictures: Tensor, patch: int, token_pixels: int) -> Tensor:
    """What the ViT gets of 8-bit pictures: uint8 [B, 3, H, W] -> uint8 [B, rows * columns, patch * patch * 3].

    The ViT's resize rule turns every side of 16 n pixels of a small picture into 14 n; the result is 8-bit again.
    """
    batch, channels, height, width = pictures.shape
    rows, columns = height // token_pixels, width // token_pixels
    small = F.interpolate(
        pictures.float(), (rows * patch, columns * patch), mode="bicubic", antialias=True, align_corners=False
    )
    small = small.round().clamp(0, 255).to(torch.uint8)
    blocks = small.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return blocks.reshape(batch, rows * columns, patch * patch * channels)

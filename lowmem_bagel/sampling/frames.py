"""Pictures that are drawn together: frames of one sequence, each in its own place in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.rope import Rope

MARKERS = 2
"""Tokens that frame a picture: vision_start and vision_end."""


@dataclass(frozen=True)
class Frames:
    """`count` frames of rows x columns latent tokens.

    All tokens of a frame have one rope position, which advances by `delta` from frame to frame; they have one noise
    level, and attention is full among them.
    """

    rows: int
    columns: int
    count: int = 1
    delta: int = 1

    @property
    def each(self) -> int:
        """Latent tokens of one frame."""
        return self.rows * self.columns

    @property
    def latents(self) -> int:
        """Latent tokens of all frames."""
        return self.count * self.each

    @property
    def tokens(self) -> int:
        """Of all frames, with their markers."""
        return self.count * (self.each + MARKERS)

    def noise(self, values: int, generator: torch.Generator) -> Tensor:
        """Float32 [latents, values], drawn frame by frame: a frame's is the same however many come after it."""
        return torch.cat([torch.randn(self.each, values, generator=generator) for _ in range(self.count)])

    def split(self, latent: Tensor) -> list[Tensor]:
        """[latents, values] -> each frame's [each, values]."""
        return list(latent.split(self.each))

    def positions(self, start: int) -> list[int]:
        """Rope positions of the frames after a context that ends before `start`."""
        return [start + frame * self.delta for frame in range(self.count)]

    def for_tokens(self, rope: Rope, each: int) -> Rope:
        """cos and sin of the frames, [B, count, 1, head_dim], for `each` tokens of every one; broadcast, as they are,
        where there is one frame."""
        if self.count == 1:
            return rope
        cos, sin = (table.unsqueeze(2).expand(-1, -1, each, -1, -1).flatten(1, 2) for table in rope)
        return cos, sin

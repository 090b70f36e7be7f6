"""What a search draws: captions and edits of held-out scenes, as batches of contexts of each branch of guidance."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from .data import CAPTION_TOKENS, INSTRUCTION_TOKENS
from .draw import render_rows, scene_rows, to_signed, vit_patches
from .forward import Group, text_lengths
from .sampler import Sampler
from .scenes import held_out_scene, random_edit
from .sentences import caption, instruction
from .train import draw_group, draw_shape, edit_group, edit_shape
from .train_vae import latent_tokens


class Drawings:
    """Captions to draw."""

    names = ("full", "text")
    editing = False

    def __init__(self, sampler: Sampler, count: int, seed: int) -> None:
        canvas = (sampler.canvas.height, sampler.canvas.width)
        self.sampler, rng = sampler, Random(seed)
        texts = [caption(rng, held_out_scene(rng, canvas)).text for _ in range(count)]
        self.ids = sampler.ids(texts, CAPTION_TOKENS)
        self.lengths = text_lengths(self.ids, sampler.pad)
        self.shape = draw_shape(sampler.rows * sampler.columns).to(sampler.bagel.device)
        self.noise = _noise(sampler, count, torch.Generator().manual_seed(seed))

    def group(self, name: str, scenes: Tensor, x: Tensor, t: Tensor) -> Group:
        """The branch's contexts of some scenes, with the pictures x at times t."""
        lengths = self.lengths[scenes] * (name == "full")
        return draw_group(self.sampler.embed, self.shape, self.ids[scenes], lengths, x, t)


class Edits:
    """Pictures to edit."""

    names = ("full", "text", "image")
    editing = True

    def __init__(self, sampler: Sampler, count: int, seed: int) -> None:
        canvas, device, rng = (sampler.canvas.height, sampler.canvas.width), sampler.bagel.device, Random(seed)
        edits = [random_edit(rng, held_out_scene(rng, canvas)) for _ in range(count)]
        pictures = render_rows(torch.from_numpy(scene_rows([edit.source for edit in edits])).to(device), sampler.canvas)
        self.sampler, self.ids = sampler, sampler.ids([instruction(rng, edit) for edit in edits], INSTRUCTION_TOKENS)
        self.lengths = text_lengths(self.ids, sampler.pad)
        self.shape = edit_shape(sampler.rows * sampler.columns).to(device)
        mean, logvar = sampler.vae.encoder(to_signed(pictures)).chunk(2, dim=1)
        generator = torch.Generator().manual_seed(seed)
        latent = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).to(mean)
        self.source = (latent_tokens(latent) - sampler.shift) * sampler.scale
        self.seen = sampler.embed.pictures(vit_patches(pictures, 14, 16))
        self.noise = _noise(sampler, count, generator)

    def group(self, name: str, scenes: Tensor, x: Tensor, t: Tensor) -> Group:
        """As `Drawings.group`."""
        there = torch.full_like(self.lengths[scenes], name != "image")
        lengths = self.lengths[scenes] * (name != "text")
        source, seen = self.source[scenes], self.seen[scenes]
        return edit_group(self.sampler.embed, self.shape, source, seen, there, self.ids[scenes], lengths, x, t)


Task = Drawings | Edits


def _noise(sampler: Sampler, count: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(count, sampler.rows * sampler.columns, 64, generator=generator)
    return noise.to(sampler.bagel.device)

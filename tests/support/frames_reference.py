"""Several frames drawn in one sequence, computed from their description alone: float64, dense masks, no cache.

Everything that a branch of guidance sees is one packed sequence, which goes through all layers anew at every step. The
description: each frame is vision_start, latents, vision_end; all tokens of a frame have one rope position, which
advances by `delta` from frame to frame; all frames have one noise level; all tokens of the frames see the context and
each other. Nothing of the package's model is used; input pictures come as what its encoders made of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """An input picture: clean latents [T, values] with their grid, and the vision tower's tokens [V, h]."""

    latents: Tensor
    grid: tuple[int, int]
    seen: Tensor


Block = list[int] | Picture
"""Token ids of a text, its frame included, or a picture."""


@dataclass(frozen=True)
class Asked:
    """A drawing: scales of guidance by text and by picture, its renormalisation, and Euler steps from t = 1 to 0."""

    frames: int
    delta: int
    grid: tuple[int, int]
    count: int
    shift: float
    text_scale: float
    image_scale: float
    renorm: str


class Packed:
    """A sequence in the making: tokens as they enter the layers, their expert, position and what each may see."""

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.gen: list[bool] = []
        self.positions: list[int] = []
        self.blocks: list[tuple[int, bool]] = []
        """Each token's block, and whether it sees only what is before it there."""

    def add(self, hidden: Tensor, gen: Sequence[bool], positions: Sequence[int], block: int, causal: bool) -> None:
        self.hidden += list(hidden)
        self.gen += gen
        self.positions += positions
        self.blocks += [(block, causal)] * len(hidden)

    def mask(self) -> Tensor:
        """bool [T, T]: row sees column."""
        block, causal = (torch.tensor(told)[:, None] for told in zip(*self.blocks, strict=True))
        place = torch.arange(len(self.blocks))[:, None]
        return (block > block.T) | ((block == block.T) & (~causal | (place >= place.T)))


class FramesReference:
    """A checkpoint in the published layout; `start` and `end` are the ids of vision_start and vision_end."""

    def __init__(self, folder: Path, start: int, end: int) -> None:
        self.w = {name: value.double() for name, value in load_file(folder / "ema.safetensors").items()}
        self.c = json.loads((folder / "llm_config.json").read_text())
        self.start, self.end = start, end

    def draw(
        self, branches: tuple[Sequence[Block], Sequence[Block], Sequence[Block]], noise: Tensor, asked: Asked
    ) -> tuple[Tensor, list[Tensor]]:
        """noise [frames * T, values], frame by frame -> the latent, and every step's guided velocity."""
        full, no_text, texts = branches
        times = [1 - i / (asked.count - 1) for i in range(asked.count)]
        times = [asked.shift * t / (1 + (asked.shift - 1) * t) for t in times]
        x, found = noise.double(), []
        for now, then in pairwise(times):
            c, ct = self.velocity(full, x, now, asked), self.velocity(no_text, x, now, asked)
            ci = self.velocity(texts, x, now, asked) if asked.image_scale > 1 else None
            found.append(self.guided(c, ct, ci, asked))
            x = x - (now - then) * found[-1]
        return x, found

    @staticmethod
    def branches(terms: Sequence[Block]) -> tuple[list[Block], list[Block], list[Block]]:
        """All of it; all before the last text, or all of it where a picture is last; the texts alone."""
        no_text: list[Block] = []
        for index, term in enumerate(terms):
            no_text = list(terms[:index]) if isinstance(term, list) else list(terms[: index + 1])
        texts: list[Block] = [term for term in terms if isinstance(term, list)]
        return list(terms), no_text, texts

    @staticmethod
    def guided(c: Tensor, ct: Tensor, ci: Tensor | None, asked: Asked) -> Tensor:
        def renormed(v: Tensor, per_token: bool) -> Tensor:
            norm = (lambda u: u.norm(dim=-1, keepdim=True)) if per_token else (lambda u: u.norm())
            return v * (norm(c) / (norm(v) + 1e-8)).clamp(0, 1)

        v = ct + asked.text_scale * (c - ct)
        if asked.renorm == "text_channel":
            v = renormed(v, True)
        if ci is not None:
            v = ci + asked.image_scale * (v - ci)
        return v if asked.renorm == "text_channel" else renormed(v, asked.renorm == "channel")

    def velocity(self, context: Sequence[Block], x: Tensor, t: float, asked: Asked) -> Tensor:
        packed, position = self.context(context)
        block, each = len(context) * 2, len(x) // asked.frames
        for frame in range(asked.frames):
            latents = self.latent_tokens(x[frame * each : (frame + 1) * each], t, asked.grid)
            self.framed(packed, latents, True, position + frame * asked.delta, block)
        drawn = torch.tensor([of == block for of, _ in packed.blocks]) & torch.tensor(packed.gen)
        hidden = self.layers(packed)[drawn]
        return (
            self.norm(hidden, "language_model.model.norm_moe_gen") @ self.w["llm2vae.weight"].T + self.w["llm2vae.bias"]
        )

    def context(self, blocks: Sequence[Block]) -> tuple[Packed, int]:
        """The sequence of input blocks, and the position after it: texts advance token by token, pictures by two."""
        packed, position = Packed(), 0
        for index, block in enumerate(blocks):
            if isinstance(block, list):
                positions = list(range(position, position + len(block)))
                packed.add(self.embed(block), [False] * len(block), positions, 2 * index, True)
                position += len(block)
            else:
                self.framed(packed, self.latent_tokens(block.latents, 0.0, block.grid), True, position, 2 * index)
                self.framed(packed, block.seen.double(), False, position + 1, 2 * index + 1)
                position += 2
        return packed, position

    def framed(self, packed: Packed, tokens: Tensor, gen: bool, position: int, block: int) -> None:
        hidden = torch.cat((self.embed([self.start]), tokens, self.embed([self.end])))
        experts = [False, *([gen] * len(tokens)), False]
        packed.add(hidden, experts, [position] * len(hidden), block, False)

    def embed(self, ids: list[int]) -> Tensor:
        return self.w["language_model.model.embed_tokens.weight"][ids]

    def latent_tokens(self, latents: Tensor, t: float, grid: tuple[int, int]) -> Tensor:
        half = 128
        frequencies = torch.tensor([math.exp(-math.log(10000) * i / half) for i in range(half)], dtype=torch.float64)
        time = torch.cat((torch.cos(t * frequencies), torch.sin(t * frequencies)))
        time = self.linear(torch.nn.functional.silu(self.linear(time, "time_embedder.mlp.0")), "time_embedder.mlp.2")
        table = self.w["latent_pos_embed.pos_embed"]
        side = math.isqrt(len(table))
        places = [row * side + column for row in range(grid[0]) for column in range(grid[1])]
        return self.linear(latents.double(), "vae2llm") + time + table[places]

    def layers(self, packed: Packed) -> Tensor:
        x, gen, mask = torch.stack(packed.hidden), torch.tensor(packed.gen)[:, None], packed.mask()
        heads, kv_heads = self.c["num_attention_heads"], self.c["num_key_value_heads"]
        size = self.c["hidden_size"] // heads
        powers = torch.arange(0, size, 2, dtype=torch.float64) / size
        angles = torch.tensor(packed.positions, dtype=torch.float64)[:, None] * self.c["rope_theta"] ** -powers
        angles = torch.cat((angles, angles), dim=1)[:, None]

        def turned(v: Tensor) -> Tensor:
            left, right = v.chunk(2, dim=-1)
            return v * angles.cos() + torch.cat((-right, left), dim=-1) * angles.sin()

        for index in range(self.c["num_hidden_layers"]):
            name = f"language_model.model.layers.{index}"

            def both(x: Tensor, of: str, what: str, name: str = name) -> Tensor:
                """By each token's own expert: `of` is completed with the gen expert's suffix."""
                found = [getattr(self, what)(x, f"{name}.{of.replace('*', suffix)}") for suffix in ("", "_moe_gen")]
                return torch.where(gen if found[0].dim() == 2 else gen[..., None], found[1], found[0])

            normed = both(x, "input_layernorm*", "norm")
            q, k, v = (both(normed, f"self_attn.{p}_proj*", "linear").unflatten(-1, (-1, size)) for p in "qkv")
            q, k = turned(both(q, "self_attn.q_norm*", "norm")), turned(both(k, "self_attn.k_norm*", "norm"))
            k, v = (u.repeat_interleave(heads // kv_heads, dim=1) for u in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
            attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -math.inf).softmax(-1), v).flatten(1)
            x = x + both(attended, "self_attn.o_proj*", "linear")
            normed = both(x, "post_attention_layernorm*", "norm")
            gate, up = (both(normed, f"mlp*.{p}_proj", "linear") for p in ("gate", "up"))
            x = x + both(torch.nn.functional.silu(gate) * up, "mlp*.down_proj", "linear")
        return x

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.c["rms_norm_eps"]).rsqrt() * self.w[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        found = x @ self.w[f"{name}.weight"].T
        return found + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else found

"""The training forward: many contexts of one shape at once, through the package's own modules.

Inference appends block after block to a cache (SPEC of the contexts: `docs/architecture.md`). Training sees a whole
context in one pass, so what the cache does by order is a mask here. `tests/benchmarks/demo/test_training.py`
holds both against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_bagel.checkpoint.config import BagelConfig
from lowmem_bagel.checkpoint.tensors import Expert
from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.decoder import ExpertLayer
from lowmem_bagel.model.vision import grid_positions
from lowmem_bagel.ops.linear import DenseLinear, Linear
from lowmem_bagel.ops.rope import Rope, projected

from .tokens import SPECIAL

Kind = Literal["text", "vit", "latent"]


@dataclass(frozen=True)
class Block:
    """One block of a context; `tokens` counts a text's room (im_start and im_end included) or a picture's tokens
    without its two markers. noisy: a picture that is drawn; one after another they are frames, which see each other."""

    kind: Kind
    tokens: int
    noisy: bool = False

    @property
    def und_tokens(self) -> int:
        """Markers, text and what the ViT makes."""
        return {"text": self.tokens, "vit": self.tokens + 2, "latent": 2}[self.kind]


class Shape:
    """The blocks of a context, and the place of each token: all und tokens in order, then all gen tokens."""

    def __init__(self, *blocks: Block) -> None:
        self.blocks = blocks
        und: list[tuple[int, int]] = []
        gen: list[tuple[int, int]] = []
        for index, block in enumerate(blocks):
            ordered = block.kind == "text"
            und += [(index, offset * ordered) for offset in range(block.und_tokens)]
            if block.kind == "latent":
                gen += [(index, 0)] * block.tokens
        self.und_tokens, self.gen_tokens = len(und), len(gen)
        self.block_of = torch.tensor([b for b, _ in und + gen])
        self.offset = torch.tensor([o for _, o in und + gen])
        self.is_text = torch.tensor([block.kind == "text" for block in blocks])
        first = torch.tensor([not (b.noisy and i > 0 and blocks[i - 1].noisy) for i, b in enumerate(blocks)])
        self.split_of = first.cumsum(0)[self.block_of]

    def to(self, device: torch.device) -> Shape:
        for name in ("block_of", "offset", "is_text", "split_of"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def place(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Rope positions int64 [B, T] and the additive attention mask [B, 1, T, T] (0 or -inf).

        lengths: int64 [B, blocks]: a text's tokens, 1 for a picture; 0 leaves a block out of the context.
        """
        device = lengths.device
        own = lengths[:, self.block_of]
        text = self.is_text[self.block_of]
        positions = (lengths.cumsum(1) - lengths)[:, self.block_of] + self.offset
        valid = torch.where(text, self.offset < own, own > 0)
        split, offset = self.split_of, self.offset
        seen = (split[None] < split[:, None]) | ((split[None] == split[:, None]) & (offset[None] <= offset[:, None]))
        # A padding token sees itself, so that no row is empty; nobody sees it.
        itself = torch.eye(len(split), dtype=torch.bool, device=device)
        visible = (seen & valid[:, None]) | itself
        return positions, torch.where(visible, 0.0, -torch.inf)[:, None]


@dataclass
class Group:
    """A batch of contexts of one shape. und: [B, Tu, D], gen: [B, Tg, D], rest as `Shape.place` gives it."""

    shape: Shape
    und: Tensor
    gen: Tensor
    positions: Tensor
    mask: Tensor


def merge(groups: Sequence[Group]) -> Group:
    """Groups with equally long blocks (pictures of 6x8 and 8x6 tokens) as one batch."""
    parts = zip(*((g.und, g.gen, g.positions, g.mask) for g in groups), strict=True)
    return Group(groups[0].shape, *(torch.cat(tensors) for tensors in parts))


def project(layer: ExpertLayer, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [N, heads, head_dim] of flat tokens [1, N, D]; keys and values repeated for all heads."""
    qkv = layer.raw_qkv(hidden)
    q, k, v = projected(qkv, layer.q_norm, layer.k_norm, layer.eps, rope, layer.heads, layer.kv_heads)
    q, k = q.to(v.dtype), k.to(v.dtype)
    repeat = q.shape[2] // k.shape[2]
    return q[0], k[0].repeat_interleave(repeat, dim=1), v[0].repeat_interleave(repeat, dim=1)


def finish(layer: ExpertLayer, hidden: Tensor, attended: Tensor) -> Tensor:
    """The layer's output for flat tokens [1, N, D]; attended: [N, heads, head_dim]."""
    return layer.finish(hidden, [attended[None]])


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """[B, heads, T, head_dim] each, bias [B, heads, T, T]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@dataclass(frozen=True)
class Kernels:
    """The two halves of a layer and the attention between; a trainer hands in compiled ones."""

    project: Callable[[ExpertLayer, Tensor, Rope], tuple[Tensor, Tensor, Tensor]] = project
    finish: Callable[[ExpertLayer, Tensor, Tensor], Tensor] = finish
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = attend


Watch = Callable[[int, Tensor, Tensor], None]


def unwatched(layer: int, und: Tensor, gen: Tensor) -> None:
    """Nobody looks."""


def run_groups(
    bagel: Bagel, groups: Sequence[Group], kernels: Kernels | None = None, watch: Watch = unwatched
) -> list[tuple[Tensor, Tensor]]:
    """Hidden states before the final norm, per group (und [B, Tu, D], gen [B, Tg, D]).

    Every matmul takes the tokens of all groups at once; only attention is group by group. `watch` is handed the hidden
    states that enter each layer, all groups' in a row, [1, B * Tu, D] and [1, B * Tg, D], and those that leave the last
    one; it may write into them.
    """
    kernels = kernels or Kernels()
    und_sizes = [(g.und.shape[0], g.und.shape[1]) for g in groups]
    gen_sizes = [(g.gen.shape[0], g.gen.shape[1]) for g in groups]
    und = torch.cat([g.und.flatten(0, 1) for g in groups])[None]
    gen = torch.cat([g.gen.flatten(0, 1) for g in groups])[None]
    split = [g.positions.split((g.shape.und_tokens, g.shape.gen_tokens), dim=1) for g in groups]
    und_rope, gen_rope = (bagel.rope(torch.cat([s[e].flatten() for s in split])[None]) for e in (0, 1))
    biases: list[Tensor] | None = None
    for index in range(len(bagel.decoder.layers)):
        watch(index, und, gen)
        experts = cast("Mapping[Expert, ExpertLayer]", bagel.decoder.layers[index])
        und_parts = kernels.project(experts["und"], und, und_rope)
        gen_parts = kernels.project(experts["gen"], gen, gen_rope)
        if biases is None:
            biases = [g.mask.to(und_parts[0].dtype).expand(-1, und_parts[0].shape[1], -1, -1) for g in groups]
        und_qkv = [_ungroup(x, und_sizes) for x in und_parts]
        gen_qkv = [_ungroup(x, gen_sizes) for x in gen_parts]
        und_out, gen_out = [], []
        for at, bias in enumerate(biases):
            q, k, v = (torch.cat((u[at], g[at]), dim=1).transpose(1, 2) for u, g in zip(und_qkv, gen_qkv, strict=True))
            out = kernels.attend(q, k, v, bias).transpose(1, 2)
            und_out.append(out[:, : und_sizes[at][1]].flatten(0, 1))
            gen_out.append(out[:, und_sizes[at][1] :].flatten(0, 1))
        und = kernels.finish(experts["und"], und, torch.cat(und_out))
        gen = kernels.finish(experts["gen"], gen, torch.cat(gen_out))
    watch(len(bagel.decoder.layers), und, gen)
    return list(zip(_ungroup(und[0], und_sizes), _ungroup(gen[0], gen_sizes), strict=True))


def _ungroup(flat: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """[N, ...] -> per group [B, T, ...]."""
    parts = flat.split([batch * tokens for batch, tokens in sizes])
    return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]


class Embedder:
    """Turns batches of texts, pictures and latents of one canvas into a block's und and gen tokens."""

    def __init__(self, bagel: Bagel, special: dict[str, int], rows: int, columns: int) -> None:
        self.bagel, self.rows, self.columns = bagel, rows, columns
        device = bagel.device
        self.markers = torch.tensor([special[SPECIAL[3]], special[SPECIAL[4]]], device=device)
        self.latent_at = grid_positions(rows, columns, bagel.latent_side, device)
        self.patch_at = grid_positions(rows, columns, bagel.config.vit.patches_per_side, device)
        self.vit_at = grid_positions(rows, columns, round(bagel.vision.positions.shape[0] ** 0.5), device)

    def text(self, ids: Tensor) -> Tensor:
        """int [B, L] -> und tokens."""
        return F.embedding(ids.long(), self.bagel.embed_tokens)

    def between_markers(self, batch: int, tokens: Tensor | None = None) -> Tensor:
        """vision_start, the tokens [B, L, D] (none for latents, which are gen tokens), vision_end."""
        start, end = self.text(self.markers)[:, None, None].expand(-1, batch, -1, -1)
        return torch.cat((start, end) if tokens is None else (start, tokens.to(start.dtype), end), dim=1)

    def latents(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Scaled latent tokens [B, L, 64] at times [B] -> gen tokens."""
        b = self.bagel
        out: Tensor = b.vae2llm(tokens) + b.time_embedder(t)[:, None] + b.latent_positions[self.latent_at]
        return out

    def pictures(self, patches: Tensor) -> Tensor:
        """8-bit patches [B, L, 588] -> [B, L, D]."""
        features = self.bagel.vision.connector(self.bagel.vision.vit(patches.float() / 127.5 - 1, self.patch_at))
        tokens: Tensor = features + self.bagel.vision.positions[self.vit_at]
        return tokens


Content = Tensor | tuple[Tensor, Tensor]
"""Of a block: a text's ids [B, L]; of a ViT block what `Embedder.pictures` gives [B, L, D]; of a latent block its
scaled latents [B, L, 64] and their times [B]."""


def assemble(embed: Embedder, shape: Shape, contents: Sequence[Content], lengths: Tensor) -> Group:
    """A batch of contexts from what its blocks hold; lengths as `Shape.place` takes them."""
    und, gen = [], []
    for block, content in zip(shape.blocks, contents, strict=True):
        if isinstance(content, tuple):
            und.append(embed.between_markers(len(lengths)))
            gen.append(embed.latents(*content))
        elif block.kind == "text":
            und.append(embed.text(content))
        else:
            und.append(embed.between_markers(len(lengths), content))
    together = torch.cat(und, dim=1)
    latents = torch.cat(gen, dim=1) if gen else together.new_empty(len(lengths), 0, together.shape[-1])
    return Group(shape, together, latents, *shape.place(lengths))


def text_lengths(ids: Tensor, pad: int) -> Tensor:
    """Tokens before the padding: int64 [B]."""
    return (ids != pad).sum(1)


def new_bagel(config: BagelConfig, device: torch.device, side: int) -> Bagel:
    """A float32 model with fresh weights, all trainable but the two sin-cos position tables ([side * side, D])."""

    def linear(layer: int, expert: Expert, name: str, in_features: int, out_features: int) -> Linear:
        return DenseLinear(in_features, out_features, bias=name == "qkv", dtype=torch.float32)

    d = config.decoder
    head = DenseLinear(d.hidden_size, d.vocab_size, bias=False, dtype=torch.float32)
    bagel = Bagel(config, linear, head, torch.float32, torch.float32, side * side, side * side)
    for name, parameter in bagel.named_parameters():
        _initialise(name, parameter)
        parameter.requires_grad_(True)
    table = sincos_table(side, d.hidden_size)
    for positions in (bagel.latent_positions, bagel.vision.positions):
        positions.data.copy_(table)
        positions.requires_grad_(False)
    return bagel.to(device)


def _initialise(name: str, parameter: Tensor) -> None:
    """Layers start near the identity (their output projections near zero); what enters the stream has size 0.5."""
    with torch.no_grad():
        if name.startswith(("vision.", "time_embedder.")):
            if "position_embedding" in name:
                parameter.normal_(std=0.02)
            return  # PyTorch's own initialisation
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name.startswith(("llm2vae", "lm_head")) or ".o." in name or ".down." in name:
            parameter.normal_(std=0.1 / parameter.shape[1] ** 0.5)
        elif name == "embed_tokens":
            parameter.normal_(std=0.5)
        else:
            parameter.normal_(std=0.6 / parameter.shape[1] ** 0.5)


def sincos_table(side: int, width: int) -> Tensor:
    """Sines and cosines of the row and of the column (half of the width each): [side * side, width]."""
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    one = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = one[:, None].expand(side, side, -1)
    columns = one[None].expand(side, side, -1)
    return torch.cat((columns, rows), dim=-1).reshape(side * side, width).float()

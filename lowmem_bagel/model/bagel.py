"""BAGEL: the decoder with its embeddings, latent projections and vision tower. Wiring only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.config import BagelConfig
from ..checkpoint.tensors import EXPERTS, Expert
from ..ops.attention.full import FullAttention, torch_attention
from ..ops.dtypes import wide
from ..ops.linear import DenseLinear, Linear
from ..ops.rope import Rope, Rotate, qk_norm_rope, rope_at
from . import undrawn
from .decoder import Decoder, LinearFactory
from .kv_cache import DividedCache, KVCache
from .vision import Vision, grid_positions

TIME_FREQUENCIES = 256


class TimeEmbedder(nn.Module):
    """Sinusoids of t in [0, 1] (cosines first), then a two-layer MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            undrawn.Linear(TIME_FREQUENCIES, hidden_size), nn.SiLU(), undrawn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """t: float32 [N] -> [N, hidden_size]."""
        half = TIME_FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angles = t.float()[:, None] * frequencies
        weight = self.get_parameter("mlp.0.weight")
        out: Tensor = self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(weight.dtype))
        return out


class Bagel(nn.Module):
    """All of the checkpoint but the VAE.

    Built on the meta device and filled by the loader; `linear` hands in the decoder's linears. `dtype` is that of the
    decoder's arithmetic, `residual_dtype` that of its residual stream; see `decoder.wide` for what is around them.
    Without the gen expert it only understands.
    """

    def __init__(
        self,
        config: BagelConfig,
        linear: LinearFactory,
        lm_head: Linear,
        dtype: torch.dtype,
        residual_dtype: torch.dtype,
        latent_positions: int,
        vit_positions: int,
        experts: Sequence[Expert] = EXPERTS,
        rotate: Rotate = qk_norm_rope,
        vision_attention: FullAttention = torch_attention,
    ) -> None:
        super().__init__()
        h = config.decoder.hidden_size
        self.config = config
        self.dtype, self.residual_dtype = dtype, residual_dtype
        self.embed_tokens = nn.Parameter(torch.empty(config.decoder.vocab_size, h, dtype=dtype), requires_grad=False)
        self.decoder = Decoder(config, linear, dtype, experts, rotate)
        self.lm_head = lm_head
        around = wide(dtype)
        if "gen" in experts:
            self.latent_positions = nn.Parameter(torch.empty(latent_positions, h, dtype=around), requires_grad=False)
            self.vae2llm = DenseLinear(config.latent_values, h, bias=True, dtype=around)
            self.llm2vae = DenseLinear(h, config.latent_values, bias=True, dtype=around)
            self.time_embedder = TimeEmbedder(h).to(around)
        self.vision = Vision(config, vit_positions, around, vision_attention)

    @property
    def device(self) -> torch.device:
        """Where the arithmetic happens; the token embedding may live elsewhere."""
        device: torch.device = self.decoder.norm["und"].device
        return device

    @property
    def latent_side(self) -> int:
        """Latent tokens a side that the position table covers."""
        return math.isqrt(self.latent_positions.shape[0])

    def kv_cache(self, capacity: int) -> KVCache:
        """Room for so many tokens, on the devices that the layers are on."""
        whole, elsewhere = self.config.decoder, self.decoder.elsewhere
        if not elsewhere:
            return KVCache(whole, capacity, self.dtype, self.device)
        caches = [KVCache(replace(whole, num_layers=elsewhere[0].layers.start), capacity, self.dtype, self.device)]
        for stretch in elsewhere:
            with stretch.entered():
                own = replace(whole, num_layers=len(stretch.layers))
                caches.append(KVCache(own, capacity, self.dtype, stretch.device))
        return DividedCache(caches)

    def rope(self, positions: Tensor) -> Rope:
        """positions [B, T] -> cos and sin [B, T, 1, head_dim]."""
        return rope_at(positions.to(self.device), self.config.decoder.head_dim, self.config.decoder.rope_theta)

    def embed_text(self, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, hidden_size]. A lookup where the table lives; only the rows found move."""
        rows = F.embedding(ids.to(self.embed_tokens.device), self.embed_tokens)
        return rows.to(self.device, self.residual_dtype)

    def embed_latents(self, latents: Tensor, t: Tensor, rows: int, columns: int) -> Tensor:
        """Noisy or clean latent tokens at time t (float32 [1]) -> [T, hidden_size].

        latents: [T, latent_values], of one picture of rows x columns tokens or of several, one after the other.
        """
        pictures = latents.shape[0] // (rows * columns)
        positions = grid_positions(rows, columns, self.latent_side, self.device).repeat(pictures)
        tokens: Tensor = self.vae2llm(latents.to(self.vae2llm.weight.dtype)) + self.time_embedder(t.to(self.device))
        return (tokens + self.latent_positions[positions]).to(self.residual_dtype)

    def embed_picture(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """ViT patches [rows * columns, patch_values] of one picture -> [T, hidden_size]."""
        tokens: Tensor = self.vision(patches, rows, columns)
        return tokens.to(self.residual_dtype)

    def velocity(self, hidden: Tensor) -> Tensor:
        """Hidden states of latent tokens before the final norm [B, T, hidden_size] -> float32 [B, T, latent_values]."""
        velocity: Tensor = self.llm2vae(self.decoder.final_norm("gen", hidden))
        return velocity.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of text tokens before the final norm [B, T, hidden_size] -> [B, T, vocab_size]."""
        logits: Tensor = self.lm_head(self.decoder.final_norm("und", hidden))
        return logits

"""The SigLIP vision transformer and the connector that brings its output to the decoder's width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.config import BagelConfig, VitConfig
from ..ops.attention.full import FullAttention, torch_attention
from .undrawn import LayerNorm, Linear


class VitAttention(nn.Module):
    def __init__(self, config: VitConfig, attend: FullAttention) -> None:
        super().__init__()
        h = config.hidden_size
        self.heads, self.attend = config.num_heads, attend
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(h, h) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(self.attend(q, k, v).flatten(-2))
        return out


class VitMlp(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class VitLayer(nn.Module):
    def __init__(self, config: VitConfig, attend: FullAttention) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VitAttention(config, attend)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VitMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VitEmbeddings(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.patch_embedding = Linear(config.patch_values, config.hidden_size)
        # Given its memory: PyTorch would import its compiler to draw random numbers on the meta device, for seconds.
        positions = torch.empty(config.patches_per_side**2, config.hidden_size)
        self.position_embedding = nn.Embedding.from_pretrained(positions)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = self.patch_embedding(patches) + self.position_embedding(positions)
        return out


class VitEncoder(nn.Module):
    def __init__(self, config: VitConfig, attend: FullAttention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VitLayer(config, attend) for _ in range(config.num_layers))


class Vit(nn.Module):
    """Module names are the checkpoint's, below `vit_model.vision_model`."""

    def __init__(self, config: VitConfig, attend: FullAttention) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VitEmbeddings(config)
        self.encoder = VitEncoder(config, attend)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Full attention among the patches of each picture.

        patches: [B, T, patch_values], values ordered (row in patch, column in patch, channel), in [-1, 1];
        positions: int64 [T], row * patches_per_side + column; returns [B, T, hidden_size].
        """
        x = self.embeddings(patches, positions)
        for layer in self.encoder.layers:
            x = layer(x)
        out: Tensor = self.post_layernorm(x)
        return out


class Connector(nn.Module):
    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.vit.hidden_size, config.decoder.hidden_size)
        self.fc2 = Linear(config.decoder.hidden_size, config.decoder.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Vision(nn.Module):
    """Pictures to tokens of the decoder: the tower, the connector, and the positions added at the end."""

    def __init__(
        self, config: BagelConfig, positions: int, dtype: torch.dtype, attend: FullAttention = torch_attention
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.vit = Vit(config.vit, attend).to(dtype)
        self.connector = Connector(config).to(dtype)
        shape = (positions, config.decoder.hidden_size)
        self.positions = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """Patches [rows * columns, patch_values] of one picture -> [rows * columns, hidden_size]."""
        device = self.positions.device
        inside = grid_positions(rows, columns, self.vit.config.patches_per_side, device)
        features = self.connector(self.vit(patches[None].to(device, self.dtype), inside))[0]
        side = math.isqrt(self.positions.shape[0])
        tokens: Tensor = features + self.positions[grid_positions(rows, columns, side, device)]
        return tokens


def grid_positions(rows: int, columns: int, stride: int, device: torch.device | None = None) -> Tensor:
    """Indices row * stride + column of a grid into a position table of `stride` a side: int64 [rows * columns]."""
    row = torch.arange(rows, device=device)[:, None] * stride
    return (row + torch.arange(columns, device=device)).flatten()


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """[C, H, W] -> [H/patch * W/patch, patch * patch * C], values ordered (row, column, channel) in the patch."""
    channels, height, width = pixels.shape
    blocks = pixels.reshape(channels, height // patch, patch, width // patch, patch)
    return blocks.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The inverse of `patchify`: [rows * columns, patch * patch * C] -> [C, rows * patch, columns * patch]."""
    blocks = tokens.reshape(rows, columns, patch, patch, -1)
    return blocks.permute(4, 0, 2, 1, 3).reshape(-1, rows * patch, columns * patch)

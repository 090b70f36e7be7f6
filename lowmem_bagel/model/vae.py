"""FLUX's autoencoder. Module names are those of `ae.safetensors`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.config import VaeConfig
from ..ops.attention.full import FullAttention, torch_attention
from . import undrawn
from .undrawn import GroupNorm

ATTENTION_CHUNK = 2048
"""Queries at a time in the middle attention: its one head is too wide for most fused kernels, and all scores of a
1024x1024 picture at once would be 16384 x 16384."""

STRIP_VALUES = 1 << 25
"""Values of a feature map that are normalised and convolved at a time. Below it a map is one strip."""


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(32, channels, eps=1e-6)


def normed_conv(x: Tensor, norm: GroupNorm, conv: Conv2d) -> Tensor:
    """conv(silu(norm(x))) for a 3x3 convolution, in strips of rows where the map is large.

    The normalised map never exists as a whole. The statistics are those of the whole map, so there are no seams, and
    every run cuts the same strips, whatever memory there is, so that all give the same bits.
    """
    strips = _strips(x.shape[1:])
    if len(strips) == 1:
        out: Tensor = conv(F.silu(norm(x)))
        return out
    scale, shift = _affine_of(x, norm)
    out = x.new_empty(x.shape[0], conv.out_channels, *x.shape[2:])
    for rows in strips:
        part = F.silu(torch.addcmul(shift, _with_halo(x, rows), scale).to(x.dtype))
        out[:, :, rows.start : rows.stop] = _conv_strip(part, rows, x.shape[2], conv)
    return out


def _strips(shape: Sequence[int]) -> list[range]:
    """Rows of a map [C, H, W], in strips of about STRIP_VALUES values."""
    height = shape[1]
    count = -(-math.prod(shape) // STRIP_VALUES)
    step = -(-height // count)
    return [range(start, min(start + step, height)) for start in range(0, height, step)]


def _with_halo(x: Tensor, rows: range) -> Tensor:
    """The strip's rows and the one above and below it, where there are."""
    return x[:, :, max(rows.start - 1, 0) : rows.stop + 1]


def _conv_strip(part: Tensor, rows: range, height: int, conv: Conv2d) -> Tensor:
    """A 3x3 convolution of a strip with its halo; the map's own border is padded with zeros."""
    part = F.pad(part, (1, 1, int(rows.start == 0), int(rows.stop == height)))
    return conv.unpadded(part)


def _affine_of(x: Tensor, norm: GroupNorm) -> tuple[Tensor, Tensor]:
    """GroupNorm as one multiplication and one addition a channel: float32 [B, C, 1, 1] each."""
    batch, channels = x.shape[:2]
    pieces = x.reshape(batch, norm.num_groups, -1)
    sums = [(p.float().sum(-1), p.float().square_().sum(-1)) for p in pieces.split(STRIP_VALUES // 32, dim=-1)]
    total, squares = (torch.stack(part).double().sum(0) for part in zip(*sums, strict=True))
    mean = total / pieces.shape[-1]
    variance = squares / pieces.shape[-1] - mean.square()
    rstd = torch.rsqrt(variance + norm.eps)
    mean, rstd = (t.repeat_interleave(channels // norm.num_groups, dim=1) for t in (mean, rstd))
    scale = rstd * norm.weight.double()
    shift = norm.bias.double() - mean * scale
    return scale.float()[..., None, None], shift.float()[..., None, None]


class Conv2d(undrawn.Conv2d):
    """cuDNN may not round its float32 values to TF32's ten bits, as PyTorch lets it on Ampere and later.

    That is an argument of the operation below `F.conv2d`: PyTorch's switch is the process's, and a thread that puts it
    back would round what another one is drawing.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else self._exact(x, self.padding)

    def unpadded(self, x: Tensor) -> Tensor:
        """As `forward`, of a map that has its border already."""
        if torch.is_grad_enabled():
            return F.conv2d(x, self.weight, self.bias, self.stride)
        return self._exact(x, (0, 0))

    def _exact(self, x: Tensor, padding: str | tuple[int, ...]) -> Tensor:
        cudnn, exactly_so = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
        out: Tensor = torch.ops.aten._convolution(
            x, self.weight, self.bias, self.stride, padding, (1, 1), False, (0, 0), 1,
            benchmark=cudnn.benchmark, deterministic=cudnn.deterministic or exactly_so, cudnn_enabled=cudnn.enabled,
            allow_tf32=False,
        )  # fmt: skip
        return out


class ResBlock(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(width), Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(out), Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = normed_conv(x, self.norm1, self.conv1)
        h = normed_conv(h, self.norm2, self.conv2)
        shortcut: Tensor = self.nin_shortcut(x)
        return shortcut + h if torch.is_grad_enabled() else h.add_(shortcut)


class MidAttention(nn.Module):
    def __init__(self, channels: int, attend: FullAttention) -> None:
        super().__init__()
        self.attend = attend
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # One head, its channels next to each other in memory: [B, positions, 1, channels].
        q, k, v = (conv(h).flatten(2).transpose(1, 2).contiguous().unsqueeze(2) for conv in (self.q, self.k, self.v))
        chunks = [self.attend(part, k, v) for part in q.split(ATTENTION_CHUNK, dim=1)]
        attended = torch.cat(chunks, dim=1).squeeze(2).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(attended)
        return out


class Middle(nn.Module):
    def __init__(self, channels: int, attend: FullAttention) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = MidAttention(channels, attend)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        strips = _strips((channels, 2 * height, 2 * width))
        if len(strips) == 1:
            small: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            return small
        out = x.new_empty(batch, self.conv.out_channels, 2 * height, 2 * width)
        for rows in strips:
            first, last = max(rows.start - 1, 0), min(rows.stop + 1, 2 * height)
            part = F.interpolate(x[:, :, first // 2 : (last + 1) // 2], scale_factor=2.0, mode="nearest")
            part = part[:, :, first % 2 : first % 2 + last - first]
            out[:, :, rows.start : rows.stop] = _conv_strip(part, rows, 2 * height, self.conv)
        return out


class Level(nn.Module):
    """The blocks of one resolution, and the change to the next one where there is one."""

    def __init__(self, widths: list[int], resample: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        if resample:
            self.add_module(*resample)
        self.resample = resample[0] if resample else None

    def steps(self) -> Iterator[nn.Module]:
        """What is applied in order. A caller that loops over it lets go of each map as soon as the next is there."""
        yield from self.block
        if self.resample:
            yield self.get_submodule(self.resample)


class VaeEncoder(nn.Module):
    def __init__(self, c: VaeConfig, attend: FullAttention) -> None:
        super().__init__()
        self.conv_in = Conv2d(c.in_channels, c.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width, last = c.ch, len(c.ch_mult) - 1
        for level, mult in enumerate(c.ch_mult):
            out = c.ch * mult
            resample = ("downsample", Downsample(out)) if level != last else None
            self.down.append(Level([width] + [out] * c.num_res_blocks, resample))
            width = out
        self.mid = Middle(width, attend)
        self.norm_out = _norm(width)
        self.conv_out = Conv2d(width, 2 * c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for step in (step for level in cast("Iterable[Level]", self.down) for step in level.steps()):
            x = step(x)
        return normed_conv(self.mid(x), self.norm_out, self.conv_out)


class VaeDecoder(nn.Module):
    def __init__(self, c: VaeConfig, attend: FullAttention) -> None:
        super().__init__()
        width = c.ch * c.ch_mult[-1]
        self.conv_in = Conv2d(c.z_channels, width, 3, padding=1)
        self.mid = Middle(width, attend)
        levels: list[Level] = []
        for level in reversed(range(len(c.ch_mult))):
            out = c.ch * c.ch_mult[level]
            resample = ("upsample", Upsample(out)) if level else None
            levels.insert(0, Level([width] + [out] * (c.num_res_blocks + 1), resample))
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(width)
        self.conv_out = Conv2d(width, c.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for step in (step for level in cast("Iterable[Level]", reversed(self.up)) for step in level.steps()):
            x = step(x)
        return normed_conv(x, self.norm_out, self.conv_out)


class Vae(nn.Module):
    """Pictures to latents and back."""

    def __init__(self, config: VaeConfig, attend: FullAttention = torch_attention) -> None:
        super().__init__()
        self.config = config
        self.encoder = VaeEncoder(config, attend)
        self.decoder = VaeDecoder(config, attend)

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Sample the latent: [B, 3, H, W] in [-1, 1] and noise [B, z, H/8, W/8] -> scaled latent like noise."""
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        sample: Tensor = mean + torch.exp(0.5 * logvar) * noise
        return self.config.scale_factor * (sample - self.config.shift_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent [B, z, h, w] -> pixels [B, 3, 8h, 8w], nominally in [-1, 1]."""
        out: Tensor = self.decoder(latent / self.config.scale_factor + self.config.shift_factor)
        return out

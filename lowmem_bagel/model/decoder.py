"""The decoder: a Qwen2.5-shaped transformer whose layers have two sets of weights, und and gen.

Tokens of the two experts are separate tensors from end to end; they meet only in attention.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..config import BagelConfig
from ..tensors import EXPERTS, Expert
from .linear import Linear, rms_norm

Rope = tuple[Tensor, Tensor]
"""cos and sin, float32, each broadcastable to [B, T, heads, head_dim]."""


VALUE_SCALE = 1 / 16
"""Of attention's values in fp16 arithmetic: they stay finite up to 1e6, and what is lost below is 1e-6 of one."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what surrounds the decoder's linears: float32 where the arithmetic's range is fp16's."""
    return torch.float32 if dtype == torch.float16 else dtype


class Attend(Protocol):
    """Attention of one block of new tokens at one layer; what it sees beside them is the caller's business."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, T, heads, head_dim], k and v: [B, T, kv_heads, head_dim], rope applied -> like q."""
        ...


class Rotate(Protocol):
    """QK norm and rope of a fused projection; `qk_norm_rope` is the reference."""

    def __call__(
        self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, rope: Rope, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class LinearFactory(Protocol):
    """Hands in the linears: called once for each fused linear of each (layer, expert)."""

    def __call__(self, layer: int, expert: Expert, name: str, in_features: int, out_features: int) -> Linear: ...


@dataclass
class Part:
    """Tokens of a block that go through the same expert. hidden: [B, T, hidden_size]."""

    expert: Expert
    hidden: Tensor
    rope: Rope


def rope_at(positions: Tensor, head_dim: int, theta: float) -> Rope:
    """cos and sin for NeoX-style (rotate-half) rope; positions [B, T] -> two float32 [B, T, 1, head_dim]."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)[:, :, None, :]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """x: float32 [B, T, heads, head_dim]."""
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def qk_norm_rope(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, rope: Rope, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, (heads + 2 kv_heads) * d] -> q [B, T, heads, d], k and v [B, T, kv_heads, d], in qkv's dtype.

    k = rope(rms_norm(k) * k_norm), q likewise, in float32 and rounded once.
    """
    parts = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = parts.split((heads, kv_heads, kv_heads), dim=-2)
    q = apply_rope(rms_norm(q, q_norm.float(), eps), rope).to(v.dtype)
    k = apply_rope(rms_norm(k, k_norm.float(), eps), rope).to(v.dtype)
    return q, k, v


class ExpertLayer(nn.Module):
    """The weights of one (layer, expert), and what they compute on their own tokens."""

    def __init__(
        self,
        config: BagelConfig,
        layer: int,
        expert: Expert,
        linear: LinearFactory,
        dtype: torch.dtype,
        rotate: Rotate = qk_norm_rope,
    ) -> None:
        super().__init__()
        c = config.decoder
        self.rotate = rotate
        self.eps, self.head_dim = c.rms_norm_eps, c.head_dim
        self.heads, self.kv_heads = c.num_heads, c.num_kv_heads
        self.dtype = dtype
        self.value_scale = VALUE_SCALE if dtype == torch.float16 else 1.0

        def vector(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, dtype=wide(dtype)), requires_grad=False)

        self.input_norm, self.post_norm = vector(c.hidden_size), vector(c.hidden_size)
        self.q_norm, self.k_norm = vector(c.head_dim), vector(c.head_dim)
        self.qkv = linear(layer, expert, "qkv", c.hidden_size, sum(c.qkv_rows))
        self.o = linear(layer, expert, "o", c.hidden_size, c.hidden_size)
        self.gate_up = linear(layer, expert, "gate_up", c.hidden_size, 2 * c.intermediate_size)
        self.down = linear(layer, expert, "down", c.intermediate_size, c.hidden_size)

    def project(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, heads, head_dim], k and v [B, T, kv_heads, head_dim]; QK norm and rope applied.

        In fp16 the values are scaled down, which `finish` undoes: softmax is linear in them.
        """
        qkv = self.qkv.after_rmsnorm(hidden, self.input_norm, self.eps)
        q, k, v = self.rotate(qkv, self.q_norm, self.k_norm, self.eps, rope, self.heads, self.kv_heads)
        if self.value_scale == 1:
            return q, k, v
        return q.to(self.dtype), k.to(self.dtype), (v * self.value_scale).to(self.dtype)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP with their residual additions. attended: [B, T, heads, head_dim]."""
        attended = attended.flatten(-2)
        if self.value_scale != 1:
            attended = attended.float() / self.value_scale
        hidden = hidden + self.o(attended)
        return hidden + self.down.after_swiglu(self.gate_up.after_rmsnorm(hidden, self.post_norm, self.eps))


Layer = Mapping[Expert, ExpertLayer]


class LayerSource(Protocol):
    """Where the decoder's weights come from: resident modules, or slots that weights stream through."""

    def begin(self, experts: Collection[Expert]) -> None:
        """A pass over all layers starts that uses these experts."""
        ...

    def acquire(self, layer: int) -> Layer:
        """The layer's experts, their weights ready for use on the current stream."""
        ...

    def release(self, layer: int) -> None:
        """All work that uses the layer's weights has been queued."""
        ...


class ResidentLayers:
    """All layers in memory for good."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    def begin(self, experts: Collection[Expert]) -> None:
        pass

    def acquire(self, layer: int) -> Layer:
        return self.layers[layer]

    def release(self, layer: int) -> None:
        pass


class Decoder(nn.Module):
    """The stack of layers, and the final norm of each expert. `source` may be replaced to stream the layers."""

    def __init__(
        self,
        config: BagelConfig,
        linear: LinearFactory,
        dtype: torch.dtype,
        experts: Sequence[Expert] = EXPERTS,
        rotate: Rotate = qk_norm_rope,
    ) -> None:
        super().__init__()
        c = config.decoder
        self.eps = c.rms_norm_eps
        self.layers = nn.ModuleList(
            nn.ModuleDict({expert: ExpertLayer(config, layer, expert, linear, dtype, rotate) for expert in experts})
            for layer in range(c.num_layers)
        )
        self.source: LayerSource = ResidentLayers(cast("Sequence[Layer]", self.layers))
        self.norm = nn.ParameterDict(
            {e: nn.Parameter(torch.empty(c.hidden_size, dtype=wide(dtype)), requires_grad=False) for e in experts}
        )

    def forward(self, parts: Sequence[Part], attend: Attend) -> list[Tensor]:
        """Run a block of tokens through all layers; returns each part's hidden states before the final norm.

        The block's token order is that of the parts, each [B, T_part, hidden_size].
        """
        return Pass(self, parts, attend).advance(len(self.layers))

    def final_norm(self, expert: Expert, hidden: Tensor) -> Tensor:
        """The norm after the last layer, in the dtype of its weight."""
        return rms_norm(hidden, self.norm[expert], self.eps)


class Pass:
    """A block of tokens on its way through the layers, which may pause between two of them or end early."""

    def __init__(self, decoder: Decoder, parts: Sequence[Part], attend: Attend) -> None:
        self.decoder, self.parts, self.attend = decoder, parts, attend
        self.layer = 0
        decoder.source.begin({part.expert for part in parts})

    def advance(self, stop: int) -> list[Tensor]:
        """Go on up to layer `stop`; returns each part's hidden states there."""
        source, parts = self.decoder.source, self.parts
        hidden = [part.hidden for part in parts]
        lengths = [h.shape[1] for h in hidden]
        for index in range(self.layer, stop):
            experts = source.acquire(index)
            projected = [experts[p.expert].project(h, p.rope) for p, h in zip(parts, hidden, strict=True)]
            q, k, v = (_join(tensors) for tensors in zip(*projected, strict=True))
            attended = self.attend(index, q, k, v).split(lengths, dim=1)
            hidden = [experts[p.expert].finish(h, o) for p, h, o in zip(parts, hidden, attended, strict=True)]
            source.release(index)
        self.layer = max(self.layer, stop)
        self.parts = [Part(p.expert, h, p.rope) for p, h in zip(parts, hidden, strict=True)]
        return hidden

    def keep(self, rows: Sequence[int], attend: Attend) -> None:
        """Go on with some rows of the batch only; `attend` is attention for them."""

        def kept(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[row : row + 1] for row in rows])

        self.parts = [Part(p.expert, kept(p.hidden), (kept(p.rope[0]), kept(p.rope[1]))) for p in self.parts]
        self.attend = attend


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)

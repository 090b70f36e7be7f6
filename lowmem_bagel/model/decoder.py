"""The decoder: a Qwen2.5-shaped transformer whose layers have two sets of weights, und and gen.

Tokens of the two experts are separate tensors from end to end; they meet only in attention.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..checkpoint.config import BagelConfig
from ..checkpoint.tensors import EXPERTS, Expert
from ..ops.dtypes import VALUE_SCALE, wide
from ..ops.linear import SWIGLU, Add, Linear, RMSNorm, count_tokens, joined, rms_norm
from ..ops.rope import Projected, Rope, Rotate, qk_norm_rope
from ..ops.routed import route


class Attend(Protocol):
    """Attention of one block of new tokens at one layer; what it sees beside them is the caller's business."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """q: [B, T, heads, head_dim], k and v: [B, T, kv_heads, head_dim], rope applied -> like q, as consecutive rows
        of the batch: branches of guidance attend one by one."""
        ...


class LinearFactory(Protocol):
    """Hands in the linears: called once for each fused linear of each (layer, expert)."""

    def __call__(self, layer: int, expert: Expert, name: str, in_features: int, out_features: int) -> Linear: ...


@dataclass
class Part:
    """Tokens of a block that go through the same expert. hidden: [B, T, hidden_size]."""

    expert: Expert
    hidden: Tensor
    rope: Rope


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
        self.routed = c.routed_in(layer, expert)
        middle, count = c.intermediate_size, 1
        if self.routed is not None:
            middle, count = self.routed.size, self.routed.count
            router = torch.empty(count, c.hidden_size, dtype=wide(dtype))
            self.router = nn.Parameter(router, requires_grad=False)
        self.gate_up = linear(layer, expert, "gate_up", c.hidden_size, count * 2 * middle)
        self.down = linear(layer, expert, "down", middle, count * c.hidden_size)

    def room(self, batch: int, tokens: int, device: torch.device) -> Projected:
        """Uninitialised q, k and v of a block."""
        shapes = ((batch, tokens, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads))
        q, k, v = (torch.empty(shape, dtype=self.dtype, device=device) for shape in shapes)
        return q, k, v

    def raw_qkv(self, hidden: Tensor) -> Tensor:
        """q, k and v side by side, without QK norm and rope: [B, T, (heads + 2 kv_heads) * head_dim].

        In fp16 the values are scaled down, which `finish` undoes: softmax is linear in them.
        """
        qkv: Tensor = self.qkv(hidden, RMSNorm(self.input_norm, self.eps))
        if self.value_scale != 1:
            qkv[..., -self.kv_heads * self.head_dim :] *= self.value_scale
        return qkv

    def project(self, hidden: Tensor, rope: Rope, into: Projected) -> None:
        """Fills q, k and v of these tokens, QK norm and rope applied."""
        qkv = self.raw_qkv(hidden)
        self.rotate(qkv, self.q_norm, self.k_norm, self.eps, rope, self.heads, self.kv_heads, into)

    def finish(self, hidden: Tensor, attended: Sequence[Tensor]) -> Tensor:
        """Output projection and MLP with their residual additions; `hidden` is given up.

        attended: [B, T, heads, head_dim] as consecutive rows of the batch.
        """
        blocks = [block.flatten(-2) for block in attended]
        if self.value_scale != 1:
            blocks = [block.float() / self.value_scale for block in blocks]
        return self.mlp(self.o(blocks, after=Add(hidden)))

    def mlp(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden_size], which is given up, and what the MLP of its norm adds."""
        norm = RMSNorm(self.post_norm, self.eps)
        if self.routed is not None:
            return self._routed_mlp(hidden.view(-1, hidden.shape[-1]), norm, self.routed.active).view(hidden.shape)
        if self.gate_up.fuses(count_tokens(hidden), norm, SWIGLU):
            return self.down.forward(self.gate_up(hidden, norm, SWIGLU), after=Add(hidden))
        return self.down.forward(self.gate_up(hidden, norm), SWIGLU, Add(hidden))

    def _routed_mlp(self, hidden: Tensor, norm: RMSNorm, active: int) -> Tensor:
        """hidden [tokens, hidden_size] and the MLPs of each token's experts added to it; `hidden` is given up."""
        x = self.gate_up.prepared(hidden, norm)
        routes = route(x, self.router, active)
        gate_up = self.gate_up.grouped(x, routes.scattered)
        slots = self.down.grouped(gate_up, routes.sorted, SWIGLU)
        del x, gate_up  # before there are sums in float32
        return self.down.add_slots(hidden, slots, routes)


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


class Stretch(Protocol):
    """Consecutive layers on a device of their own.

    Attributes:
        ahead: whether the next branches of guidance may be on their way before one of them is back.
    """

    ahead: bool

    @property
    def layers(self) -> range: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def source(self) -> LayerSource: ...

    def entered(self) -> AbstractContextManager[object]:
        """Whatever is launched or allocated there is so inside."""
        ...

    def there(self, tensor: Tensor) -> Tensor:
        """Of the device of the layers before these, on this one; called inside."""
        ...

    def back(self, tensor: Tensor) -> Tensor:
        """Of this device, on that of the first layers."""
        ...


class Decoder(nn.Module):
    """The stack of layers, and the final norm of each expert. `source` may be replaced to stream the layers.

    Attributes:
        elsewhere: the last layers, where they are on other devices, in their order; `source` has those before.
    """

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
        self.elsewhere: Sequence[Stretch] = ()
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
    """A block of tokens on its way through the layers, which may pause between two of them or end early.

    It works on a copy of the parts' hidden states. Going on overwrites what `advance` returned before.

    Args:
        layer: where they are: a pass may go on where another one paused.
    """

    def __init__(self, decoder: Decoder, parts: Sequence[Part], attend: Attend, layer: int = 0) -> None:
        self.decoder, self.attend = decoder, attend
        self.parts = [Part(p.expert, p.hidden.clone(memory_format=torch.contiguous_format), p.rope) for p in parts]
        self.layer = layer
        self._elsewhere: Stretch | None = None
        """Where the parts are, if not on the device of the first layers."""
        experts = {part.expert for part in parts}
        decoder.source.begin(experts)
        for stretch in decoder.elsewhere:
            with stretch.entered():
                stretch.source.begin(experts)

    def advance(self, stop: int) -> list[Tensor]:
        """Go on up to layer `stop`; returns each part's hidden states there, on the device of the first layers."""
        self.launch(stop)
        return self.hidden()

    def launch(self, stop: int) -> None:
        """Go on up to layer `stop`. Until its hidden states are asked for, what else is launched on the device of the
        first layers does not wait for those of other devices."""
        elsewhere = self.decoder.elsewhere
        own = elsewhere[0].layers.start if elsewhere else len(self.decoder.layers)
        self._through(self.decoder.source, range(self.layer, min(stop, own)))
        for stretch in elsewhere:
            layers = range(max(self.layer, stretch.layers.start), min(stop, stretch.layers.stop))
            if layers:
                with stretch.entered():
                    self._go_to(stretch)
                    self._through(stretch.source, layers)

    def arrive(self, hidden: Sequence[Tensor]) -> None:
        """Be after the last layer, to which others took each part's hidden states."""
        self.parts = [Part(p.expert, h, p.rope) for p, h in zip(self.parts, hidden, strict=True)]
        self.layer = len(self.decoder.layers)

    def hidden(self) -> list[Tensor]:
        """Each part's hidden states, on the device of the first layers."""
        hidden = [part.hidden for part in self.parts]
        return hidden if self._elsewhere is None else [self._elsewhere.back(h) for h in hidden]

    def _go_to(self, stretch: Stretch) -> None:
        if self._elsewhere is stretch:
            return
        self._elsewhere, there = stretch, stretch.there
        ropes = {id(part.rope): (there(part.rope[0]), there(part.rope[1])) for part in self.parts}
        self.parts = [Part(p.expert, there(p.hidden), ropes[id(p.rope)]) for p in self.parts]

    def _through(self, source: LayerSource, layers: range) -> None:
        parts = self.parts
        hidden = [part.hidden for part in parts]
        lengths = [h.shape[1] for h in hidden]
        for index in layers:
            experts = source.acquire(index)
            own = [experts[part.expert] for part in parts]
            block = own[0].room(hidden[0].shape[0], sum(lengths), hidden[0].device)
            rooms = zip(*(apart(tensor, lengths) for tensor in block), strict=True)
            for layer, part, h, (q, k, v) in zip(own, parts, hidden, rooms, strict=True):
                layer.project(h, part.rope, (q, k, v))
            attended = [apart(rows, lengths) for rows in self.attend(index, *block)]
            hidden = [
                layer.finish(h, rows) for layer, h, rows in zip(own, hidden, zip(*attended, strict=True), strict=True)
            ]
            source.release(index)
            self.layer = index + 1
        self.parts = [Part(p.expert, h, p.rope) for p, h in zip(parts, hidden, strict=True)]

    def keep(self, rows: Sequence[int], attend: Attend) -> None:
        """Go on with some rows of the batch only; `attend` is attention for them."""

        def kept(tensor: Tensor) -> Tensor:
            return joined([tensor[row : row + 1] for row in rows])

        self.parts = [Part(p.expert, kept(p.hidden), (kept(p.rope[0]), kept(p.rope[1]))) for p in self.parts]
        self.attend = attend


def apart(block: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """Each part's tokens of a block [B, T, ...]; the block itself where there is one part: over few tokens a pass takes
    what the host takes, and a split as much of that as a launch."""
    return (block,) if len(lengths) == 1 else block.split(lengths, dim=1)

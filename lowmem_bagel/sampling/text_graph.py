"""Text decoding by one captured CUDA graph a token.

Every launch of a step has the same arguments, whatever token it is: the token, its position and the length of the
cache are read from the device. The next step is queued before the host has read the token of the last one, so the
stop test costs no waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..context import Context
from ..model.bagel import Bagel
from ..model.decoder import ExpertLayer, Layer, ResidentLayers, Rope, rope_at
from .text import TokenChoice

Append = Callable[..., Tensor]
"""kernels.rope.append_token or its reference."""
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""kernels.decode_attention.decode_attention or its reference."""


@dataclass(frozen=True)
class StepKernels:
    append: Append
    attend: Attend


class Step:
    """One token of text on fixed buffers.

    Attributes:
        token: int64 [1], the token to append; greedy decoding leaves the next one here.
        logits: [vocab_size] of the token after it.
    """

    def __init__(self, bagel: Bagel, context: Context, kernels: StepKernels) -> None:
        (span,) = context.spans
        self.bagel, self.context, self.kernels = bagel, context, kernels
        rows = slice(span.start, context.room.stop)
        self.keys, self.values = context.arena.keys[:, rows], context.arena.values[:, rows]
        device, config = bagel.device, bagel.config.decoder
        left = self.keys.shape[1] - len(span)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.embedded = torch.zeros(1, config.hidden_size, dtype=bagel.residual_dtype, device=device)
        self.logits = torch.zeros(config.vocab_size, dtype=bagel.dtype, device=device)
        self.at = torch.zeros(3, dtype=torch.int32, device=device)
        cos, sin = rope_at(
            torch.arange(context.position, context.position + left, device=device)[None],
            config.head_dim,
            config.rope_theta,
        )
        self.rope: Rope = (cos[0, :, 0], sin[0, :, 0])
        self.length = len(span)
        self.reset()

    def reset(self) -> None:
        """Back to the context as it is."""
        self.at.copy_(torch.tensor([0, self.length, self.length + 1], dtype=torch.int32))

    def __call__(self) -> None:
        """Append `token` (or what `embedded` holds, where the table is not on the device)."""
        bagel = self.bagel
        if bagel.embed_tokens.device == self.token.device:
            self.embedded.copy_(bagel.embed_text(self.token))
        hidden = self.embedded
        position, length, visible = self.at.split(1)
        for index, layer in enumerate(cast("list[Layer]", bagel.decoder.layers)):
            hidden = self._layer(layer["und"], index, hidden, position, length, visible)
        logits = bagel.logits(hidden[None])[0, 0]
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.at.add_(1)

    def _layer(
        self, layer: ExpertLayer, index: int, hidden: Tensor, position: Tensor, length: Tensor, visible: Tensor
    ) -> Tensor:
        keys, values = self.keys[index], self.values[index]
        qkv = layer.qkv.after_rmsnorm(hidden, layer.input_norm, layer.eps)[0]
        q = self.kernels.append(
            qkv, layer.q_norm, layer.k_norm, layer.eps, self.rope, position, keys, values, length
        )  # fmt: skip
        attended = self.kernels.attend(q, keys, values, visible)
        return layer.finish(hidden, [attended[None]])


class GraphNextToken:
    """`NextToken` by replaying a graph of `Step`, with the next replay queued ahead of the stop test.

    Replays past the end only write rows of the cache that nobody reads.
    """

    WARM_UPS = 2

    def __init__(self, step: Step, choose: TokenChoice, generator: torch.Generator) -> None:
        self.step, self.choose, self.generator = step, choose, generator
        self._host = torch.zeros(1, dtype=torch.int64).pin_memory()
        self._read = torch.cuda.Event()
        self._capacity = step.keys.shape[1] - step.length
        self._queued = 0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                step()
                step.reset()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as another pipeline's copies, may go on using CUDA meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            step()
        step.reset()

    def __call__(self, token: int) -> int:
        if self.choose.do_sample or self._embedding_on_host:
            return self._one_by_one(token)
        if self._queued == 0:
            self.step.token.fill_(token)
            self._replay()
        self._read.synchronize()
        found = int(self._host)
        if self._queued < self._capacity:
            self._replay()
        return found

    @property
    def _embedding_on_host(self) -> bool:
        return self.step.bagel.embed_tokens.device != self.step.token.device

    def _replay(self) -> None:
        self._graph.replay()
        self._host.copy_(self.step.token, non_blocking=True)
        self._read.record()
        self._queued += 1

    def _one_by_one(self, token: int) -> int:
        self.step.token.fill_(token)
        if self._embedding_on_host:
            self.step.embedded.copy_(self.step.bagel.embed_text(torch.tensor([token])))
        self._graph.replay()
        return self.choose(self.step.logits, self.generator)


def why_not_graph(bagel: Bagel, context: Context) -> str | None:
    """None where text can be decoded by a graph, else the reason."""
    if bagel.device.type != "cuda":
        return f"needs a CUDA GPU, not {bagel.device.type}"
    if not isinstance(bagel.decoder.source, ResidentLayers):
        return "weights are streamed"
    if bagel.dtype == torch.float16:
        return "fp16 arithmetic runs eagerly"
    if len(context.spans) != 1:
        return "the context is not one range"
    return None


def graph_kernels(device: torch.device) -> StepKernels | str:
    """The kernels of a step where they run, else the reason why not."""
    from ..kernels.availability import why_not

    for name in ("rope", "decode_attention"):
        reason = why_not(name, device)
        if reason is not None:
            return f"kernel {name}: {reason}"
    from ..kernels.decode_attention import decode_attention
    from ..kernels.rope import append_token

    return StepKernels(append_token, decode_attention)

"""Text decoding by one captured CUDA graph a token.

Every launch of a step has the same arguments, whatever token it is: the token's embedding, its position and the length
of the cache are read from the device, where the step before left them. Two steps are queued before the host has read
the token of the first, so neither the stop test nor a launch costs any waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor

from ..model.bagel import Bagel
from ..model.decoder import ExpertLayer, Layer, ResidentLayers
from ..model.kv_cache import SequenceView
from ..ops.decode_attention import AttendToken
from ..ops.device import GraphMemory, captured
from ..ops.linear import RMSNorm
from ..ops.rope import Rope, rope_at
from .text import TokenChoice


class NextTokenKernel(Protocol):
    """From logits to what the next step reads; `kernels.elementwise.next_token_reference` says what."""

    def __call__(self, logits: Tensor, table: Tensor | None, token: Tensor, embedded: Tensor, at: Tensor) -> None: ...


@dataclass(frozen=True)
class StepKernels:
    """What a loaded model's steps of text run on."""

    attend: AttendToken
    choose: NextTokenKernel
    memory: GraphMemory = field(default_factory=GraphMemory)


class TokenStep:
    """One token of text on fixed buffers.

    Attributes:
        embedded: [1, hidden_size], of the token to append; a step leaves that of the likeliest next one here, if the
            table is on the device.
        token: int64 [1], the likeliest next token.
        logits: [vocab_size] of the next token.
    """

    def __init__(self, bagel: Bagel, view: SequenceView, kernels: StepKernels) -> None:
        (span,) = view.spans
        self.bagel, self.view, self.kernels = bagel, view, kernels
        rows = slice(span.start, view.region.stop)
        self.keys, self.values = view.kv_cache.keys[:, rows], view.kv_cache.values[:, rows]
        for cache in (self.keys, self.values):  # attention may read rows, without using them, before they are written
            cache[:, len(span) :].zero_()
        device, config = bagel.device, bagel.config.decoder
        left = self.keys.shape[1] - len(span)
        self.table = bagel.embed_tokens if bagel.embed_tokens.device == device else None
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.embedded = torch.zeros(1, config.hidden_size, dtype=bagel.residual_dtype, device=device)
        self.logits = torch.empty(0, dtype=bagel.dtype, device=device)
        self.at = torch.zeros(2, dtype=torch.int32, device=device)
        cos, sin = rope_at(
            torch.arange(view.position, view.position + left, device=device)[None],
            config.head_dim,
            config.rope_theta,
        )
        self.rope: Rope = (cos[0, :, 0], sin[0, :, 0])
        self.length = len(span)
        self.reset()

    def reset(self, appended: int = 0) -> None:
        """Back to the view as it is, and the first few tokens that were appended to it."""
        self.at.copy_(torch.tensor([appended, self.length + appended], dtype=torch.int32))

    def append(self, token: int) -> None:
        """The next step is to append this token."""
        self.embedded.copy_(self.bagel.embed_text(torch.tensor([token])))

    def __call__(self) -> None:
        """Append the token that `embedded` stands for."""
        bagel, hidden = self.bagel, self.embedded
        position, length = self.at.split(1)
        for index, layer in enumerate(cast("list[Layer]", bagel.decoder.layers)):
            hidden = self._layer(layer["und"], index, hidden, position, length)
        norm = bagel.decoder.norm["und"]
        self.logits = bagel.lm_head(hidden, RMSNorm(norm, bagel.decoder.eps))[0]
        self.kernels.choose(self.logits, self.table, self.token, self.embedded, self.at)

    def _layer(self, layer: ExpertLayer, index: int, hidden: Tensor, position: Tensor, length: Tensor) -> Tensor:
        keys, values = self.keys[index], self.values[index]
        qkv = layer.raw_qkv(hidden)[0]
        attended = self.kernels.attend(
            qkv, layer.q_norm, layer.k_norm, layer.eps, self.rope, position, keys, values, length
        )
        return layer.finish(hidden, [attended[None]])


class GraphNextToken:
    """`NextToken` by replaying a graph of `TokenStep`, with AHEAD replays queued ahead of the stop test.

    The first token does not wait for the capture: the same step launched one kernel after the other gives it, while
    whatever is compiled on first use is compiled. Replays past the end only write rows of the cache that nobody reads.

    Args:
        start: the token that the first call will append.
        refused: told why the graph could not be captured. The step is then launched without one, to the same tokens.
    """

    AHEAD = 2

    def __init__(
        self,
        step: TokenStep,
        choose: TokenChoice,
        generator: torch.Generator,
        start: int,
        refused: Callable[[RuntimeError], None],
    ) -> None:
        self.step, self.choose, self.generator, self._refused = step, choose, generator, refused
        self._left = step.keys.shape[1] - step.length
        self._spare = [(torch.zeros(1, dtype=torch.int64).pin_memory(), torch.cuda.Event()) for _ in range(self.AHEAD)]
        self._queued: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._stream = torch.cuda.current_stream(step.bagel.device)
        self._host_chooses = choose.do_sample or step.table is None
        self._launch: Callable[[], None] | None = None
        step.append(start)
        step()
        self._left -= 1
        self._first: int | None = choose(step.logits, generator) if self._host_chooses else int(step.token)

    def __call__(self, token: int) -> int:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if self._launch is None:
            self._launch = self._captured()
        if self._host_chooses:
            self.step.append(token)
            self._launch()
            return self.choose(self.step.logits, self.generator)
        if not self._queued:
            self.step.append(token)
        while self._spare and self._left:
            self._replay(self._launch)
        host, read = self._queued.popleft()
        read.synchronize()
        self._spare.append((host, read))
        return int(host)

    def _captured(self) -> Callable[[], None]:
        """What launches the step from now on."""
        launch: Callable[[], None] = self.step
        try:
            memory = self.step.kernels.memory
            launch = captured(self.step.bagel.device, self.step, self._warm_up, memory).replay
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._refused(error)
        self.step.reset(appended=1)
        return launch

    def _warm_up(self) -> None:
        """On the stream of the capture, where libraries have memory of their own."""
        self.step()
        self.step.reset(appended=1)

    def _replay(self, launch: Callable[[], None]) -> None:
        host, read = self._spare.pop()
        launch()
        host.copy_(self.step.token, non_blocking=True)
        read.record(self._stream)
        self._queued.append((host, read))
        self._left -= 1


def why_not_graph(bagel: Bagel, view: SequenceView) -> str | None:
    """None where text can be decoded by a graph, else the reason."""
    if bagel.device.type != "cuda":
        return f"needs a CUDA GPU, not {bagel.device.type}"
    if not isinstance(bagel.decoder.source, ResidentLayers):
        return "weights are streamed"
    if len(view.spans) != 1:
        return "the context is not one range"
    return None

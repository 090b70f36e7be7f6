"""Text decoding, one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import AttentionBackend, Causal
from ..context import AppendAttention, Context
from ..model.bagel import Bagel
from ..model.decoder import Part


@dataclass(frozen=True)
class TokenChoice:
    """Greedy, or a draw from the softmax at `temperature` among the smallest set of tokens with mass `top_p`."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0

    def __call__(self, logits: Tensor, generator: torch.Generator) -> int:
        """logits: [vocab_size]; the generator is on the CPU, so that a seed means the same everywhere."""
        if not self.do_sample:
            return int(logits.argmax())
        probabilities = (logits.float().cpu() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            probabilities = probabilities.index_fill(0, order[beyond], 0)
        return int(torch.multinomial(probabilities, 1, generator=generator))


def append_text(bagel: Bagel, context: Context, ids: Tensor, backend: AttentionBackend) -> Tensor:
    """Append text tokens (int64 [T]) to a context; returns their hidden states before the final norm, [1, T, h]."""
    count = ids.shape[0]
    positions = torch.arange(context.position, context.position + count)[None]
    part = Part("und", bagel.embed_text(ids)[None], bagel.rope(positions))
    span = context.append(count, count)
    hidden: Tensor = bagel.decoder([part], AppendAttention(context, span, backend, Causal()))[0]
    return hidden


def decode_text(
    bagel: Bagel,
    context: Context,
    start: int,
    stop: int,
    max_tokens: int,
    choose: TokenChoice,
    generator: torch.Generator,
    backend: AttentionBackend,
    on_token: Callable[[int, int], None],
) -> list[int]:
    """Generate from the `start` id until `stop` or until there are `max_tokens` ids, the first one counted.

    Returns the ids, `start` first and `stop` left out. The tokens' keys stay in the context. `on_token` gets each
    new id and the count so far.
    """
    ids = [start]
    while len(ids) < max_tokens:
        hidden = append_text(bagel, context, torch.tensor(ids[-1:]), backend)
        token = choose(bagel.logits(hidden[:, -1:])[0, 0], generator)
        if token == stop:
            break
        ids.append(token)
        on_token(token, len(ids))
    return ids

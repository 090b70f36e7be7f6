"""Text decoding, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..model.bagel import Bagel
from ..model.decoder import Part
from ..model.kv_cache import AppendAttention, SequenceView
from ..ops.attention.base import AttentionBackend, Causal


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


@dataclass(frozen=True, kw_only=True)
class Forced(TokenChoice):
    """Chooses tokens that are known, whatever is likely; `left` are those to come, and is used up."""

    left: Iterator[int]
    do_sample: bool = True  # by the host, which knows them

    def __call__(self, logits: Tensor, generator: torch.Generator) -> int:
        return next(self.left)


def append_text(bagel: Bagel, view: SequenceView, ids: Tensor, backend: AttentionBackend) -> Tensor:
    """Append text tokens (int64 [T]) to a view; returns their hidden states before the final norm, [1, T, h]."""
    count = ids.shape[0]
    positions = torch.arange(view.position, view.position + count)[None]
    part = Part("und", bagel.embed_text(ids)[None], bagel.rope(positions))
    span = view.append(count, count)
    hidden: Tensor = bagel.decoder([part], AppendAttention(view, span, backend, Causal()))[0]
    return hidden


class NextToken(Protocol):
    """Appends a token to the view that it was made for and chooses the one after it."""

    def __call__(self, token: int) -> int: ...


class EagerNextToken:
    """By the ordinary forward of the model: works with any weights, anywhere."""

    def __init__(
        self, bagel: Bagel, view: SequenceView, backend: AttentionBackend,
        choose: TokenChoice, generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.bagel, self.view, self.backend = bagel, view, backend
        self.choose, self.generator = choose, generator

    def __call__(self, token: int) -> int:
        hidden = append_text(self.bagel, self.view, torch.tensor([token]), self.backend)
        return self.choose(self.bagel.logits(hidden[:, -1:])[0, 0], self.generator)


class Started:
    """`NextToken` after a start that was appended already: its first token is the one after that start.

    Args:
        first: chooses that token.
        others: makes what gives the tokens after it, from the first of them on. Called when the first one is out: it
            takes as long as a token or two.
    """

    def __init__(self, first: Callable[[], int], others: Callable[[int], NextToken]) -> None:
        self._first: Callable[[], int] | None = first
        self._others = others
        self._next: NextToken | None = None

    def __call__(self, token: int) -> int:
        if self._first is not None:
            first, self._first = self._first, None
            return first()
        if self._next is None:
            self._next = self._others(token)
        return self._next(token)


@dataclass(frozen=True)
class Decoded:
    """Ids that were generated, the start first; and what ended them, None where there were as many as there may be."""

    ids: list[int]
    stop: int | None

    @property
    def appended(self) -> int:
        """How many of them are in the context: the last one is appended by who asks what follows it."""
        return len(self.ids) if self.stop is not None else max(1, len(self.ids) - 1)


def decode_text(
    next_token: NextToken, start: int, stops: Container[int], max_tokens: int, on_token: Callable[[int, int], None]
) -> Decoded:
    """Generate from the `start` id until one of `stops` or until there are `max_tokens` ids, the first one counted.

    What stops is left out of the ids. `on_token` gets each new id and the count so far.
    """
    ids = [start]
    while len(ids) < max_tokens:
        token = next_token(ids[-1])
        if token in stops:
            return Decoded(ids, token)
        ids.append(token)
        on_token(token, len(ids))
    return Decoded(ids, None)

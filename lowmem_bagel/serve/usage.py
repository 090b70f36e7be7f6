"""How many tokens a request is, as clients are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..settings import TextSettings
from .service import Loaded

if TYPE_CHECKING:
    from ..generation.chat import PreparedTurn
    from ..generation.inputs import Prepared


class Tokens(NamedTuple):
    """Of a request's texts and pictures."""

    text: int
    pictures: int

    @property
    def total(self) -> int:
        return self.text + self.pictures


def tokens_of(loaded: Loaded, prepared: Prepared | PreparedTurn) -> Tokens:
    """What a request is to the model; no picture is resized for it."""
    from ..generation.inputs import TextBlock, read_terms  # which need torch, and routes are there before it

    model, drawing = loaded.pipeline.model, not isinstance(prepared.settings, TextSettings)
    blocks = read_terms(prepared.terms, model.folder.config, model.tokenizer, drawing)
    texts = sum(block.tokens for block in blocks if isinstance(block, TextBlock))
    return Tokens(texts, sum(block.tokens for block in blocks) - texts)

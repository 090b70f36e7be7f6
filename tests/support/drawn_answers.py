"""A model that asks for pictures, whatever it finds likely: a stand-in for one that was trained to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowmem_bagel.checkpoint.tokenizer import BagelTokenizer
from lowmem_bagel.sampling.text import TokenChoice

WORDS = ("a red circle is drawn", "it is red")


def answers_with_pictures(
    monkeypatch: pytest.MonkeyPatch, tokenizer: BagelTokenizer, words: Sequence[str] = WORDS
) -> None:
    """Each answer is these texts in turn, with a picture between; any number of answers."""
    texts = [tokenizer.encode(text) for text in words]
    ends = [*[tokenizer.vision_start] * (len(texts) - 1), tokenizer.im_end]
    answer = [token for text, end in zip(texts, ends, strict=True) for token in (*text, end)]
    at = [0]

    def choose(choice: TokenChoice, logits: Tensor, generator: torch.Generator) -> int:
        at[0] += 1
        return answer[(at[0] - 1) % len(answer)]

    monkeypatch.setattr(TokenChoice, "__call__", choose)

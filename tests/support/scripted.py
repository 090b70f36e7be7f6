"""Tokens that are chosen by a script, whatever a model finds likely."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowmem_bagel.sampling.text import TokenChoice


class Script:
    """Replaces `TokenChoice`: the tokens to come, and the logits that they were chosen from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        self.logits: list[Tensor] = []

        def choose(choice: TokenChoice, logits: Tensor, generator: torch.Generator) -> int:
            self.logits.append(logits.clone())
            return self.tokens.pop(0)

        monkeypatch.setattr(TokenChoice, "__call__", choose)

    def say(self, *tokens: int | Sequence[int]) -> None:
        """The next tokens; what was left is forgotten, and so are the logits."""
        self.tokens = [one for some in tokens for one in ([some] if isinstance(some, int) else some)]
        self.logits = []

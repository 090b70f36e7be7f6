"""What attention of integers changes of whole pictures: the embedded checkpoint, with the kernel's reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from lowmem_bagel.benchmarks.demo.evaluate import evaluate_drawings, evaluate_edits
from lowmem_bagel.benchmarks.suites.accuracy import by_integers
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.kernels import attention_int8

LEVELS = 0.5
"""The mean difference of a picture in levels of 255, as of fp16 arithmetic."""


def test_drawings_and_edits_are_those_of_exact_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = BagelPipeline.from_pretrained(FOLDER, device="cpu", dtype="float32")
    settings: dict[str, Any] = {"num_timesteps": 8}
    calls: list[tuple[int, ...]] = []
    reference = attention_int8.attention_int8_reference

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((*q.shape, len(k)))
        return reference(q, k, v)

    exact = [evaluate_drawings(pipe, range(1), 7, settings), evaluate_edits(pipe, range(1), 7, settings)]
    monkeypatch.setattr(attention_int8, "attention_int8_reference", attend)
    pipe.model = replace(pipe.model, attention=by_integers(pipe.model.attention, pipe.model.device))
    found = [evaluate_drawings(pipe, range(1), 7, settings), evaluate_edits(pipe, range(1), 7, settings)]
    assert len(calls) > 6 * 8 * 2, "integers were not used"
    for now, before in zip(found, exact, strict=True):
        assert now.right == before.right == now.total
        for picture, other in zip(now.pictures, before.pictures, strict=True):
            assert 0 < np.abs(picture.astype(np.int16) - other).mean() < LEVELS

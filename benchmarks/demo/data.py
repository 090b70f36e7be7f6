"""Training data as arrays: scenes, their edits and tokenised sentences, grouped by picture size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .draw import Canvas, scene_rows
from .scenes import CANVASES, training_edit, training_scene
from .sentences import TRAINED_RELATED, caption, instruction, question
from .tokens import SPECIAL

CANVAS_SHARES = (0.8, 0.1, 0.1)
"""Share of each of `CANVASES` in the data and in every batch."""
CAPTIONS, INSTRUCTIONS, QUESTIONS = 2, 2, 3
"""Sentences per scene."""
CAPTION_TOKENS, INSTRUCTION_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 30, 18, 16, 22
"""Room for each kind of text, im_start and im_end included."""
_CHUNK = 2000


@dataclass(frozen=True)
class Examples:
    """N scenes of one picture size. Texts are padded with <|endoftext|> on the right."""

    canvas: Canvas
    source: NDArray[np.float32]
    """[N, ROW] of `draw.scene_rows`."""
    target: NDArray[np.float32]
    """[N, ROW]: the source after the edit that `instructions` order."""
    captions: NDArray[np.int16]
    """[N, CAPTIONS, CAPTION_TOKENS], of the source."""
    instructions: NDArray[np.int16]
    """[N, INSTRUCTIONS, INSTRUCTION_TOKENS]."""
    questions: NDArray[np.int16]
    """[N, QUESTIONS, QUESTION_TOKENS], about the source."""
    answers: NDArray[np.int16]
    """[N, QUESTIONS, ANSWER_TOKENS]."""

    def __len__(self) -> int:
        return len(self.source)


def make_examples(count: int, tokenizer_file: Path, seed: int, workers: int) -> list[Examples]:
    """About `count` examples in all, one entry per canvas; the same for the same count and seed."""
    jobs = [
        (canvas, min(_CHUNK, total - start), seed * 1_000_003 + start * 10 + index, tokenizer_file)
        for index, (canvas, share) in enumerate(zip(CANVASES, CANVAS_SHARES, strict=True))
        for total in [max(1, round(count * share))]
        for start in range(0, total, _CHUNK)
    ]
    parts: dict[tuple[int, int], list[Examples]] = {canvas: [] for canvas in CANVASES}
    for part in _map(jobs, workers):
        parts[part.canvas.height, part.canvas.width].append(part)
    return [_join(parts[canvas]) for canvas in CANVASES]


def _map(jobs: Sequence[tuple[tuple[int, int], int, int, Path]], workers: int) -> Iterator[Examples]:
    if workers <= 1:
        yield from map(_make_part, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_make_part, jobs)


def _make_part(job: tuple[tuple[int, int], int, int, Path]) -> Examples:
    from tokenizers import Tokenizer

    canvas, count, seed, tokenizer_file = job
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    rng = Random(seed)
    sources = [training_scene(rng, canvas) for _ in range(count)]
    edits = [training_edit(rng, scene) for scene in sources]
    captions = [[caption(rng, s, TRAINED_RELATED).text for _ in range(CAPTIONS)] for s in sources]
    asked = [[question(rng, scene) for _ in range(QUESTIONS)] for scene in sources]
    return Examples(
        Canvas(*canvas),
        scene_rows(sources),
        scene_rows([edit.target for edit in edits]),
        pad_texts(tokenizer, captions, CAPTION_TOKENS),
        pad_texts(tokenizer, [[instruction(rng, e) for _ in range(INSTRUCTIONS)] for e in edits], INSTRUCTION_TOKENS),
        pad_texts(tokenizer, [[q.text for q in qs] for qs in asked], QUESTION_TOKENS),
        pad_texts(tokenizer, [[q.answer for q in qs] for qs in asked], ANSWER_TOKENS),
    )


def pad_texts(tokenizer: Any, texts: list[list[str]], room: int) -> NDArray[np.int16]:
    """int16 [len(texts), len(texts[0]), room]: im_start, the text's ids, im_end, then <|endoftext|>."""
    pad, start, end = (tokenizer.token_to_id(t) for t in SPECIAL[:3])
    out = np.full((len(texts), len(texts[0]), room), pad, np.int16)
    encoded = iter(tokenizer.encode_batch([text for row in texts for text in row], add_special_tokens=False))
    for row in out:
        for slot in row:
            ids = [start, *next(encoded).ids, end]
            assert len(ids) <= room, f"a text of {len(ids)} tokens, and room for {room}"
            slot[: len(ids)] = ids
    return out


def _join(parts: list[Examples]) -> Examples:
    fields = ("source", "target", "captions", "instructions", "questions", "answers")
    return Examples(parts[0].canvas, *(np.concatenate([getattr(p, f) for p in parts]) for f in fields))

"""Training data as arrays: pictures as rows of `draw.scene_rows` and tokenised sentences, by kind and picture size.

A kind of example is one entry of `KINDS`: pictures and texts by name. Tasks (`mixture`) take what they need of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import clips
from .draw import Canvas, scene_rows
from .scenes import CANVASES, Scene, training_edit, training_scene
from .sentences import TRAINED_RELATED, caption, description, instruction, question, request
from .tokens import SPECIAL

CAPTION_TOKENS, INSTRUCTION_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 30, 18, 16, 22
"""Room for each kind of text, im_start and im_end included."""
REQUEST_TOKENS, CLIP_TOKENS, NEXT_TOKENS, VIEW_TOKENS, BOTH_VIEWS_TOKENS, VIEWS_CAPTION_TOKENS = 48, 62, 44, 24, 32, 52
"""Rooms that make every task's context a multiple of 8 tokens, as the attention kernel's mask must be."""
_CHUNK = 2000


@dataclass(frozen=True)
class Example:
    """Scenes by name, and for each name of text some wordings. Wordings of several names that belong together (a
    question and its answer) have the same place."""

    pictures: Mapping[str, Scene]
    texts: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Kind:
    """A kind of example: `canvases` with the share of each, the tokens that its texts have room for, and what makes
    one."""

    canvases: Mapping[tuple[int, int], float]
    rooms: Mapping[str, int]
    make: Callable[[Random, tuple[int, int]], Example]


def _scene(rng: Random, canvas: tuple[int, int]) -> Example:
    """A scene, an edit of it, and what is said of both."""
    scene = training_scene(rng, canvas)
    edit = training_edit(rng, scene)
    asked = [question(rng, scene) for _ in range(3)]
    wanted = [request(rng, scene) for _ in range(2)]
    return Example(
        {"source": scene, "target": edit.target},
        {
            "captions": [caption(rng, scene, TRAINED_RELATED).text for _ in range(2)],
            "instructions": [instruction(rng, edit) for _ in range(2)],
            "questions": [q.text for q in asked],
            "answers": [q.answer for q in asked],
            "requests": [text for _, _, text in wanted],
            "plans": [description(scene)] * 2,
            "replies": [q.answer for _, q, _ in wanted],
        },
    )


def _clip(rng: Random, canvas: tuple[int, int]) -> Example:
    """All frames of a clip, what tells it from its beginning, and what asks for its continuation."""
    clip = clips.training_clip(rng)
    return Example(
        {f"frame{number}": clip.frame(number) for number in range(clips.FRAMES)},
        {
            "captions": [clips.clip_caption(rng, clip) for _ in range(2)],
            "orders": [clips.order_to_continue(rng, clip, named) for named in (False, True)],
        },
    )


def _view(rng: Random, canvas: tuple[int, int]) -> Example:
    """A scene from the front and from two other sides."""
    scene, views = clips.training_view(rng)
    first, second = (clips.seen_from(scene, view) for view in views)
    return Example(
        {"front": scene, "first": first, "second": second},
        {
            "view": [clips.order_to_view(rng, views[:1]) for _ in range(2)],
            "views": [clips.order_to_view(rng, views) for _ in range(2)],
            "captions": [clips.views_caption(rng, scene, views[0])[1] for _ in range(2)],
        },
    )


SQUARE = {(clips.SIDE, clips.SIDE): 1.0}
KINDS: dict[str, Kind] = {
    "scenes": Kind(
        dict(zip(CANVASES, (0.8, 0.1, 0.1), strict=True)),
        {
            "captions": CAPTION_TOKENS, "instructions": INSTRUCTION_TOKENS, "questions": QUESTION_TOKENS,
            "answers": ANSWER_TOKENS, "requests": REQUEST_TOKENS, "plans": ANSWER_TOKENS, "replies": ANSWER_TOKENS,
        },
        _scene,
    ),
    "clips": Kind(SQUARE, {"captions": CLIP_TOKENS, "orders": NEXT_TOKENS}, _clip),
    "views": Kind(
        SQUARE, {"view": VIEW_TOKENS, "views": BOTH_VIEWS_TOKENS, "captions": VIEWS_CAPTION_TOKENS}, _view
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """N examples of one kind and picture size. Texts are padded with <|endoftext|> on the right."""

    kind: str
    canvas: Canvas
    pictures: dict[str, NDArray[np.float32]]
    """[N, ROW] each, of `draw.scene_rows`."""
    texts: dict[str, NDArray[np.int16]]
    """[N, wordings, room] each."""

    def __len__(self) -> int:
        return len(next(iter(self.pictures.values())))


_Job = tuple[str, tuple[int, int], int, int, Path]


def make_examples(counts: Mapping[str, int], tokenizer_file: Path, seed: int, workers: int) -> list[Examples]:
    """About so many examples of each kind, one entry per kind and canvas; the same for the same counts and seed."""
    jobs = [
        (kind, canvas, min(_CHUNK, total - start), seed * 1_000_003 + start * 100 + 10 * place + index, tokenizer_file)
        for place, kind in enumerate(counts)
        for index, (canvas, share) in enumerate(KINDS[kind].canvases.items())
        for total in [max(1, round(counts[kind] * share))]
        for start in range(0, total, _CHUNK)
    ]
    parts: dict[tuple[str, Canvas], list[Examples]] = {}
    for part in _map(jobs, workers):
        parts.setdefault((part.kind, part.canvas), []).append(part)
    return [_join(group) for group in parts.values()]


def _map(jobs: Sequence[_Job], workers: int) -> Iterator[Examples]:
    if workers <= 1:
        yield from map(_make_part, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_make_part, jobs)


def _make_part(job: _Job) -> Examples:
    from tokenizers import Tokenizer

    kind, canvas, count, seed, tokenizer_file = job
    tokenizer, rng = Tokenizer.from_file(str(tokenizer_file)), Random(seed)
    made = [KINDS[kind].make(rng, canvas) for _ in range(count)]
    return Examples(
        kind,
        Canvas(*canvas),
        {name: scene_rows([example.pictures[name] for example in made]) for name in made[0].pictures},
        {
            name: pad_texts(tokenizer, [list(example.texts[name]) for example in made], room)
            for name, room in KINDS[kind].rooms.items()
        },
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
    first = parts[0]
    pictures = {name: np.concatenate([part.pictures[name] for part in parts]) for name in first.pictures}
    texts = {name: np.concatenate([part.texts[name] for part in parts]) for name in first.texts}
    return Examples(first.kind, first.canvas, pictures, texts)

"""A question's pass in a fixed number of rows: what the ordinary forward gives, and the same bits by graphs."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from support.numeric import relative_l2
from support.paths import CHECKPOINT
from support.pictures import noise
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.generation.inputs import Contexts, TextBlock
from lowmem_bagel.model.kv_cache import SequenceView
from lowmem_bagel.ops.device import GraphMemory
from lowmem_bagel.sampling.short_pass import MOST_ROWS, ShortPass, ShortPasses, rows_for
from lowmem_bagel.sampling.text import append_text

QUESTIONS = ("what is it?", "which color is the largest part of it, and what is beside that?")


class Graph:
    """In place of a CUDA graph: what was launched while it was captured is launched again."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self.replay = launch


@pytest.fixture
def by_graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Captures on the processor; what was captured."""
    made: list[str] = []

    def captured(
        device: torch.device, launch: Callable[[], None], warm_up: Callable[[], None], _: GraphMemory
    ) -> Graph:
        made.append("captured")
        warm_up()
        return Graph(launch)

    monkeypatch.setattr("lowmem_bagel.sampling.short_pass.captured", captured)
    return made


def loaded(dtype: str = "float32", device: str = "cpu") -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device=device, dtype=dtype, tasks=("ask",), context_store="auto")
    pipe.model.short_passes = ShortPasses(pipe.model.bagel)
    return pipe


def after_a_text(pipe: BagelPipeline) -> SequenceView:
    block = TextBlock(tuple(pipe.model.tokenizer.text_block("the quick brown fox")))
    made = Contexts(pipe.model, [block], 0, image_branch=False, spare=2 * MOST_ROWS)
    made.append(block, torch.Generator())
    for cache in (made.kv_cache.keys, made.kv_cache.values):  # what nothing was written to may be anything
        cache[:, made.full.spans[0].stop :] = torch.nan
    return made.full


def ids_of(count: int) -> Tensor:
    return torch.arange(count) % 50 + 3


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 3e-3), ("bfloat16", 4e-2)])
def test_short_passes_give_what_the_ordinary_one_gives(dtype: str, bound: float, by_graphs: list[str]) -> None:
    """One after the other, shorter and longer: rows that others left, even such as are no numbers, change nothing."""
    pipe = loaded(dtype)
    bagel, backend = pipe.model.bagel, pipe.model.attention
    with torch.inference_mode():
        short, ordinary, given = ShortPass(bagel, 16), after_a_text(pipe), after_a_text(pipe)
        for count in (16, 5, 9):
            wanted = append_text(bagel, ordinary, ids_of(count), backend)
            short.hidden[:, count:] = torch.nan
            found = short(ids_of(count), given, backend)
            assert relative_l2(found, wanted) < bound
            assert (given.position, given.spans) == (ordinary.position, ordinary.spans)
        for ours, theirs in ((given.kv_cache.keys, ordinary.kv_cache.keys),
                             (given.kv_cache.values, ordinary.kv_cache.values)):  # fmt: skip
            written = slice(given.spans[0].start, given.spans[0].stop)
            assert relative_l2(ours[:, written], theirs[:, written]) < bound
            assert ours[:, written.stop :].isnan().all(), "no row beyond the text is written"
        again = after_a_text(pipe)
        launched = [short(ids_of(count), again, backend) for count in (16, 5, 9)]
        short.capture(GraphMemory())
        assert len(by_graphs) == len(bagel.decoder.layers) + 1
        again = after_a_text(pipe)
        assert all(short(ids_of(len(out[0])), again, backend).equal(out) for out in launched)


def test_which_texts_are_short() -> None:
    assert [rows_for(count) for count in (1, 2, 16, 17, 33, 64, 65)] == [None, 16, 16, 32, 64, 64, None]


def test_a_second_question_goes_by_graphs_to_the_same_bits(by_graphs: list[str]) -> None:
    shown = Image.fromarray(noise(64, 64))
    pipe = loaded()
    wanted = []
    for question in QUESTIONS:
        store = pipe.model.context_store
        assert store is not None
        store.clear()
        pipe.model.short_passes = ShortPasses(pipe.model.bagel)  # nothing is kept and nothing captured
        wanted.append(pipe.ask(question, shown, max_new_tokens=4).token_ids)
    by_graphs.clear()
    pipe.model.step_kernels = MagicMock()  # what decides whether anything can be captured
    pipe.model.short_passes = ShortPasses(pipe.model.bagel)
    for question, ids in list(zip(QUESTIONS, wanted, strict=True)) * 2:
        assert pipe.ask(question, shown, max_new_tokens=4).token_ids == ids
    assert len(by_graphs) == 2 * (len(pipe.model.bagel.decoder.layers) + 1), "once for each number of rows"


def test_a_capture_that_fails_is_told_and_the_answer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("lowmem_bagel.sampling.short_pass.captured", refuse)
    pipe = loaded()
    wanted = pipe.ask(QUESTIONS[0], max_new_tokens=4).token_ids
    pipe.model.step_kernels = MagicMock()
    assert pipe.ask(QUESTIONS[0], max_new_tokens=4).token_ids == wanted
    assert pipe.model.plan.reasons["questions by graph"] == "cannot be captured: full"
    assert pipe.model.short_passes is None


def test_without_kept_contexts_nothing_is_captured(by_graphs: list[str]) -> None:
    pipe = loaded()
    pipe.model.context_store, pipe.model.step_kernels = None, MagicMock()
    pipe.ask(QUESTIONS[0], max_new_tokens=4)
    assert by_graphs == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_graphs_of_a_card_give_the_bits_of_the_launches(dtype: str) -> None:
    pipe = loaded(dtype, "cuda")
    bagel, backend = pipe.model.bagel, pipe.model.attention
    with torch.inference_mode():
        short, views = ShortPass(bagel, 16), [after_a_text(pipe) for _ in range(3)]
        counts = (16, 5, 9)
        launched = [short(ids_of(count), views[0], backend) for count in counts]
        ordinary = [append_text(bagel, views[1], ids_of(count), backend) for count in counts]
        short.capture(GraphMemory())
        for count, out, wanted in zip(counts, launched, ordinary, strict=True):
            assert short(ids_of(count), views[2], backend).equal(out)
            assert relative_l2(out, wanted) < {"float32": 1e-4, "float16": 3e-3, "bfloat16": 4e-2}[dtype]


@pytest.mark.gpu
def test_on_a_card_second_questions_are_the_same_to_the_bit() -> None:
    shown = Image.fromarray(noise(64, 64))
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cuda", tasks=("ask",), context_store="auto")
    store = pipe.model.context_store
    assert store is not None and pipe.model.short_passes is not None
    first = [pipe.ask(question, shown, max_new_tokens=24).token_ids for question in QUESTIONS]
    assert "questions by graph" not in pipe.model.plan.reasons
    assert all(made.is_captured for made in pipe.model.short_passes._passes.values())
    assert [pipe.ask(question, shown, max_new_tokens=24).token_ids for question in QUESTIONS] == first
    store.clear()
    assert [pipe.ask(question, shown, max_new_tokens=24).token_ids for question in QUESTIONS] == first

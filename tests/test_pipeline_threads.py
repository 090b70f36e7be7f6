"""One pipeline used by several threads, and after it was closed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
import torch
from support.threads import at_once

from lowmem_bagel import BagelPipeline, Result
from lowmem_bagel.errors import PipelineClosedError, SettingError, UserError

DRAWING = {"height": 32, "width": 48, "num_timesteps": 4}


@pytest.fixture
def pipe(reference_checkpoint: Path) -> BagelPipeline:
    """One of its own: it is closed."""
    return BagelPipeline.from_pretrained(reference_checkpoint, device="cpu", dtype="float32")


def requests(pipe: BagelPipeline) -> list[Callable[[], Result]]:
    """Of both kinds, and of different shapes."""
    return [
        lambda: pipe.generate("a red circle", seed=1, **DRAWING),
        lambda: pipe.generate("a blue square", seed=2, **DRAWING | {"height": 64}),
        lambda: pipe.ask("what is it?", max_new_tokens=6),
        lambda: pipe.generate("a red circle", seed=3, **DRAWING),
    ]


def told(result: Result) -> object:
    return result.token_ids if result.latent is None else result.latent.tolist()


def test_threads_get_what_they_get_one_after_the_other(pipe: BagelPipeline) -> None:
    wanted = [told(request()) for request in requests(pipe)]
    assert [told(result) for result in at_once(requests(pipe))] == wanted


def test_a_second_request_waits(pipe: BagelPipeline) -> None:
    """Requests never overlap, or the memory that they share would hold one's weights while the other multiplies."""
    steps: list[int] = []

    def draw(seed: int) -> None:
        pipe.generate("a red circle", seed=seed, callback=lambda _: steps.append(seed), **DRAWING)

    at_once([lambda seed=seed: draw(seed) for seed in range(3)])
    assert sorted(steps) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [seed for seed, _ in groupby(steps)] == list(dict.fromkeys(steps))


def test_closing_waits_for_the_request_that_runs(pipe: BagelPipeline) -> None:
    """And those that still waited are told."""
    started, closing = threading.Event(), threading.Event()

    def step(_: object) -> None:
        started.set()
        closing.wait(20)

    def draw() -> object:
        return pipe.generate("a red circle", seed=1, callback=step, **DRAWING).latent

    def close() -> None:
        started.wait(20)
        threading.Timer(0.2, closing.set).start()
        pipe.close()

    drawn, _ = at_once([draw, close])
    assert isinstance(drawn, torch.Tensor) and drawn.isfinite().all()
    with pytest.raises(PipelineClosedError):
        draw()


def test_after_closing_every_use_says_so(pipe: BagelPipeline, tmp_path: Path) -> None:
    picture = pipe.generate("a red circle", seed=1, **DRAWING).image
    pipe.close()
    pipe.close()
    uses: list[Callable[[], Result]] = [
        lambda: pipe.generate("a", **DRAWING), lambda: pipe.ask("a"), lambda: pipe.edit(picture, "a"),
        lambda: pipe.run(["a", picture]),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(PipelineClosedError, match="this pipeline was closed and its memory given back") as raised:
            use()
        assert isinstance(raised.value, UserError)


def test_closing_from_several_threads(pipe: BagelPipeline) -> None:
    assert at_once([pipe.close] * 3) == [None] * 3


def test_a_callback_cannot_use_its_own_pipeline(pipe: BagelPipeline) -> None:
    for use in (pipe.close, lambda: pipe.ask("what?")):
        with pytest.raises(SettingError, match="callback"):
            pipe.generate("a red circle", callback=lambda _, use=use: use(), **DRAWING)
    assert pipe.generate("a red circle", **DRAWING).image is not None, "it is as it was"

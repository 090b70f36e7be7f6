"""The demo checkpoint of frames: what it has learnt beside stills, through the pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lowmem_bagel.benchmarks.demo import evaluate

from lowmem_bagel import BagelPipeline
from lowmem_bagel.demo_checkpoint import FRAMES


@pytest.fixture(scope="module")
def taught() -> Iterator[BagelPipeline]:
    pipe = BagelPipeline.from_pretrained(FRAMES, device="cpu", dtype="float32")
    yield pipe
    pipe.close()


def test_frames_after_those_that_are_shown_go_on_as_they_do(taught: BagelPipeline) -> None:
    tally = evaluate.TASKS["future-unguided"](taught, range(4), 2026, {"num_timesteps": 4})
    assert tally.marks["within"] >= 3  # the checkpoint without frames gets two


def test_a_picture_comes_in_the_middle_of_an_answer(taught: BagelPipeline) -> None:
    asked = "a blue circle on a yellow background. Which color is the background?"
    answer = taught.converse([asked], num_timesteps=4, max_new_tokens=24)
    assert len(answer.images) == 1
    assert answer.texts[-1] == "yellow"

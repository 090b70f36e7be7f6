"""Frames in a plan: what they take is what the pipeline makes of them, and more of them take more."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from support.pictures import noise

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import DoesNotFitError
from lowmem_bagel.hardware.profile import HardwareProfile
from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.kv_cache import KVCache
from lowmem_bagel.planner.estimate import drawing_workload
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.plan import Plan
from lowmem_bagel.planner.solve import Limits, Request, breakdown, make_plan
from lowmem_bagel.planner.workload import most_frames
from lowmem_bagel.settings import picture_settings

CARD = HardwareProfile.hypothetical(12, (8, 9), 64, 25, name="RTX 4070")
SMALL: dict[str, Any] = {"height": 512, "width": 512}


def planned(**asked: Any) -> tuple[Plan, dict[str, Any]]:
    facts, request = ModelFacts.of_shape("int8"), Request(tasks=("generate",), **SMALL, **asked)
    plan = make_plan(facts, CARD, Limits(), request)
    return plan, {row.phase: row for row in breakdown(plan, facts, CARD, Limits(), request)}


@pytest.mark.parametrize("mode", ["together", "turn"])
def test_more_frames_take_more_of_everything(mode: str) -> None:
    plans = [planned(frames=count, frame_mode=mode) for count in (1, 2, 8)]
    seconds = [plan.prediction.seconds for plan, _ in plans if plan.prediction is not None]
    keys = [phases["denoise"].arena for _, phases in plans]
    assert seconds == sorted(set(seconds)) and seconds[2] > 6 * seconds[0]
    assert keys == sorted(set(keys))
    # Of frames in turn one is drawn at a time, and the contexts stay while it is decoded.
    drawing = [phases["denoise"].activations for _, phases in plans]
    assert (drawing[2] > 6 * drawing[0]) == (mode == "together")
    assert (plans[2][1]["decode"].arena > 0) == (mode == "turn")
    # Pictures are decoded one by one.
    assert plans[2][1]["decode"].activations == plans[0][1]["decode"].activations


@pytest.mark.parametrize("given", [
    {"frames": 3}, {"frames": 3, "frame_mode": "turn"}, {"frames": 3, "frame_mode": "turn", "cfg_img_scale": 1.0},
    {"frames": 2, "frame_mode": "turn", "cfg_text_scale": 1.0}, {"frames": 3, "height": 64, "width": 32},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("pictures", [0, 2])
def test_keys_are_as_many_as_the_pipeline_takes(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], pictures: int
) -> None:
    taken: list[int] = []

    def counted(bagel: Bagel, capacity: int) -> KVCache:
        taken.append(capacity)
        return KVCache(bagel.config.decoder, capacity, bagel.dtype, bagel.device)

    monkeypatch.setattr(Bagel, "kv_cache", counted)
    model, sizes = small_pictures.model, [(40 + 16 * i, 56) for i in range(pictures)]
    given = {"height": 32, "width": 48, "num_timesteps": 2, "seed": 0} | given
    terms = [*(Image.fromarray(noise(height, width)) for width, height in sizes), "a circle"]
    small_pictures.run(terms, **given)
    settings = picture_settings(model.folder.config, model.folder.max_side, bool(pictures), given, pytest.fail)
    text = len(model.tokenizer.text_block("a circle"))
    workload = drawing_workload(model.folder.config, settings, sizes, text)
    # Of the texts alone the planner counts what is before the first picture too: here there is nothing.
    assert workload.cached_tokens == taken[0]


def test_seconds_of_frames_in_turn_count_each_frame_s_look(small_pictures: BagelPipeline) -> None:
    one, two = (planned(frames=count, frame_mode="turn")[0] for count in (1, 3))
    assert one.prediction is not None and two.prediction is not None
    assert two.prediction.seconds > 3 * one.prediction.seconds  # their contexts grow, and are encoded


def test_a_plan_that_cannot_hold_frames_says_how_many_it_could() -> None:
    limits = Limits(max_vram=6_000_000_000)
    asked = Request(tasks=("generate",), height=1024, width=1024, frames=500)
    facts = ModelFacts.of_shape("int8")
    with pytest.raises(DoesNotFitError, match=r"500 frames at 1024x1024: .* plan for (\d+) frames?") as failure:
        make_plan(facts, CARD, limits, asked)
    most = int(str(failure.value).split("plan for ")[1].split()[0])
    fitting = Request(tasks=("generate",), frames=most)
    assert make_plan(facts, CARD, limits, fitting).prediction is not None
    with pytest.raises(DoesNotFitError):
        make_plan(facts, CARD, limits, Request(tasks=("generate",), frames=most + 1))


@pytest.mark.parametrize("most", [0, 1, 7, 62, 63])
def test_the_most_that_fit_are_found(most: int) -> None:
    assert most_frames(lambda count: count <= most, 64) == most

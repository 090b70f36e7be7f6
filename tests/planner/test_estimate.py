"""How long a request is expected to take, said before it begins."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.command import Ran
from support.pictures import noise

from lowmem_bagel import BagelPipeline
from lowmem_bagel.cli.console import ANNOUNCED_SECONDS, Asked, announcement, duration, text_tokens
from lowmem_bagel.hardware.profile import HardwareProfile
from lowmem_bagel.planner.estimate import PlanInputs, answer_workload, drawing_workload, predicted_seconds
from lowmem_bagel.planner.facts import BAGEL_7B, ModelFacts
from lowmem_bagel.planner.memory import Workload
from lowmem_bagel.planner.plan import Plan
from lowmem_bagel.planner.several import make_plans
from lowmem_bagel.planner.solve import Limits, Request
from lowmem_bagel.settings import Task, picture_settings, text_settings

Cli = Callable[..., Ran]
PICTURE = (1024, 1024)
PROCESSOR = HardwareProfile(
    ram_total=256 << 30, ram_available=256 << 30, cpu_features=("avx2", "avx512f"), cores=1, cpu_name="a processor"
)


def inputs(machine: HardwareProfile = PROCESSOR, task: Task = "generate") -> PlanInputs:
    return PlanInputs(ModelFacts.of_shape("source"), machine, Limits(), Request(tasks=(task,)))


def planned(machine: HardwareProfile = PROCESSOR, task: Task = "generate") -> tuple[Plan, PlanInputs]:
    made_from = inputs(machine, task)
    return make_plans(made_from), made_from


def drawing(picture: tuple[int, int] | None = None, **settings: Any) -> Workload:
    checked = picture_settings(BAGEL_7B, 1024, picture is not None, settings, pytest.fail)
    return drawing_workload(BAGEL_7B, checked, [picture] if picture else [], Request().text_tokens)


def answering(picture: tuple[int, int] | None = PICTURE, **settings: Any) -> Workload:
    return answer_workload(BAGEL_7B, text_settings(settings), [picture] if picture else [], Request().text_tokens)


def seconds(workload: Workload) -> float:
    return sum(predicted_seconds(*planned(task=workload.task), workload).values())


@pytest.mark.parametrize("vram", [8, 141])
def test_the_request_planned_for_takes_as_long_as_planned(vram: int) -> None:
    machine = HardwareProfile.hypothetical(vram, (9, 0), 64, 25, name="H200")
    asked: dict[Task, Workload] = {
        "generate": drawing(), "edit": drawing(PICTURE), "ask": answering(max_new_tokens=Request().new_tokens),
    }  # fmt: skip
    for task, workload in asked.items():
        plan, made_from = planned(machine, task)
        assert plan.prediction is not None
        assert sum(predicted_seconds(plan, made_from, workload).values()) == plan.prediction.seconds, task


def test_more_to_compute_takes_longer() -> None:
    plain = seconds(drawing())
    for more in ({"num_timesteps": 60}, {"cfg_interval": (0.0, 1.0)}, {"think": True}):
        assert seconds(drawing(**more)) > plain, more
    less: tuple[dict[str, Any], ...] = (
        {"num_timesteps": 40}, {"height": 768}, {"width": 512}, {"cfg_text_scale": 1.0}, {"step_cache": "taylorseer"},
        {"cfg_interval": (0.9, 1.0)}, {"timestep_shift": 1.0},
    )  # fmt: skip
    for settings in less:
        assert seconds(drawing(**settings)) < plain, settings
    assert seconds(drawing(num_timesteps=99)) / plain == pytest.approx(2, rel=0.03), "98 steps for 49"
    assert seconds(drawing(PICTURE)) > seconds(drawing((512, 512))) > 0
    assert seconds(drawing(PICTURE, cfg_img_scale=1.0)) < seconds(drawing(PICTURE))


def test_answers_take_longer_with_a_picture_and_with_every_token() -> None:
    assert seconds(answering()) > seconds(answering((300, 300))) > seconds(answering(None))
    assert seconds(answering(max_new_tokens=100)) < seconds(answering(max_new_tokens=101))


def test_an_edit_is_as_large_as_its_picture_unless_asked_otherwise() -> None:
    assert drawing((2048, 1024)).grid == (512 // 16, 1024 // 16)
    assert drawing((640, 512), height=1024).grid == (1024 // 16, 640 // 16)


def test_threads_that_stay_idle_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(PROCESSOR, cores=64)
    plan, made_from = planned(machine)
    found = []
    for threads in (1, 4, 64, 100):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        found.append(sum(predicted_seconds(plan, made_from, drawing()).values()))
    assert found[0] > 3 * found[1] > found[2] == found[3]


class TestAnnouncement:
    def test_on_a_processor(self) -> None:
        line = announcement(*planned(), Asked(drawing(), "for 1024x1024 and 50 timesteps"))
        assert re.fullmatch(r"note: about \d+\.\d h on this processor, for 1024x1024 and 50 timesteps", line or "")

    def test_a_text_of_unknown_length(self) -> None:
        line = announcement(*planned(task="ask"), Asked(answering(max_new_tokens=300), "at most 300 of them"))
        assert line is not None
        found = re.fullmatch(
            r"note: about (.+) on this processor until the answer begins, then (0\.\d\d) tokens a second, "
            "at most 300 of them",
            line,
        )
        assert found
        plan, made_from = planned(task="ask")
        text = predicted_seconds(plan, made_from, answering(max_new_tokens=300))["text"]
        assert float(found[2]) == pytest.approx(300 / text, rel=0.05)
        thinking = announcement(*planned(), Asked(drawing(think=True), "for a picture"))
        assert thinking is not None
        assert re.search(r", for a picture, and at most \d+ (min|s) for the plan before it$", thinking)

    def test_skips_that_depend_on_the_picture(self) -> None:
        line = announcement(*planned(), Asked(drawing(step_cache="first-block"), "for a picture"))
        assert line is not None
        assert line.startswith("note: at most about ")

    def test_a_card_speaks_up_when_it_is_slow(self) -> None:
        asked = Asked(drawing(), "for a picture")
        quick = HardwareProfile.hypothetical(141, (9, 0), 64, 50, name="H200")
        assert announcement(*planned(quick), asked) is None
        slow = HardwareProfile.hypothetical(11, (6, 1), 64, 12, name="GTX 1080 Ti")
        plan, made_from = planned(slow)
        assert plan.prediction is not None and (plan.prediction.seconds or 0) > ANNOUNCED_SECONDS
        line = announcement(plan, made_from, asked)
        assert line == f"note: about {duration(plan.prediction.seconds or 0)} on GTX 1080 Ti, for a picture"


@pytest.mark.parametrize(
    ("count", "said"),
    [(0.001, "0.1 s"), (2.46, "2.5 s"), (9.96, "10 s"), (119, "119 s"), (720, "12 min"), (9000, "2.5 h")],
)
def test_durations(count: float, said: str) -> None:
    assert duration(count) == said


@pytest.mark.parametrize("prompt", ["a red fox in the snow", "x"])
def test_tokens_are_guessed_within_a_few(pipe: BagelPipeline, prompt: str) -> None:
    assert abs(text_tokens(prompt) - len(pipe.model.tokenizer.text_block(prompt))) <= 4


class TestCommands:
    """Told on stderr before anything is loaded, as a processor's user wants it."""

    def test_generate_edit_and_ask(
        self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pictures: BagelPipeline
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Image.fromarray(noise(40, 56)).save("in.png")
        model = ("--model", small_pictures.model.folder.path, "--device", "cpu")
        ran = cli("generate", "a red circle", "--height", 32, "--width", 48, "--num-timesteps", 3, "--json", *model)
        assert re.fullmatch(r"note: about \d+\.\d s on this processor, for 48x32 and 3 timesteps\n", ran.err)
        ran = cli("edit", "in.png", "make it red", "--num-timesteps", 4, "--json", *model)
        assert re.fullmatch(r"note: about \d+\.\d s on this processor, for 64x32 and 4 timesteps\n", ran.err)
        ran = cli("ask", "what is it?", "--image", "in.png", "--max-new-tokens", 5, *model)
        assert re.fullmatch(
            r"note: about \d+\.\d s on this processor until the answer begins, then \d+ tokens a second, "
            r"at most 5 of them\n",
            ran.err,
        )

    def test_accelerates_time_is_not_predicted(self, cli: Cli, reference_checkpoint: Path) -> None:
        model = ("--model", reference_checkpoint, "--device", "cpu")
        ran = cli("ask", "what?", "--max-new-tokens", 2, "--offload", "accelerate", *model)
        assert (ran.code, ran.err) == (0, "")

    def test_the_machine_is_looked_at_once(
        self, cli: Cli, monkeypatch: pytest.MonkeyPatch, reference_checkpoint: Path
    ) -> None:
        calls = []
        monkeypatch.setattr(
            "lowmem_bagel.planner.estimate.this_machine", lambda device: calls.append(device) or PROCESSOR
        )
        ran = cli("ask", "what?", "--max-new-tokens", 2, "--model", reference_checkpoint)
        assert (ran.code, calls) == (0, ["auto"])


def test_what_the_planner_counts_is_what_the_pipeline_computes(small_pictures: BagelPipeline) -> None:
    """Tokens and evaluations of an edit, as its settings and its picture have them."""
    config, max_side = small_pictures.model.folder.config, small_pictures.model.folder.max_side
    picture = Image.fromarray(noise(40, 56))
    given = {"num_timesteps": 12, "cfg_interval": (0.3, 0.9), "step_cache": "taylorseer", "seed": 0}
    workload = drawing_workload(config, picture_settings(config, max_side, True, given, pytest.fail), [picture.size], 8)
    result = small_pictures.edit(picture, "make it red", **given)
    assert result.latent is not None and result.image is not None
    assert workload.grid[0] * workload.grid[1] == result.latent.shape[0]
    assert (workload.grid[1] * config.token_pixels, workload.grid[0] * config.token_pixels) == result.image.size
    branches = workload.guided_branches
    assert workload.guided_steps * (branches - 1) + workload.steps == result.settings["evaluations_computed"]

"""Lines as jobs: which task is meant, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.paths import CHECKPOINT
from support.pictures import noise

from lowmem_bagel.batch.jobs import Checker, Job
from lowmem_bagel.batch.lines import read_lines
from lowmem_bagel.batch.loading import told_by
from lowmem_bagel.checkpoint.check_tensors import Lack
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import UserError
from lowmem_bagel.planner.facts import ModelFacts


@pytest.fixture
def checker(tmp_path: Path) -> Checker:
    Image.fromarray(noise()).save(tmp_path / "in.png")
    (tmp_path / "out" / "folder.png").mkdir(parents=True)
    folder = ModelFolder.open(CHECKPOINT)
    return Checker(folder, ModelFacts.of_folder(folder), tmp_path, tmp_path / "out")


def job_of(checker: Checker, **said: Any) -> Job:
    path = checker.beside / "jobs.jsonl"
    path.write_text(json.dumps({"prompt": "a", **said}))
    (line,) = read_lines(path)
    checker.look_at([line])
    return checker.job(line)


@pytest.mark.parametrize(
    ("said", "task"),
    [
        ({}, "generate"),
        ({"think": True}, "generate"),
        ({"num_timesteps": 3}, "generate"),
        ({"max_new_tokens": 3}, "ask"),
        ({"task": "ask"}, "ask"),
        ({"image": "in.png", "output": "x.png"}, "edit"),
        ({"image": "in.png", "cfg_text_scale": 2}, "edit"),
        ({"images": ["in.png", "in.png"], "task": "edit"}, "edit"),
        ({"image": "in.png", "do_sample": True}, "ask"),
        ({"image": "in.png", "task": "ask"}, "ask"),
        ({"image": None, "task": None, "output": None}, "generate"),
    ],
)
def test_the_task_is_what_the_line_can_only_mean(checker: Checker, said: dict[str, Any], task: str) -> None:
    job = job_of(checker, **said)
    assert job.task == task
    assert bool(job.output) == (task != "ask")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"image": "in.png"}, 'say "task": "edit" or "task": "ask"'),
        ({"image": "in.png", "output": None}, 'say "task": "edit" or "task": "ask"'),
        ({"max_new_tokens": 3, "num_timesteps": 3}, 'say "task": "generate" or "task": "ask"'),
        ({"image": "in.png", "seed": 1}, "which task is meant is not clear"),
        ({"task": "draw"}, "unknown task 'draw'"),
        ({"task": ["ask"]}, "unknown task"),
        ({"task": "generate", "image": "in.png"}, "generate takes no picture"),
        ({"task": "edit"}, "edit needs an image"),
        ({"task": "edit", "image": "none.png"}, "no such picture: "),
        ({"task": "edit", "image": ""}, "image must be a picture's path"),
        ({"task": "edit", "image": 3}, "image must be a picture's path"),
        ({"task": "edit", "image": "a\0b"}, "no file can be called"),
        ({"task": "edit", "images": ["in.png", None]}, "images a list of them"),
        ({"task": "edit", "images": ["in.png"] * 99}, "give 16 or fewer"),
        ({"task": "edit", "image": "in.png", "images": []}, "give image or images"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": None}, "the prompt must be a text"),
        ({"prompt": 3}, "the prompt must be a text"),
        ({"steps": 3}, "unknown setting 'steps'"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"num_timesteps": "3"}, "num_timesteps must be a whole number"),
        ({"cfg_interval": [1, 0]}, "cfg_interval is reversed"),
        ({"height": 10**6}, "is over the model's"),
        ({"task": "ask", "num_timesteps": 3}, "unknown setting 'num_timesteps'"),
        ({"task": "ask", "output": "x.png"}, "leave output out"),
        ({"output": "x.gif"}, "saved as PNG, JPEG or WebP"),
        ({"output": "../x.png"}, "output must be a plain name"),
        ({"output": 3}, "output must be a file's name"),
        ({"output": "folder.png"}, "is a folder"),
        ({"output": "x.jpg", "prompt": "x" * 70_000}, "a JPEG has no room"),
    ],
)
def test_refusals(checker: Checker, said: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError) as refused:
        job_of(checker, **said)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
NAMES = ("prompt", "task", "image", "images", "output", "id", "seed", "num_timesteps", "think", "speed", "cfg_interval",
         "step_cache_threshold", "max_new_tokens", "top_p", "height")  # fmt: skip
GOOD = st.sampled_from(["in.png", ["in.png"], "edit", "ask", "x.png", 3, 0.5, True])


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.dictionaries(st.sampled_from(NAMES) | st.text(), GOOD | VALUES, max_size=5))
def test_whatever_a_line_says_is_a_job_or_refused(checker: Checker, said: dict[str, Any]) -> None:
    with suppress(UserError):
        job = job_of(checker, **said)
        assert job.task in ("generate", "edit", "ask") and job.prompt


def test_a_seed_is_the_lines_own_and_always_the_same(checker: Checker) -> None:
    one, again, other, two = (
        job_of(checker, **said).settings["seed"] for said in ({}, {}, {"id": "x"}, {"prompt": "b"})
    )
    assert one == again
    assert len({one, other, two}) == 3
    assert all(0 <= seed < 2**31 for seed in (one, other, two))
    assert job_of(checker, seed=5).settings["seed"] == 5


def test_a_model_is_loaded_for_the_most_frames_of_any_job(checker: Checker) -> None:
    jobs = [job_of(checker), job_of(checker, id="b", frames=5, frame_mode="turn"), job_of(checker, id="c", frames=2)]
    told = told_by(jobs)
    assert (told["frames"], told["frame_mode"]) == (5, "turn")
    with pytest.raises(UserError, match="frames must be a whole number"):
        job_of(checker, id="d", frames=0)


def test_output_is_called_after_the_job_and_belongs_to_it(checker: Checker) -> None:
    assert job_of(checker, id="fox").output == "fox.png"
    assert job_of(checker, id="a", output="b.JPG").output == "b.JPG"
    assert job_of(checker, id="c", output="c").output == "c.png"
    with pytest.raises(UserError, match=r"is what the job 'a' writes"):
        job_of(checker, id="B", output="B.jpg")


def test_what_a_job_reads_no_other_writes_over(checker: Checker) -> None:
    Image.fromarray(noise()).save(checker.out / "photo.png")
    job_of(checker, id="edit", task="edit", image="out/photo.png")
    with pytest.raises(UserError, match="a picture that jobs read"):
        job_of(checker, id="photo")


def test_a_model_that_cannot_draw_refuses_the_line(checker: Checker) -> None:
    checker.facts = replace(checker.facts, lacking={"vae": Lack("no VAE here", True)})
    assert job_of(checker, task="ask").task == "ask"
    with pytest.raises(UserError, match="no VAE here"):
        job_of(checker)

"""Requests through the queue to the demo checkpoint: in order, bounded, and each to its own end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.errors import BusyError, Cancelled, CheckpointError, DoesNotFitError, SettingError, TimeLimitError
from lowmem_bagel.planner.workload import Conversation
from lowmem_bagel.sampling.denoise import Preview
from lowmem_bagel.serve.jobs import Job
from lowmem_bagel.serve.options import ServeOptions
from lowmem_bagel.serve.service import MAX_PICTURES, MAX_PROMPT, Service, planned
from lowmem_bagel.settings import LoadOptions

PROMPT = "a red circle on a white background"
SMALL = {"seed": 1, "height": 32, "width": 32}
QUICK = {**SMALL, "num_timesteps": 4}
LONG = {**SMALL, "num_timesteps": 5000}


def service_of(path: Path = FOLDER, **options: Any) -> Service:
    return Service(path, LoadOptions(device="cpu", dtype="float32"), ServeOptions(**options))


def until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Which every test leaves as it was: nothing runs, nothing waits."""
    with started(queue=3, time_limit=60) as made:
        yield made


@contextmanager
def started(**options: Any) -> Iterator[Service]:
    made = service_of(**options)
    made.start()
    until(lambda: made.loaded or made.failure)
    assert made.failure is None
    yield made
    made.close(finish=False)


def finished(job: Job) -> Job:
    while not job.wait(job.progress.version, 60).over:
        pass
    return job


def test_a_picture_and_an_answer_are_the_pipelines(service: Service) -> None:
    settings = {"seed": 1, "num_timesteps": 4}
    picture = finished(service.submit([PROMPT], "image", settings, "a")).progress
    answer = finished(service.submit([picture.result.image, "What color is the circle?"], "text", {}, "a")).progress
    pipe = BagelPipeline.from_pretrained(FOLDER, device="cpu", dtype="float32")
    wanted = pipe.generate(PROMPT, **settings)
    assert torch.equal(picture.result.latent, wanted.latent)
    assert (picture.step, picture.steps) == (3, 3)
    assert answer.text == answer.result.text == pipe.ask("What color is the circle?", wanted.image).text


def test_progress_counts_steps_and_seconds(service: Service) -> None:
    job = service.submit([PROMPT], "image", {**SMALL, "num_timesteps": 24}, "a")
    seen = [job.wait(-1)]
    while not seen[-1].over:
        seen.append(job.wait(seen[-1].version, 60))
    running = [progress for progress in seen if progress.state == "running"]
    assert [progress.step for progress in running] == sorted(progress.step for progress in running)
    assert all(progress.seconds_left is not None and progress.seconds_left >= 0 for progress in running)
    assert running[-1].seconds_left < 1


def test_a_picture_is_shown_as_it_forms_and_comes_out_the_same(service: Service) -> None:
    seen: list[Any] = []
    drawn = {}
    for previews in (False, True):
        job = service.submit([PROMPT], "image", {**SMALL, "num_timesteps": 30}, "a", previews)
        while not job.progress.over:
            seen.append(job.wait(job.progress.version, 60).preview)
        drawn[previews] = job.progress.result.latent
        assert previews == any(preview is not None for preview in seen)
    assert {preview.size for preview in seen if preview is not None} == {(4, 4)}
    assert torch.equal(drawn[True], drawn[False])


def test_previews_take_next_to_nothing_of_a_pictures_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []

    def slow(preview: Preview) -> None:
        taken.append(0.1)
        time.sleep(0.1)

    monkeypatch.setattr(Preview, "image", slow)
    finished(service.submit([PROMPT], "image", {**SMALL, "num_timesteps": 40}, "a", True))
    assert len(taken) == 1


def test_the_plan_of_a_picture_is_told_as_it_is_written(service: Service) -> None:
    job = service.submit([PROMPT], "image", {**QUICK, "think": True, "max_think_tokens": 40}, "a")
    texts = [job.wait(-1).text]
    while not job.progress.over:
        texts.append(job.wait(job.progress.version, 60).text)
    finished(job)
    assert job.progress.text == job.progress.result.text


def test_a_full_queue_refuses_and_knows_when_there_is_room(service: Service) -> None:
    running = service.submit([PROMPT], "image", LONG, "a")
    until(lambda: running.progress.step > 2)
    waiting = [service.submit([PROMPT], "image", QUICK, client) for client in "abb"]
    with pytest.raises(BusyError) as refused:
        service.submit([PROMPT], "image", QUICK, "c")
    assert refused.value.retry_after == pytest.approx(running.progress.seconds_left, rel=0.5)
    places = [service.outlook(job) for job in waiting]
    assert [place.ahead for place in places if place] == [1, 2, 3]
    seconds = [place.seconds for place in places if place]
    assert seconds == sorted(seconds)
    service.cancel(running)
    for job in waiting:
        assert finished(job).progress.state == "done"
        assert service.outlook(job) is None


def test_cancelled_while_it_waits_and_while_it_runs(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Job] = []
    monkeypatch.setattr(service, "ended", [*service.ended, ended.append])
    running = service.submit([PROMPT], "image", LONG, "a")
    waiting = service.submit([PROMPT], "image", QUICK, "a")
    until(lambda: running.progress.step > 2)
    service.cancel(waiting)
    assert isinstance(waiting.progress.error, Cancelled)
    begun = time.monotonic()
    service.cancel(running)
    assert isinstance(finished(running).progress.error, Cancelled)
    assert time.monotonic() - begun < 5
    until(lambda: len(ended) == 2)
    service.cancel(running)
    assert finished(service.submit([PROMPT], "image", QUICK, "a")).progress.state == "done"


def test_a_time_limit_ends_a_request_and_no_other() -> None:
    made = service_of(time_limit=1)
    made.start()
    until(lambda: made.loaded)
    error = finished(made.submit([PROMPT], "image", LONG, "a")).progress.error
    assert isinstance(error, TimeLimitError)
    assert "took over 1 s" in str(error)
    assert finished(made.submit([PROMPT], "image", QUICK, "a")).progress.state == "done"
    made.close()


def test_failed_requests_leave_the_server_running(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they fail with, one after the other."""
    assert service.loaded is not None
    for failure in (MemoryError(), RuntimeError("a kernel failed"), DoesNotFitError("full")):
        with monkeypatch.context() as patch:
            patch.setattr("lowmem_bagel.generation.executor.Execution.draw", Mock(side_effect=failure))
            error = finished(service.submit([PROMPT], "image", QUICK, "a")).progress.error
        assert error is failure
        assert finished(service.submit([PROMPT], "image", QUICK, "a")).progress.state == "done"


IMPOSSIBLE: list[tuple[list[Any], dict[str, Any], str]] = [
    ([PROMPT], {"num_timesteps": 1}, "num_timesteps"),
    ([PROMPT], {"steps": 5}, "unknown setting"),
    ([""], {}, "the prompt is empty"),
    (["x" * (MAX_PROMPT + 1)], {}, "characters"),
    ([b"x"] * (MAX_PICTURES + 1), {}, "pictures; this server takes"),
]
"""Terms, settings, and what is said of them."""


def test_impossible_requests_never_wait(service: Service) -> None:
    for terms, settings, said in IMPOSSIBLE:
        with pytest.raises(SettingError, match=said):
            service.submit(terms, "image", settings, "a")


def test_closing_finishes_what_runs_and_refuses_who_waits() -> None:
    with started(queue=3) as service:
        running = service.submit([PROMPT], "image", {"seed": 1, "num_timesteps": 40}, "a")
        waiting = service.submit([PROMPT], "image", QUICK, "a")
        until(lambda: running.progress.step > 2)
        service.close()
        assert running.progress.state == "done"
        assert isinstance(waiting.progress.error, BusyError)
        with pytest.raises(BusyError, match="shutting down"):
            service.submit([PROMPT], "image", QUICK, "a")


def test_before_it_is_loaded_it_says_so() -> None:
    made = service_of()
    made.bytes_loaded = (30, 100)
    with pytest.raises(BusyError, match="loading"):
        made.submit([PROMPT], "image", QUICK, "a")


def test_a_folder_that_is_none_is_told_to_whoever_started_it(tmp_path: Path) -> None:
    told: list[BaseException | None] = []
    made = service_of(tmp_path)
    made.when_failed = lambda: told.append(made.failure)
    made.start()
    until(lambda: told)
    assert isinstance(told[0], CheckpointError)
    with pytest.raises(BusyError):
        made.submit([PROMPT], "image", QUICK, "a")
    made.close()


@pytest.mark.parametrize("open_to_all", [{"host": "0.0.0.0"}, {"share": True}, {"host": "192.168.1.5", "api_key": ""}])
def test_nothing_listens_beyond_this_machine_without_a_key(open_to_all: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="API key"):
        ServeOptions(**open_to_all)
    assert ServeOptions(**{**open_to_all, "api_key": "k" * 16})


def test_a_short_key_is_none() -> None:
    with pytest.raises(SettingError, match="16 ASCII characters"):
        ServeOptions(api_key="secret")


def test_a_chat_is_planned_for_where_the_model_asks_for_pictures(tmp_path: Path) -> None:
    folder = ModelFolder.open(Path(shutil.copytree(CHECKPOINT, tmp_path / "zebra-cot-tiny")))
    options = LoadOptions(device="cpu", dtype="float32")
    assert planned(folder, options)[0].request.conversation == Conversation(3, 512, 1)
    assert planned(folder, replace(options, max_rounds=1))[0].request.conversation == Conversation(1, 512, 1)
    assert planned(folder, replace(options, tasks=("ask",)))[0].request.conversation is None
    assert planned(ModelFolder.open(CHECKPOINT), options)[0].request.conversation is None
    inputs, plan = planned(folder, replace(options, chat_turns=2))
    assert inputs.request.conversation == Conversation(3, 512, 2) and "chats" not in plan.reasons
    assert plan.prediction is not None
    tight = replace(options, chat_turns=1000, size=(512, 512), max_ram=3 * plan.prediction.peak_bytes)
    inputs, plan = planned(folder, tight)
    assert inputs.request.conversation is None and plan.reasons["chats"].startswith("not planned for: ")

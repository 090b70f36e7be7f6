"""`lowmem-bagel batch`: every job once, whatever ends a run; failures kept; what was done is not done again."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.batch import MODEL, SMALL, Children, contents, jobs_file, leftovers, results
from support.command import Ran
from support.pictures import noise

from lowmem_bagel import BagelPipeline
from lowmem_bagel.batch.folder import PARTIAL, opened_folder
from lowmem_bagel.batch.results import Result
from lowmem_bagel.cli.batch import Progress
from lowmem_bagel.errors import DoesNotFitError
from lowmem_bagel.pictures.saving import read_metadata

Cli = Callable[..., Ran]
TINY = {"max_new_tokens": 2}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(small_pictures: BagelPipeline) -> tuple[str, ...]:
    return ("--model", str(small_pictures.model.folder.path), "--device", "cpu", "--dtype", "float32")


class TestJobs:
    def test_all_tasks_come_to_what_the_commands_make_of_them(
        self, cli: Cli, place: Path, small: tuple[str, ...], small_pictures: BagelPipeline
    ) -> None:
        (place / "jobs").mkdir()
        Image.fromarray(noise(40, 56)).save(place / "jobs" / "in.png")
        jobs_file(
            place / "jobs" / "jobs.jsonl",
            {"id": "draw", "prompt": "a red circle", "seed": 3, **SMALL},
            {"id": "edit", "prompt": "make it red", "image": "in.png", "num_timesteps": 2, "output": "night.webp"},
            {"id": "ask", "prompt": "what is it?", "image": "in.png", **TINY},
            {"id": "two", "prompt": "which?", "images": ["in.png", "in.png"], "task": "ask", **TINY},
        )
        ran = cli("batch", "jobs/jobs.jsonl", "out", *small)
        assert (ran.code, ran.out) == (0, ""), ran.err
        assert "4/4 two (line 4): answered" in ran.err
        found = results(place / "out")
        assert [*found] == ["draw", "edit", "ask", "two"]
        assert {result["state"] for result in found.values()} == {"done"}

        drawn = small_pictures.generate("a red circle", seed=3, **SMALL).save(place / "wanted.png")
        assert (place / "out" / "draw.png").read_bytes() == drawn.read_bytes()
        image = place / "jobs" / "in.png"
        edited = small_pictures.edit(image, "make it red", num_timesteps=2, seed=found["edit"]["seed"]).image
        assert edited is not None
        assert Image.open(place / "out" / "night.webp").tobytes() == edited.tobytes()
        assert found["ask"]["text"] == small_pictures.ask("what is it?", image, **TINY).text
        assert found["two"]["text"] == small_pictures.run([image, image, "which?"], output="text", **TINY).text
        assert found["edit"]["settings"]["seed"] == found["edit"]["seed"]
        assert read_metadata(place / "out" / "night.webp") == found["edit"]["settings"]
        assert (found["draw"]["line"], found["draw"]["files"], found["ask"]["files"]) == (1, ["draw.png"], [])
        assert found["ask"]["seconds"] > 0

    def test_failures_are_kept_and_the_rest_is_done(self, cli: Cli, place: Path) -> None:
        (place / "text.png").write_text("no picture")
        jobs_file(
            place / "jobs.jsonl",
            {"prompt": "a", **SMALL},
            '{"prompt": "a',
            {"prompt": "b", "task": "edit", "image": "nowhere.png"},
            {"prompt": "b", "task": "edit", "image": "text.png"},
            {"prompt": "b", "step": 1},
            {"prompt": "c", **SMALL, "height": 40},
        )
        ran = cli("batch", "jobs.jsonl", "out", *MODEL)
        assert ran.code == 2
        assert ran.err.endswith(
            "lowmem-bagel: 4 of 6 jobs failed; out/results.jsonl says why, and --retry-failed does them again\n"
        )
        found = results(place / "out")
        assert [id for id, result in found.items() if result["state"] == "done"] == ["00001", "00006"]
        assert "not a line of JSON" in found["00002"]["why"]
        assert "no such picture: nowhere.png" in found["00003"]["why"]
        assert found["00004"]["why"].startswith("text.png: not a picture")
        assert "unknown setting 'step'" in found["00005"]["why"]
        assert "note: 00006: height 40 is not a multiple of 16; using 48" in ran.err
        assert found["00006"]["notes"] == ["height 40 is not a multiple of 16; using 48"]
        assert "2/6 00003 (line 3): failed: no such picture" in ran.err

    def test_no_model_is_loaded_where_nothing_can_be_done(
        self, cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(BagelPipeline, "from_pretrained", None)
        jobs_file(place / "jobs.jsonl", {"prompt": ""})
        assert cli("batch", "jobs.jsonl", "out", *MODEL).code == 2
        assert results(place / "out")["00001"]["why"] == "the prompt is empty; say what you want"

    @pytest.mark.parametrize(
        ("failure", "why"),
        [
            (DoesNotFitError("no room"), "no room"),
            (MemoryError(), "the machine's memory ran out; ask for a smaller picture"),
            (ZeroDivisionError("x"), "a fault of the program: ZeroDivisionError: x"),
        ],
    )
    def test_a_request_that_fails_is_one_failed_job(
        self, cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, why: str
    ) -> None:
        run = BagelPipeline.run

        def failing(self: BagelPipeline, terms: Any, **about: Any) -> Any:
            if terms == ["b"]:
                raise failure
            return run(self, terms, **about)

        monkeypatch.setattr(BagelPipeline, "run", failing)
        jobs_file(place / "jobs.jsonl", *({"prompt": prompt, **SMALL} for prompt in "abc"))
        assert cli("batch", "jobs.jsonl", "out", *MODEL).code == 2
        found = results(place / "out")
        assert [result["state"] for result in found.values()] == ["done", "failed", "done"]
        assert found["00002"]["why"] == why
        assert ("ZeroDivisionError" in found["00002"].get("traceback", "")) == isinstance(failure, ZeroDivisionError)

        monkeypatch.setattr(BagelPipeline, "run", run)
        assert cli("batch", "jobs.jsonl", "out", *MODEL).code == 2
        assert cli("batch", "jobs.jsonl", "out", "--retry-failed", *MODEL).code == 0
        assert [*results(place / "out")] == ["00001", "00003", "00002"]

    def test_json_and_stdin(self, cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        jobs_file(place / "jobs.jsonl", {"prompt": "what?", "task": "ask", **TINY}, "{")
        monkeypatch.setattr("sys.stdin", open(place / "jobs.jsonl"))  # noqa: SIM115
        ran = cli("batch", "-", "out", "--json", *MODEL)
        assert ran.code == 2
        assert json.loads(ran.out) == {"jobs": 2, "done": 1, "failed": 1, "results": "out/results.jsonl"}

    def test_strict_does_nothing_where_a_line_is_wrong(self, cli: Cli, place: Path) -> None:
        jobs_file(place / "jobs.jsonl", {"prompt": "a", **SMALL}, {"prompt": "b", "task": "edit", "image": "x.png"})
        assert cli("batch", "jobs.jsonl", "out", "--strict", *MODEL).error == "line 2: no such picture: x.png"
        assert not (place / "out").exists()


class TestAgain:
    @pytest.fixture
    def done(self, cli: Cli, place: Path) -> dict[str, bytes]:
        jobs_file(place / "jobs.jsonl", {"prompt": "a", **SMALL}, {"prompt": "b", **SMALL, "id": "b"})
        assert cli("batch", "jobs.jsonl", "out", *MODEL).code == 0
        return contents(place / "out")

    def test_what_is_done_is_not_done_again(
        self, cli: Cli, place: Path, done: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(BagelPipeline, "from_pretrained", None)
        ran = cli("batch", "jobs.jsonl", "out", *MODEL)
        assert ran.code == 0
        assert ran.err == "out/results.jsonl: 2 jobs done\n"
        assert contents(place / "out") == done

    def test_more_lines_are_done_beside(self, cli: Cli, place: Path, done: dict[str, bytes]) -> None:
        jobs_file(place / "more.jsonl", {"prompt": "c", **SMALL, "id": "c"}, {"prompt": "b", **SMALL, "id": "b"})
        assert cli("batch", "more.jsonl", "out", *MODEL).code == 0
        assert [*results(place / "out")] == ["00001", "b", "c"]
        assert done.items() <= contents(place / "out").items()

    def test_a_changed_line_is_refused_unless_it_is_to_be_redone(
        self, cli: Cli, place: Path, done: dict[str, bytes]
    ) -> None:
        jobs_file(place / "jobs.jsonl", {"prompt": "a", **SMALL}, {"prompt": "c", **SMALL, "id": "b"})
        refused = cli("batch", "jobs.jsonl", "out", *MODEL).error
        assert refused.startswith("line 2 has changed since its job 'b' was done; give it another id")
        assert contents(place / "out") == done
        assert cli("batch", "jobs.jsonl", "out", "--redo-changed", *MODEL).code == 0
        after = contents(place / "out")
        assert {name for name in done if done[name] != after[name]} == {"b.png", "result b"}

    def test_another_model_is_refused_likewise(
        self, cli: Cli, place: Path, done: dict[str, bytes], small: tuple[str, ...]
    ) -> None:
        refused = cli("batch", "jobs.jsonl", "out", *small).error
        assert "was done by another model" in refused and "--redo-changed" in refused
        assert contents(place / "out") == done

    def test_a_failed_line_that_was_put_right_is_done(self, cli: Cli, place: Path) -> None:
        jobs_file(place / "jobs.jsonl", {"prompt": "a", "hight": 32}, {"prompt": "b", **SMALL})
        assert cli("batch", "jobs.jsonl", "out", *MODEL).code == 2
        jobs_file(place / "jobs.jsonl", {"prompt": "a", **SMALL}, {"prompt": "b", **SMALL})
        assert cli("batch", "jobs.jsonl", "out", *MODEL).code == 0
        assert [*results(place / "out")] == ["00002", "00001"]

    def test_two_runs_at_once(self, cli: Cli, place: Path, done: dict[str, bytes]) -> None:
        with opened_folder(place / "out"):
            assert "another run writes there" in cli("batch", "jobs.jsonl", "out", *MODEL).error


class TestDisk:
    def test_full_disk(self, cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        jobs_file(place / "jobs.jsonl", *({"prompt": prompt, **SMALL} for prompt in "abc"))
        replace, count = os.replace, 0

        def full(*args: Any) -> None:
            nonlocal count
            count += 1
            if count == 2:
                raise OSError(28, "No space left on device")
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            ran = cli("batch", "jobs.jsonl", "out", *MODEL)
        assert ran.code == 2
        assert ran.err.splitlines()[-1] == (
            "lowmem-bagel: out: the disk is full; free some space, and the same command goes on from here"
        )
        assert [*results(place / "out")] == ["00001"] and not leftovers(place / "out")
        assert cli("batch", "jobs.jsonl", "out", *MODEL).code == 0
        assert [*results(place / "out")] == ["00001", "00002", "00003"]


@pytest.fixture(scope="module")
def children() -> Children:
    return Children()


MANY: list[dict[str, Any]] = [
    *({"prompt": f"picture {number}", **SMALL} for number in range(18)),
    *({"prompt": f"what is {number}?", "task": "ask", "do_sample": True, "max_new_tokens": 3} for number in range(6)),
]


@pytest.fixture(scope="module")
def undisturbed(children: Children, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("undisturbed")
    jobs_file(place / "jobs.jsonl", *MANY)
    process, ready = children.start("batch", place / "jobs.jsonl", place / "out", *MODEL)
    assert ready.recv()[0] == 0
    process.join()
    return contents(place / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
class TestKilled:
    def test_each_job_once_and_the_same_pictures(
        self, place: Path, children: Children, undisturbed: dict[str, bytes]
    ) -> None:
        """Killed before some durable steps of those that a run takes, and then left to end."""
        jobs_file(place / "jobs.jsonl", *MANY)
        seen: set[str] = set()
        for step in random.Random(5).sample(range(20), 5):
            process, _ = children.start("batch", "jobs.jsonl", "out", *MODEL, kill_at=step)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            if (place / "out" / "results.jsonl").exists():
                lines = (place / "out" / "results.jsonl").read_bytes().split(b"\n")
                assert seen <= {json.loads(line)["id"] for line in lines[:-1]}, "what was done stays done"
                seen = {json.loads(line)["id"] for line in lines[:-1]}
        assert 0 < len(seen) < len(MANY)
        (place / "out" / PARTIAL.format("x")).write_bytes(b"half a picture")
        process, ready = children.start("batch", "jobs.jsonl", "out", *MODEL)
        assert ready.recv()[0] == 0
        process.join()
        assert contents(place / "out") == undisturbed
        assert not leftovers(place / "out")

    @pytest.mark.parametrize(
        ("how", "flags"),
        [(signal.SIGINT, MODEL), (signal.SIGTERM, MODEL), (signal.SIGTERM, (*MODEL[:2], "--devices", "cpu,cpu"))],
    )
    def test_interrupted(
        self,
        cli: Cli,
        place: Path,
        children: Children,
        undisturbed: dict[str, bytes],
        how: signal.Signals,
        flags: tuple[str, ...],
    ) -> None:
        jobs_file(place / "jobs.jsonl", *MANY)
        process, ready = children.start("batch", "jobs.jsonl", "out", *flags)
        until = time.monotonic() + 60
        while not [*place.glob("out/*.png")] and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(process.pid, how)
        assert ready.recv()[0] == 130
        process.join()
        assert contents(place / "out").items() <= undisturbed.items()
        assert leftovers(place / "out") <= set(undisturbed), "whole, if without a line"
        assert len(results(place / "out")) < len(MANY)
        assert cli("batch", "jobs.jsonl", "out", *MODEL).code == 0
        assert contents(place / "out") == undisturbed


def test_bars_say_what_is_done_and_left_and_who_does_what() -> None:
    shown: list[tuple[Any, ...]] = []
    progress = Progress(10, done=2, failed=1)
    with progress.shown():
        progress._show = lambda *about: shown.append(about)
        progress.step("cuda:1", "fox", 3, 50)
        result = Result(id="fox", line=4, state="failed", why="no", digest="d", model="m")
        progress.has_ended(result)
        for _ in range(6):
            progress.has_ended(replace(result, state="done"))
        for number in range(20):
            progress.step(f"cuda:{number}", "fox", 1, 2)
        assert len({about[0] for about in shown} - {"Jobs"}) == 8
    progress.step("cuda:1", "late", 1, 2)
    assert shown[0] == ("cuda:1", 3, 50, "fox")
    assert shown[1][:3] == ("Jobs", 4, 10) and re.fullmatch(r"2 failed, 6 to do, about .* s left", shown[1][3])
    assert ("Jobs", 10, 10, "2 failed, 0 to do") in shown
    assert "late" not in {about[3] for about in shown}


def test_a_wrong_option_is_refused_before_anything(cli: Cli, place: Path) -> None:
    jobs_file(place / "jobs.jsonl", {"prompt": "a"}, "{")
    for flags, why in (
        (("--dtype", "int3"), "unknown dtype"),
        (("--devices", "x"), "devices must be numbers of cards"),
        (("--devices", "0", "--device", "cpu"), "give one of --device, --devices and --ray"),
    ):
        assert why in cli("batch", "jobs.jsonl", "out", "--model", MODEL[1], *flags).error
    assert not (place / "out").exists()

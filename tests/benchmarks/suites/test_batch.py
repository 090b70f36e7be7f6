"""`bench batch`: what it asks of a batch, and what it makes of a folder that a kill left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lowmem_bagel.benchmarks.suites.batch import compared, contents, descendants, left, write_jobs
from support.paths import RESULTS

from lowmem_bagel.batch.folder import PARTIAL
from lowmem_bagel.batch.jobs import Checker
from lowmem_bagel.batch.lines import read_lines
from lowmem_bagel.checkpoint.config import read_json
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.errors import UserError
from lowmem_bagel.planner.facts import ModelFacts


def test_its_jobs_are_of_every_kind_and_one_in_ten_is_wrong(tmp_path: Path) -> None:
    write_jobs(tmp_path / "jobs.jsonl", 40, 3)
    folder = ModelFolder.open(FOLDER)
    checker = Checker(folder, ModelFacts.of_folder(folder), tmp_path, tmp_path)
    tasks: list[str] = []
    for line in read_lines(tmp_path / "jobs.jsonl"):
        try:
            tasks.append(checker.job(line).task)
        except UserError as error:
            tasks.append(str(error)[:10])
    assert {task: tasks.count(task) for task in tasks} == {
        "generate": 20, "edit": 8, "ask": 8, "not a line": 2, "no such pi": 2,
    }  # fmt: skip


def result(id: str) -> dict[str, Any]:
    return {"id": id, "state": "done", "files": [f"{id}.png"], "seconds": 1.5}


def folder_of(path: Path, *ids: str) -> Path:
    path.mkdir()
    (path / "results.jsonl").write_text("".join(json.dumps(result(id)) + "\n" for id in ids))
    for id in ids:
        (path / f"{id}.png").write_bytes(id.encode())
    return path


def test_what_a_kill_left_is_counted(tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", "a", "b")
    assert left(out) == {"results": 2, "torn_lines": 0, "unfinished_files": 0, "pictures_without_a_result": 0}
    with (out / "results.jsonl").open("a") as file:
        file.write('{"id": "c')
    (out / PARTIAL.format("x")).write_bytes(b"half")
    (out / "c.png").write_bytes(b"c")
    assert left(out) == {"results": 2, "torn_lines": 1, "unfinished_files": 1, "pictures_without_a_result": 1}
    assert set(left(tmp_path / "nowhere").values()) == {0}


@pytest.mark.parametrize(
    ("ids", "each_once", "different"), [("ab", True, 0), ("abb", False, 0), ("a", False, 2), ("abc", False, 2)]
)
def test_folders_are_compared_job_by_job(tmp_path: Path, ids: str, each_once: bool, different: int) -> None:
    wanted = contents(folder_of(tmp_path / "wanted", "a", "b"))
    found = compared(folder_of(tmp_path / "found", *ids), wanted)
    assert (found["each_once"], found["different"]) == (each_once, different)


def test_another_picture_is_another(tmp_path: Path) -> None:
    wanted = contents(folder_of(tmp_path / "wanted", "a"))
    out = folder_of(tmp_path / "found", "a")
    (out / "a.png").write_bytes(b"other")
    assert compared(out, wanted)["different"] == 1


def test_descendants_are_found() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len([*descendants(process.pid)]) == 1
        assert process.pid in descendants(os.getpid())
        process.communicate(b"\n")


class TestRecord:
    RECORD = read_json(RESULTS / "batch_cpu.json")

    def test_500_jobs_killed_20_times_come_to_what_an_undisturbed_run_does(self) -> None:
        found, usual = self.RECORD["results"]["killed"], self.RECORD["results"]["undisturbed"]
        kills = found["kills"]
        assert self.RECORD["settings"]["jobs"] == usual["done"] + usual["failed"] == found["results"] == 500
        assert len(kills) == 20 and all(kill["before_its_end"] and kill["results"] < 500 for kill in kills)
        results = [kill["results"] for kill in kills]
        assert results == sorted(results) and len(set(results)) > 10, "what was done stayed done"
        assert found["each_once"] and (found["different"], found["left_over"]) == (0, 0)
        assert found["pictures"] == 350

    @pytest.mark.parametrize("team", ["processes", "ray"])
    def test_a_killed_workers_job_was_done_again(self, team: str) -> None:
        found = self.RECORD["results"][team]
        assert found["killed"] == 1 and len(found["said"]) == 1 and " while it did " in found["said"][0]
        assert found["each_once"] and found["results"] == 500
        assert (found["pictures"], found["different"], found["left_over"]) == (350, 0, 0)

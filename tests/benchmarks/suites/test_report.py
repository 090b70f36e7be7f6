"""`bench report`: the real command with its processes, on the demo checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from lowmem_bagel.benchmarks.report.child import Child
from lowmem_bagel.benchmarks.rows import Row
from support.command import Ran
from support.forked import Forked
from support.made_up import Distribution

WAYS = """
import os, signal, time
from pathlib import Path

import torch

from lowmem_bagel.formats.spec import Way


def stalls(site):
    began = Path(__file__).with_name("began")
    if not began.exists():
        began.touch()
        time.sleep(300)
    raise ValueError("two\\nlines")


def hungry(site):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More is said.")


def dies(site):
    os.kill(os.getpid(), signal.SIGKILL)


def way(name):
    return "int8", Way(name, f"made_up:{name}", name, by_name=True, says="asked for", weights="dequantized")


STALLS, HUNGRY, DIES = way("stalls"), way("hungry"), way("dies")
"""
POINTS = {"ways": {"stalls": "STALLS", "hungry": "HUNGRY", "dies": "DIES"}}
ROWS = ["source::ask", *(f"int8::ask:backend={way}" for way in ("stalls", "hungry", "dies")), "int8::generate"]
COMMAND = """
import sys
from types import SimpleNamespace

from lowmem_bagel.benchmarks.report import child, write
from lowmem_bagel.cli import main
from support.forked import Worker

child.subprocess = SimpleNamespace(Popen=Worker, PIPE=None)
write.PLOTS = write.PLOTS[:1]
sys.argv = ["lowmem-bagel", "bench", "report", *sys.argv[1:]]
main()
"""
"""Its workers are forks, which have torch imported, and of the plots, which `report/test_write.py` is about, one is
drawn. `test_a_worker_is_an_interpreter_of_its_own` starts a real one."""


def begun(made: Distribution, out: Path) -> Forked:
    material = made.folder / "material"
    material.mkdir(exist_ok=True)
    (material / "prompts.txt").write_text("a red circle")
    options = ["--rows", " ".join(ROWS), "--num-timesteps", 3, "--max-new-tokens", 4, "--repeat", 1, "--size", 32]
    options += ["--device", "cpu", "--material", material, "--no-startup", "--out", out]
    return Forked(COMMAND, options, path=[made.folder], folder=made.folder)


def rows_of(out: Path) -> dict[str, Any]:
    return {row["row"]: row for row in json.loads((out / "report.json").read_text())["results"]["rows"]}


def test_a_killed_run_goes_on_and_what_fails_is_a_row(tmp_path: Path) -> None:
    made = Distribution(tmp_path / "made", WAYS, POINTS)
    out = tmp_path / "report"
    first = begun(made, out)
    deadline = time.monotonic() + 120
    while not (made.folder / "began").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.finished().stderr
        time.sleep(0.05)
    first.kill()
    first.finished()
    before = rows_of(out)
    assert [*before] == ["source::ask"]

    again = begun(made, out).finished()
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.startswith("4 rows to measure") and "; 1 are there" in again.stdout
    after = rows_of(out)
    assert [*after] == ROWS, "in the order that they were asked for"
    assert after["source::ask"] == before["source::ask"], "measured once"
    states = {name: (row["state"], row["why"]) for name, row in after.items()}
    assert states["int8::generate"] == ("measured", None)
    stalls, hungry, dies = (states[f"int8::ask:backend={way}"] for way in ("stalls", "hungry", "dies"))
    assert stalls == ("failed", "ValueError: two")
    assert hungry[0] == "out of memory" and "CUDA out of memory" in hungry[1] and "\n" not in hungry[1]
    assert dies[0] == "failed" and dies[1].startswith("the process was ended by signal 9")
    drawn = after["int8::generate"]
    assert drawn["seconds"]["median"] > 0 and drawn["phases"].keys() == {"prefill", "denoise", "decode"}
    assert drawn["bytes"]["ram"] > 50e6 and drawn["bytes"]["process"] is None
    assert 0 < drawn["stored_und_bytes"] < drawn["stored_bytes"] < after["source::ask"]["stored_bytes"]
    assert drawn["predicted"]["seconds"] > 0 and drawn["energy_why"] == "no NVIDIA GPU is used"
    cold, warm = after["source::ask"]["load_seconds"].values()
    assert cold > 0 and warm > 0 and drawn["load_seconds"]["cold"] is None, "the first of a format alone"
    answer = after["source::ask"]
    assert 0 < answer["first_token_seconds"] <= answer["measured_seconds"]["max"] * 1.5

    (variant,) = json.loads((out / "report.json").read_text())["results"]["fidelity"]["variants"]
    assert (variant["name"], variant["state"], variant["exact"]) == ("int8", "measured", False)
    assert (out / "report.html").exists()


def test_a_worker_is_an_interpreter_of_its_own() -> None:
    conditions = {"shape": "tiny", "size": 32, "num_timesteps": 3, "max_new_tokens": 4, "repeat": 1, "row_seconds": 9}
    worker = Child({"device": "cpu", "conditions": conditions})
    try:
        about = worker.hello()
        assert about["machine"]["device"] == "cpu" and about["environment"]["versions"]
        (expected,) = worker.ask("expect", rows=[asdict(Row.parse("source"))])["rows"]
        assert expected["predicted"]["seconds"] > 0
    finally:
        worker.close()


REFUSED = {
    "unknown variant 'int7'": ("--formats", "int7"),
    "unknown task 'sing'": ("--tasks", "sing"),
    "0 is none": ("--limits", "8GB"),
    "unknown step cache 'x'": ("--rows", "source:::step_cache=x"),
    "means nothing": ("--rows", "source:1:generate:more"),
    "not both": (".", "--shape", "tiny"),
    "unknown shape 'small'": ("--shape", "small"),
    "name the folders of two": ("--merge", "."),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_means_nothing_is_refused_before_anything_is_made(
    cli: Callable[..., Ran], tmp_path: Path, words: str
) -> None:
    assert words in cli("bench", "report", *REFUSED[words], "--out", tmp_path / "report").error
    assert not (tmp_path / "report").exists()


def test_a_folder_that_cannot_be_written_is_refused_first(cli: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "choose another folder with --out" in cli("bench", "report", "--out", tmp_path / "file" / "report").error


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is broken"), ('{"benchmark": "engine"}', "is no record"), ("[]", "is no record"),
     ('{"benchmark": "report", "results": {"rows": [1]}}', "is no record")],
)  # fmt: skip
def test_a_record_that_is_broken_or_foreign_is_refused_first(
    cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.delattr(Child, "hello")  # nothing is started
    (tmp_path / "report.json").write_text(text)
    assert words in cli("bench", "report", "--out", tmp_path).error
    assert (tmp_path / "report.json").read_text() == text

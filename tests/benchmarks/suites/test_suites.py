"""Every benchmark runs at a small size without a GPU, and its record says how to make it again."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lowmem_bagel.benchmarks import launching
from lowmem_bagel.benchmarks.suites import accuracy, conversion
from support.command import Ran
from support.forked import Forked
from support.forkserver import context
from support.paths import CHECKPOINT

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("floor", ...)`: the results of a benchmark."""
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", "flash")

    def results(*arguments: object) -> Any:
        words = ["bench", *map(str, arguments), "--out", str(tmp_path / "record.json")]
        ran = cli(*words)
        assert ran.code == 0, ran.err
        record = json.loads((tmp_path / "record.json").read_text())
        assert record["command"] == "LOWMEM_BAGEL_DISABLE=flash " + shlex.join(["lowmem-bagel", *words])
        assert record["commit"] and record["versions"]["torch"] and record["settings"] is not None
        return record["results"]

    return results


def test_a_profile_names_kernels_by_their_time(run: Run) -> None:
    found = run("profile", "source", "int8", "--shape", "tiny", "--size", 64)
    assert set(found) == {"source", "int8"}
    for profile in found.values():
        times = [kernel["ms"] for kernel in profile["kernels"]]
        assert times == sorted(times, reverse=True) and profile["busy_ms"] == pytest.approx(sum(times))


def test_launches_are_timed_by_one_thread_and_by_two(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "STEPS", 2)  # in a row; what is recorded is of one
    found = run("launches", "source", "int8", "--shape", "tiny", "--sizes", "64,32", "--repeat", 1, "--device", "cpu")
    assert [(row["row"], row["size"]) for row in found] == [
        ("source", 64), ("source", 32), ("int8", 64), ("int8", 32)
    ]  # fmt: skip
    for row in found:
        assert row["launches"] > 50 and row["graph_refused"] == "needs a CUDA GPU, not cpu"
        assert len(row["seconds"]) == 4 and len(row["step_seconds"]) == 3 and min(row["step_seconds"].values()) > 0
        assert all(0 < each["host"] <= each["done"] for each in row["seconds"].values())


def test_sizes_that_are_none_are_refused(cli: Callable[..., Ran]) -> None:
    assert "sizes must be numbers of pixels" in cli("bench", "launches", "source", "--sizes", "64,wide").error


def test_routed_experts_are_measured(run: Run) -> None:
    small = ("--shape", "tiny-moe", "--device", "cpu", "--size", 64, "--num-timesteps", 2, "--repeat", 1)
    assert [row["finite"] for row in run("engine", "source", "nf4", *small)] == [True, True]


def test_conversions_are_measured(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first in an interpreter of its own; the next is a fork, which takes seconds less to begin."""
    begun: list[list[str]] = []

    def started(command: list[str], **streams: Any) -> Any:
        begun.append(command)
        return subprocess.Popen(command, **streams) if len(begun) == 1 else Forked(command[2], command[3:])

    monkeypatch.setattr(conversion, "subprocess", SimpleNamespace(Popen=started, PIPE=subprocess.PIPE))
    cases = run("conversion", tmp_path / "work", "--shape", "tiny", "--formats", "int8 rotated, dfloat11")
    assert [case["case"] for case in cases] == ["int8 rotated", "dfloat11"]
    sizes = {case["case"]: case["bytes"] for case in cases}
    assert sizes["int8 rotated"] < sizes["dfloat11"]
    assert all(case["peak_anonymous_bytes"] > 0 for case in cases)
    assert [command[0] for command in begun] == [sys.executable] * 2


def test_an_unknown_conversion_is_refused(cli: Callable[..., Ran], tmp_path: Path) -> None:
    assert "unknown int7; choose from" in cli("bench", "conversion", tmp_path, "--formats", "int8,int7").error
    assert "unknown int7; choose from" in cli("bench", "accuracy", "--formats", "int7").error


def test_errors_are_measured_on_a_models_own_activations(run: Run) -> None:
    pytest.importorskip("bitsandbytes")
    found = run("codec-errors", "--model", CHECKPOINT, "--prompt", "a cat", "--timesteps", 2, "--side", 64)
    types = {f"gguf-{kind}" for kind in ("q8_0", "q6_k", "q5_k", "q4_k")}
    assert {row["format"] for row in found} == {"int8", "int8 rotated", "fp8", "nf4", "fp16", *types}


def test_accuracy_is_judged_against_the_source(run: Run) -> None:
    few = ("--answers", 2, "--drawings", 1, "--edits", 1, "--num-timesteps", 3)
    found = run("accuracy", "--formats", "bf16", "--ways", "float32:math", "--step-caches", "taylorseer", *few)
    assert [*found] == ["source", "bf16", "float32:math", "taylorseer"]
    assert found["float32:math"]["attention"] == "math"
    assert found["bf16"]["tasks"]["drawings"]["equal_pictures"] == 1
    assert all(way["tasks"]["answers"]["total"] == 2 for way in found.values())


def test_tasks_are_judged_in_processes_to_the_same_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are forks of one that has imported everything; each takes what it computes as one that is spawned does."""
    monkeypatch.setattr(accuracy, "get_context", lambda _: context())
    few = ("--formats", "", "--answers", 3, "--drawings", 2, "--edits", 0, "--num-timesteps", 2)
    here, apart = (run("accuracy", *few, "--processes", count)["source"] for count in (1, 2))
    assert apart["tasks"] == here["tasks"]


@pytest.mark.parametrize("name", ["kernels", "kernels-lossless", "kernels-steps"])
def test_kernels_are_timed_on_a_card_alone(cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "NVIDIA GPU" in cli("bench", name, "--check-only").error


def test_every_benchmark_says_what_it_does(cli: Callable[..., Ran]) -> None:
    names = [point.name for point in entry_points(group="lowmem_bagel.benchmarks")]
    assert len(names) > 10
    for name in names:
        shown = cli("bench", name, "--help")
        assert shown.code == 0 and f"lowmem-bagel bench {name} [OPTIONS]" in shown.out
        assert "record" in shown.out


def test_the_module_is_the_same_command() -> None:
    program = "import runpy; runpy.run_module('lowmem_bagel.benchmarks', run_name='__main__', alter_sys=True)"
    ran = Forked(program, ["engine", "--preset", "all"]).finished()
    assert ran.returncode == 2 and "unknown preset 'all'" in ran.stderr

"""`bench engine`: its rows, and a run of it on a small model without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowmem_bagel.benchmarks import shapes, synthetic
from lowmem_bagel.benchmarks.rows import PRESETS, Row
from support.command import Ran

from lowmem_bagel.checkpoint.tensors import LM_HEAD, tensor_table
from lowmem_bagel.formats.registry import format_spec
from lowmem_bagel.sampling.step_caches.registry import step_caches


def test_rows_are_read_by_place_and_by_name() -> None:
    assert Row.parse("int8") == Row("int8")
    assert Row.parse("source:24:edit") == Row("source", 24.0, "edit")
    named = Row.parse("int8::ask:backend=quanto:timesteps=3")
    assert named == Row("int8", task="ask", backend="quanto", timesteps=3)
    assert Row.parse("source:devices=0,1:divide=guidance") == Row("source", devices="0,1", divide="guidance")


@pytest.mark.parametrize("text", ["int8:much", "int8:8:edit:more", "int8:colour=red"])
def test_a_row_that_means_nothing_is_refused(cli: Callable[..., Ran], text: str) -> None:
    assert repr(text) in cli("bench", "engine", text).error


def test_an_unknown_preset_is_refused(cli: Callable[..., Ran]) -> None:
    assert "limits, kernels, libraries, devices, frames" in cli("bench", "engine", "--preset", "all").error


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_what_there_is_and_references_come_first(preset: str) -> None:
    known = set()
    for row in map(Row.parse, PRESETS[preset]):
        assert row.backend in ("auto", *format_spec(row.format).backends)
        assert row.step_cache in step_caches()
        if row.is_reference:
            known.add(row.drawing)
        assert not row.compared or row.drawing in known, row


def test_rows_of_several_devices_are_compared_with_one(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    """Two stand-ins on a processor."""
    out = tmp_path / "engine.json"
    small = ("--shape", "tiny", "--size", 32, "--num-timesteps", 3, "--repeat", 1, "--both-batches", "--device", "cpu")
    two = "source:devices=cpu,cpu:divide=guidance"
    rows = ("source", two, f"{two}:launcher=request", f"{two}:without=peer", two)
    assert cli("bench", "engine", *rows, *small, "--out", out).code == 0
    _, *several = json.loads(out.read_text())["results"]
    assert all(row["equals_reference"] is True and row["guidance_batch"] is False for row in several)
    (others,) = zip(*(row["others"] for row in several), strict=True)
    assert {(other["device"], other["streamed_units"]) for other in others} == {("cpu", 0)}
    assert [other["launcher"] for other in others] == ["thread", "request", "thread", "thread"]
    one, off = "in one memory", "through the host's memory: peer to peer is switched off by LOWMEM_BAGEL_DISABLE"
    assert [other["exchange"] for other in others] == [one, one, off, one]


def test_rows_of_frames_are_references_of_their_own(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    out = tmp_path / "engine.json"
    small = ("--shape", "tiny", "--num-timesteps", 2, "--repeat", 1, "--device", "cpu")
    rows = [f"source::frames=2:frame_mode={mode}:size=32" for mode in ("together", "turn")]
    assert all(Row.parse(row).is_reference for row in rows)
    assert cli("bench", "engine", *rows, *small, "--out", out).code == 0
    together, turn = json.loads(out.read_text())["results"]
    assert together["finite"] and turn["finite"]
    assert turn["runs"][0]["prefill"]["seconds"] > together["runs"][0]["prefill"]["seconds"]
    assert turn["predicted"]["peak_bytes"] > 0


def test_a_run_records_every_row(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    rows = (
        "source", "source:8", "source:step_cache=taylorseer", "source:timesteps=3", "source::ask",
        "source:backend=quanto", "source:previews=4",
    )  # fmt: skip
    out = tmp_path / "engine.json"
    small = ("--shape", "tiny", "--size", 32, "--num-timesteps", 9, "--max-new-tokens", 4, "--repeat", 1)
    assert cli("bench", "engine", *rows, *small, "--out", out).code == 0
    record = json.loads(out.read_text())
    assert [result["row"] for result in record["results"]] == list(rows)
    assert record["command"].startswith("lowmem-bagel bench engine source source:8 source:step_cache=taylorseer")
    reference, limited, cached, short, answer, wrong, previewed = record["results"]
    assert reference["seconds"]["min"] > 0 and reference["finite"]
    assert limited["equals_reference"] is True and limited["relative_l2_to_reference"] == 0
    assert cached["equals_reference"] is False and 0 < cached["relative_l2_to_reference"] < 1
    assert cached["evaluations_computed"] < cached["evaluations"]
    assert short["extrapolated"] == f"from 4 forwards measured to the {cached['evaluations']} of a whole picture"
    assert short["extrapolated_seconds"] > short["seconds"]["min"]
    assert answer["tokens"] <= 4
    assert "quanto" in wrong["error"]
    assert previewed["equals_without_previews"] is True and previewed["equals_reference"] is True
    assert 0 < previewed["preview_seconds"] < previewed["previewed_runs"][0]["denoise"]["seconds"]


@pytest.mark.parametrize("format", ["source", "int8"])
def test_a_row_with_an_adapter_is_measured_with_it(tmp_path: Path, cli: Callable[..., Ran], format: str) -> None:
    out = tmp_path / "engine.json"
    small = ("--shape", "tiny", "--size", 32, "--num-timesteps", 3, "--repeat", 1, "--device", "cpu")
    assert cli("bench", "engine", f"{format}:lora=4", *small, "--out", out).code == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["finite"]
    assert ("adapters beside" in result["linears"]) == (format == "int8")


def test_large_matrices_are_made_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "LARGE", 5000)
    made = synthetic.make_tensor(tensor_table(shapes.TINY)[LM_HEAD], "cpu")
    assert made.shape == (512, 256) and made.dtype == torch.bfloat16
    assert abs(made.float().std().item() / synthetic.WEIGHT_STD - 1) < 0.02
    assert made[:19].ne(made[19:38]).any()


def test_the_floor_counts_a_pictures_forwards(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    out = tmp_path / "floor.json"
    assert cli("bench", "floor", "--shape", "tiny", "--size", 64, "--num-timesteps", 6, "--out", out).code == 0
    found = json.loads(out.read_text())["results"]
    assert found["forwards"] == 2 * 5, "five steps, all of them guided"
    assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0

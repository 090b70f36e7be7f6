"""Variants compared with their source: what is lossless is exactly zero, the rest is ordered as it must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lowmem_bagel.benchmarks.report.fidelity.material import Material, Request
from lowmem_bagel.benchmarks.report.fidelity.measure import Terms, Wanted, measure_fidelity
from lowmem_bagel.benchmarks.report.fidelity.observe import Work
from lowmem_bagel.benchmarks.report.fidelity.subjects import Checkpoint, RandomWeights
from PIL import Image
from support.command import Ran
from support.paths import CHECKPOINT

STEPS = 7
MATERIAL = Material({"name": "few"}, (Request("a red circle"), Request("two")), ("a red circle",), (Request("what?"),))
WORK = Work(MATERIAL, 32, STEPS + 1, 6, 1, True, 1)
ZERO = [0.0] * STEPS


def rows(found: dict[str, Any]) -> dict[str, Any]:
    json.dumps(found, allow_nan=False)
    return {row["name"]: row for row in found["variants"]}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("fidelity")
    broken = place / "broken"
    broken.mkdir()
    wanted = Wanted(("dfloat11", str(broken), "int8"), ("taylorseer",), arithmetic=("float32",))
    known: list[int] = []
    terms = Terms("cpu", "float32", WORK, pictures=place / "f_pictures", kept=1)
    found = measure_fidelity(
        Checkpoint(CHECKPOINT), wanted, terms, lambda so_far: known.append(len(so_far["variants"]))
    )
    assert known == list(range(6))
    return {"place": place, "broken": str(broken), "source": found["source"], **rows(found)}


@pytest.mark.parametrize("name", ["dfloat11", "float32"])
def test_lossless_is_exactly_zero(measured: dict[str, Any], name: str) -> None:
    row = measured[name]
    assert row["exact"] is True
    assert row["text"]["kl_nats"] == {"mean": 0.0, "max": 0.0} and row["text"]["tokens"] > 6
    assert (row["text"]["greedy_agreement"], row["text"]["equal_answers"]) == (1.0, 1.0)
    assert row["pictures"]["psnr_db"] == {"median": "inf", "worst": "inf"}
    assert row["pictures"]["ssim"] == {"median": 1.0, "worst": 1.0} and row["pictures"]["equal"] == 2
    assert row["velocity"] == {"per_step": ZERO, "first_plain": 0.0, "first_guided": 0.0}
    assert set(row["layers"]) == {0.0}


def test_a_loss_shows_in_every_figure(measured: dict[str, Any]) -> None:
    row = measured["int8"]
    assert (row["exact"], row["state"], row["kind"]) == (False, "measured", "format")
    assert row["text"]["kl_nats"]["max"] >= row["text"]["kl_nats"]["mean"] > 0
    assert row["pictures"]["psnr_db"]["worst"] <= row["pictures"]["psnr_db"]["median"] < 80
    assert min(row["velocity"]["per_step"]) > 0 and min(row["layers"]) > 0
    assert "LPIPS" in row["pictures"]["perceptual"]["missing"]
    assert measured["source"]["stored_bytes"] > row["stored_bytes"] > 0


def test_errors_of_steps_do_not_add_up(measured: dict[str, Any]) -> None:
    """Every step is given the source's latent: what a step cache computes is exact, what it predicts is not."""
    row = measured["taylorseer"]
    assert row["velocity"]["per_step"][:5] == ZERO[:5]
    assert row["velocity"]["per_step"][5] > 0.001
    assert row["layers"] is None and row["exact"] is False
    assert row["text"]["kl_nats"]["max"] == 0.0


def test_what_fails_is_a_row(measured: dict[str, Any]) -> None:
    row = measured[measured["broken"]]
    assert row["state"] == "failed" and row["why"].startswith("CheckpointError: ") and "\n" not in row["why"]
    assert {row[name] for name in ("exact", "text", "pictures", "velocity", "layers", "accuracy")} == {None}


def test_pictures_are_kept_beside_the_record(measured: dict[str, Any]) -> None:
    for name in ("source", "int8"):
        files = measured[name]["files"] if name == "source" else measured[name]["pictures"]["files"]
        assert files == [f"f_pictures/{name}-0.png"]
        with Image.open(measured["place"] / files[0]) as picture:
            assert picture.size == (32, 32)


def test_random_weights_are_the_same_numbers_in_every_variant() -> None:
    work = Work(MATERIAL, 32, 3, 6, 1, False, 1)
    wanted = Wanted(("dfloat11", "gguf-q8_0", "nf4"), arithmetic=("float16", "bfloat16"))
    subject = RandomWeights("tiny", 1, "cpu", 0)
    found = rows(measure_fidelity(subject, wanted, Terms("cpu", "bfloat16", work), lambda _: None))
    assert {row["why"] for row in found.values()} == {None}
    assert found["dfloat11"]["exact"] is True and found["dfloat11"]["layers"] == [0.0]
    errors = {name: row["velocity"]["first_plain"] for name, row in found.items()}
    assert errors["dfloat11"] == 0 < errors["gguf-q8_0"] < errors["nf4"] < 0.5
    assert (found["float16"]["dtype"], found["bfloat16"]["dtype"]) == ("float16", "bfloat16")
    assert 0 < 4 * errors["float16"] < errors["bfloat16"], "both are compared with float32"
    assert found["nf4"]["pictures"] is None and found["nf4"]["text"]["greedy_agreement"] is None


def test_the_demo_checkpoint_is_judged(cli: Callable[..., Ran], tmp_path: Path) -> None:
    few = ("--pictures", 1, "--texts", 1, "--num-timesteps", 3, "--trajectories", 1, "--size", 64, "--judged", 1)
    out = tmp_path / "f.json"
    adapter = Path("lowmem_bagel") / "demo_checkpoint" / "cross"
    ran = cli("bench", "fidelity", "--device", "cpu", "--variants", "", "--adapters", adapter, *few, "--out", out)
    assert ran.code == 0, ran.err
    record = json.loads(out.read_text())
    assert record["benchmark"] == "fidelity" and record["command"].startswith("lowmem-bagel bench fidelity")
    [row] = record["results"]["variants"]
    assert (row["name"], row["kind"], row["state"]) == ("cross", "adapter", "measured")
    assert {task["total"] for task in row["accuracy"]["tasks"].values()} == {1}
    assert row["velocity"]["first_plain"] > 0 == row["text"]["kl_nats"]["max"], "it changes what draws alone"
    assert (tmp_path / row["pictures"]["files"][0]).is_file()

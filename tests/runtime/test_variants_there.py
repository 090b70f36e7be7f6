"""Other devices that hold a variant of their own: what they compute is that variant's, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.command import Ran
from support.devices import BRIEF as REQUESTS
from support.devices import shared

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import MODEL_FILE
from lowmem_bagel.errors import CheckpointError
from lowmem_bagel.ops.errors import relative_l2


@pytest.fixture(scope="module")
def folders(small_pictures: BagelPipeline, small_variant_of: Callable[[str], Path]) -> dict[str, Path]:
    source = small_pictures.model.folder.path
    return {"source": source, **{name: small_variant_of(name) for name in ("int8", "dfloat11")}}


@pytest.mark.parametrize("divide", ["guidance", "layers"])
def test_lossless_ones_give_what_one_device_gives(folders: dict[str, Path], divide: str) -> None:
    alone = shared(folders["source"], "cpu", dtype="bfloat16")
    both = shared(folders["source"], f"cpu,cpu={folders['dfloat11']}", dtype="bfloat16", divide=divide)
    assert both.model.on_card(1).folder.format == "dfloat11"
    assert "results are those of one card" in both.model.plan.reasons["variants"]
    assert "of the same checkpoint" in both.model.on_card(1).plan.reasons["variant"]
    for name in ("generate", "edit"):
        found, wanted = REQUESTS[name](both), REQUESTS[name](alone)
        assert found.latent is not None and wanted.latent is not None and found.latent.equal(wanted.latent)
        assert found.settings["formats of other cards"] == {"cpu": "dfloat11"}
    both.close()


def test_a_lossy_one_computes_its_branch(folders: dict[str, Path]) -> None:
    """Nearer to the checkpoint's picture than one whose branches are all of it, and further than none."""
    option = {"dtype": "float32", "backend": "native"}
    pipes = {
        "source": shared(folders["source"], "cpu", dtype="float32"),
        "both": shared(folders["source"], f"cpu,cpu={folders['int8']}", dtype="float32"),
        "int8": shared(folders["int8"], "cpu", **option),
        "other way": shared(folders["int8"], f"cpu,cpu={folders['source']}", **option),
    }
    assert pipes["both"].model.plan.branches["text"] == 1, "the one that a drawing has beside the full one"
    assert "results are not those of one card" in pipes["both"].model.plan.reasons["variants"]
    drawn = {name: REQUESTS["generate"](pipe).latent for name, pipe in pipes.items()}
    wanted = drawn.pop("source")
    assert wanted is not None
    away = {name: relative_l2(latent, wanted) for name, latent in drawn.items() if latent is not None}
    assert len(away) == 3 and min(away.values()) > 1e-4, "each computes something in INT8"
    assert len({round(error, 6) for error in away.values()}) == 3, "and not the same"
    assert max(away.values()) < 0.2
    answers = [REQUESTS["answer"](pipes[name]).token_ids for name in ("both", "source")]
    assert answers[0] == answers[1], "which the first device gives alone"
    for name in ("both", "other way"):
        pipes[name].close()


def test_another_checkpoints_is_refused(folders: dict[str, Path], spoilable: Path) -> None:
    tensors = load_file(spoilable / MODEL_FILE)
    name = "language_model.model.layers.0.input_layernorm.weight"
    tensors[name] = tensors[name] * 2
    save_file(tensors, spoilable / MODEL_FILE)
    with pytest.raises(CheckpointError, match=f"was made from another checkpoint: {name} is another"):
        shared(folders["int8"], f"cpu,cpu={spoilable}")


def test_the_commands_take_it(folders: dict[str, Path], tmp_path: Path, cli: Callable[..., Ran]) -> None:
    devices = ("--devices", f"cpu,cpu={folders['int8']}", "--divide", "guidance")
    shown = cli("plan", folders["source"], *devices)
    assert shown.code == 0 and "variants: cpu holds int8, of int8" in shown.out
    out = tmp_path / "out.png"
    drawn = cli(
        "generate", "a red circle", "--model", folders["source"], *devices, "-o", out,
        "--height", 32, "--width", 32, "--num-timesteps", 2,
    )  # fmt: skip
    assert drawn.code == 0, drawn.err
    assert "is missing" in cli("plan", folders["source"], "--devices", f"cpu,cpu={tmp_path}").error
    assert (
        "unknown format 'int7'"
        in cli("plan", "--shape", "bagel-7b", "--card", "4090,3060", "--devices", "0,1=int7").error
    )

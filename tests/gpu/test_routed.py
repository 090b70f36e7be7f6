"""Routed experts on a real GPU: by their kernels, to the same bits wherever their weights wait."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowmem_bagel.converters.engine.registry import convert_folder
from support.layouts import golden, routed
from support.paths import CHECKPOINT
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.ops.errors import relative_l2
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.planner.plan import Residency
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.settings import LoadOptions

pytestmark = pytest.mark.gpu

FORMATS = ("source", "int8", "nf4", "dfloat11", "gguf")
UNITS = tuple((layer, "gen") for layer in range(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Half of 8 experts active."""
    root = tmp_path_factory.mktemp("routed")
    made = {"source": routed(golden(), count=8, active=4, layers=(1, 2), gates=0.02).write(root / "source")}
    for name in FORMATS[1:]:
        convert_folder(made["source"], root / name, name)
        made[name] = root / name
    return made


def pipeline(folder: Path, residency: Residency, **options: object) -> BagelPipeline:
    opened = ModelFolder.open(folder)
    plan = plan_for(opened, LoadOptions(device="cuda", dtype="bfloat16", **options))
    return BagelPipeline(load_model(opened, replace(plan, guidance_batch=True, residency=residency)))


def drawn(pipe: BagelPipeline) -> Tensor:
    latent = pipe.generate("a red circle", height=128, width=96, seed=3, num_timesteps=5).latent
    assert latent is not None and latent.isfinite().all()
    return latent


@pytest.mark.parametrize("format", FORMATS)
def test_they_run_by_their_kernels_and_stream_to_the_same_bits(folders: dict[str, Path], format: str) -> None:
    resident = pipeline(folders[format], Residency())
    if torch.cuda.get_device_capability() >= (8, 0):
        assert "routed experts" not in resident.model.plan.reasons
    wanted = drawn(resident)
    assert torch.equal(drawn(resident), wanted), "nothing depends on the order of programs"
    for source in ("pinned", "disk"):
        assert torch.equal(drawn(pipeline(folders[format], Residency(UNITS, 2, source))), wanted)


@pytest.mark.parametrize("format", ["source", "int8", "nf4"])
def test_all_experts_together_are_the_mlp_that_was_cut(format: str, tmp_path: Path) -> None:
    """INT8 rounds activations of each expert by themselves, and NF4's blocks of short rows are others."""
    whole, parts = CHECKPOINT, routed(golden(), count=8, active=8, layers=(1, 2)).write(tmp_path / "parts")
    if format != "source":
        whole, parts = (convert(folder, tmp_path, format) for folder in (whole, parts))
    bound = {"source": 0.1, "int8": 0.4, "nf4": 0.9}[format]
    assert relative_l2(drawn(pipeline(parts, Residency())), drawn(pipeline(whole, Residency()))) < bound


def convert(folder: Path, out: Path, format: str) -> Path:
    convert_folder(folder, out / f"{folder.name}-{format}", format)
    return out / f"{folder.name}-{format}"

"""The adapter that teaches the demo checkpoint a shape: its scenes, what is trained, and the files that come of it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from lowmem_bagel.benchmarks.demo.adapter import AdapterTrainer, adapter_scenes, drawn_rightly, with_crosses
from lowmem_bagel.benchmarks.demo.classifier import judge_drawing, read_picture
from lowmem_bagel.benchmarks.demo.scenes import CROSS, SHAPES, random_scene, render
from lowmem_bagel.benchmarks.demo.sentences import caption
from lowmem_bagel.converters.engine.convert import convert
from lowmem_bagel.converters.int8 import Int8Converter

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.demo_checkpoint import FOLDER


def test_crosses_are_drawn_and_read() -> None:
    rng = Random(0)
    seen = 0
    for _ in range(30):
        scene = with_crosses(random_scene(rng))
        said = caption(rng, scene)
        assert judge_drawing(render(scene), said, (*SHAPES, CROSS)) == []
        if any(item.shape == CROSS for item in scene.items):
            seen += 1
            assert "cross" in said.text.lower()
            assert judge_drawing(render(scene), said) != []
    assert seen > 5


def test_some_scenes_of_the_training_stay_as_they_are() -> None:
    scenes = adapter_scenes(Random(1), 200)
    crossed = sum(any(item.shape == CROSS for item in scene.items) for scene in scenes)
    assert 130 < crossed < 170
    assert any(region.shape == "diamond" for scene in scenes for region in read_picture(render(scene)).regions)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdapterTrainer, Path]:
    torch.manual_seed(0)
    trainer = AdapterTrainer(FOLDER, examples=6, rank=2, alpha=4.0, batch=2, rng=Random(2))
    trainer.train(3, 60, 1e-2)
    out = tmp_path_factory.mktemp("adapter") / "cross"
    trainer.write(out)
    return trainer, out


def test_what_is_written_is_what_was_trained(trained: tuple[AdapterTrainer, Path]) -> None:
    """The opened adapter adds to each weight what the trained factors add to the stacked one."""
    trainer, out = trained
    base = ModelFolder.open(FOLDER)
    folder = base.adapted([str(out)])
    for factors in trainer.factors:
        whole = (factors.b @ factors.a).detach()
        parts = [folder.tensor(f"{m}.weight") - base.tensor(f"{m}.weight").float() for m in factors.modules]
        assert whole.abs().max() > 0
        assert torch.linalg.norm(torch.cat(parts) - whole) < 0.02 * torch.linalg.norm(whole)


def test_the_gen_expert_alone_is_changed(trained: tuple[AdapterTrainer, Path]) -> None:
    trainer, out = trained
    base = ModelFolder.open(FOLDER)
    changed = [n for n, t in base.adapted([str(out)]).stored.items() if t is not base.stored[n]]
    assert len(changed) == 7 * base.config.decoder.num_layers
    assert all("moe_gen" in name for name in changed)
    assert all(not p.requires_grad for n, p in trainer.bagel.named_parameters() if "low_rank" not in n)


SHIPPED = FOLDER / "cross"
TIMESTEPS = 8


def test_the_shipped_one_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1_000_000


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("variant") / "int8"
    convert(FOLDER, out, Int8Converter({}))
    return out


@pytest.mark.parametrize("quantized", [False, True])
def test_the_shipped_one_teaches_crosses(int8: Path, quantized: bool) -> None:
    """Added to the weights, and beside INT8's; without it none is ever drawn, so that a few pictures tell. A
    third of the timesteps of its record do."""
    folder = int8 if quantized else FOLDER
    taught = BagelPipeline.from_pretrained(folder, device="cpu", lora=[str(SHIPPED)])
    assert drawn_rightly(taught, 3, 7, TIMESTEPS) >= 2
    assert drawn_rightly(BagelPipeline.from_pretrained(folder, device="cpu"), 2, 7, TIMESTEPS) == 0

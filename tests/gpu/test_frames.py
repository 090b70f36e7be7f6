"""Frames on a card: what the processor draws, and the same to the bit whether weights are resident or stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.cards import RESIDENT, STREAMED, pipeline_on
from support.numeric import relative_l2
from support.pictures import noise

from lowmem_bagel import BagelPipeline

pytestmark = pytest.mark.gpu

ASKED: dict[str, dict[str, Any]] = {
    "together": {"frames": 3, "frame_delta": 2},
    "turn": {"frames": 3, "frame_mode": "turn"},
    "turns": {"turns": ["left", "right"]},
}
SETTINGS: dict[str, Any] = {"height": 64, "width": 96, "num_timesteps": 5, "seed": 4, "cfg_interval": (0.0, 1.0)}
PICTURE = Image.fromarray(noise(64, 96))


def drawn(pipe: BagelPipeline, asked: str, **changed: Any) -> torch.Tensor:
    latent = pipe.run([PICTURE, "make it blue"], **SETTINGS, **ASKED[asked], **changed).latent
    assert latent is not None and latent.isfinite().all()
    return latent


@pytest.fixture(scope="module")
def folder(small_pictures: BagelPipeline) -> Path:
    return small_pictures.model.folder.path


@pytest.mark.parametrize("asked", ASKED)
def test_frames_are_those_of_the_processor(folder: Path, small_pictures: BagelPipeline, asked: str) -> None:
    pipe = pipeline_on("cuda:0", folder, "float32", RESIDENT)
    # A drawn picture is rounded to 8 bits before it is looked at, so that one level may differ.
    tolerance = 1e-3 if asked == "together" else 2e-2
    assert relative_l2(drawn(pipe, asked), drawn(small_pictures, asked)) < tolerance
    pipe.close()


@pytest.mark.parametrize("cache", ["none", "taylorseer"])
@pytest.mark.parametrize("asked", ASKED)
def test_streamed_frames_are_the_resident_ones(folder: Path, asked: str, cache: str) -> None:
    found = []
    for residency in (RESIDENT, STREAMED):
        pipe = pipeline_on("cuda:0", folder, "bfloat16", residency)
        found.append(drawn(pipe, asked, step_cache=cache))
        pipe.close()
    assert torch.equal(*found)

"""A request's terms while it waits: small, and the same to the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from support.pictures import noise, pixels
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.config import BagelConfig, ResizeRule
from lowmem_bagel.generation.images import resize, to_bytes
from lowmem_bagel.generation.inputs import PictureBlock, encode_latents, shown_patches, to_wait
from lowmem_bagel.model.vision import patchify
from lowmem_bagel.pictures.opening import Picture

RULE = ResizeRule(1024, 512, 16)
CONFIG = cast(BagelConfig, SimpleNamespace(vae_resize=RULE))


def waiting(term: str | Picture) -> Any:
    (kept,) = to_wait([term], CONFIG)
    return kept


@pytest.mark.parametrize("size", [(2000, 1500), (1025, 1024), (3000, 300), (1031, 777), (1024, 1024), (40, 30)])
def test_what_waits_is_small_and_shown_as_ever(size: tuple[int, int]) -> None:
    picture = Picture(Image.fromarray(noise(size[1], size[0])), ("a note",))
    kept = waiting(picture)
    assert kept.notes == picture.notes
    assert kept.image.width * kept.image.height <= size[0] * size[1]
    assert (pixels(resize(kept.image, RULE)) == pixels(resize(picture.image, RULE))).all()


def test_a_large_picture_does_not_wait_large() -> None:
    kept = waiting(Picture(Image.new("RGB", (8000, 6000))))
    assert kept.image.size == RULE.resized(8000, 6000)


def test_a_text_stays() -> None:
    assert waiting("a text") == "a text"


def test_encoders_are_shown_a_picture_s_values_and_layout(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions begin with a pixel's colors beside each other: another layout would be another order of sums."""
    model, image = small_pictures.model, Image.fromarray(noise(32, 48))
    assert model.vae is not None
    shown: list[Tensor] = []
    monkeypatch.setattr(model.vae, "encode", lambda pixels, noise: (shown.append(pixels), noise)[1])
    values = (torch.from_numpy(noise(32, 48)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    encode_latents(model, image, torch.zeros(1, model.folder.config.vae.z_channels, 4, 6))
    (pixels,) = shown
    assert pixels[0].equal(values) and pixels[0].stride() == values.stride()
    block = PictureBlock(image, False, model.folder.config)
    wanted = patchify((to_bytes(block.vit_image).permute(2, 0, 1).float() / 255 - 0.5) / 0.5, 14)
    assert shown_patches(model, block).equal(wanted)

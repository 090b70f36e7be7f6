"""Latents that were drawn, decoded again on their own."""

from __future__ import annotations

import pytest
import torch

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import SettingError
from lowmem_bagel.model.vision import unpatchify


def test_a_drawn_latent_decodes_to_its_picture(small_pictures: BagelPipeline) -> None:
    drawn = small_pictures.generate("a red circle", height=32, width=48, seed=3, num_timesteps=3)
    config = small_pictures.model.folder.config
    assert drawn.latent is not None and drawn.image is not None
    latent = unpatchify(drawn.latent, 32 // config.token_pixels, 48 // config.token_pixels, config.latent_patch)
    for decoded in small_pictures.decode(torch.stack([latent, latent])):
        assert decoded.tobytes() == drawn.image.tobytes()


@pytest.mark.parametrize("shape", [(16, 4, 4), (1, 3, 4, 4), (0, 16, 4, 4)])
def test_other_latents_are_refused(small_pictures: BagelPipeline, shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="latents of this model are"):
        small_pictures.decode(torch.zeros(shape))

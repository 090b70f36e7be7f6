"""Colors fitted to an autoencoder: what they are worth on the demo checkpoint, and that they are its own.

Against six pictures of the demo checkpoint, each averaged over 8x8 pixels, where the best linear colors that there are
for these pictures differ by 17.4 of 255 (correlation 0.972): those fitted here 22.8 (0.960); those fitted to decoded
random latents 78 to 36 (0.82 to 0.92), by how smooth they are.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.config import VaeConfig
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.generation.images import from_pixels
from lowmem_bagel.model.preview import LatentColors
from lowmem_bagel.model.vae import Vae
from lowmem_bagel.model.vision import unpatchify

CONFIG = VaeConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)


@pytest.fixture(scope="module")
def demo() -> BagelPipeline:
    return BagelPipeline.from_pretrained(FOLDER, device="cpu")


@pytest.mark.parametrize("prompt", ["a red circle", "a large purple cross on a white background"])
def test_a_finished_latent_looks_like_its_picture(demo: BagelPipeline, prompt: str) -> None:
    drawn = demo.generate(prompt, seed=0, num_timesteps=8)
    assert drawn.image is not None and drawn.latent is not None
    wanted = np.asarray(drawn.image, dtype=float).reshape(16, 8, 16, 8, 3).mean((1, 3))
    small = from_pixels(demo.model.colors(unpatchify(drawn.latent, 8, 8, 2)))
    assert small.size == (16, 16)
    found = np.asarray(small, dtype=float)
    assert np.abs(found - wanted).mean() < 35
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.9


def test_colors_are_the_autoencoders_own() -> None:
    """Channels in another order are found there, whatever they mean; and a bias of the encoder is made up for."""
    torch.manual_seed(0)
    vae = Vae(CONFIG).requires_grad_(False)
    plain = LatentColors(vae)
    order = torch.randperm(16)
    out = vae.encoder.conv_out
    out.weight[:16], out.bias[:16] = out.weight[order], out.bias[order] + 3.0  # type: ignore[index]
    shuffled = LatentColors(vae)
    latent = torch.randn(16, 5, 7)
    moved = latent[order] + 3.0 * CONFIG.scale_factor
    assert torch.allclose(shuffled(moved), plain(latent), atol=1e-2)
    assert not torch.allclose(plain(moved), plain(latent), atol=1e-1)


def test_fitting_is_the_same_every_time_and_draws_nothing() -> None:
    torch.manual_seed(0)
    vae = Vae(CONFIG)
    state = torch.get_rng_state()
    first, second = LatentColors(vae), LatentColors(vae)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert first.weight.shape == (3, 16) and first.bias.shape == (3, 1, 1)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_autoencoder_without_sense_gives_colors_all_the_same(value: float) -> None:
    """A request is not to end because of its previews."""
    vae = Vae(CONFIG)
    for parameter in vae.parameters():
        parameter.data.fill_(value)
    assert LatentColors(vae)(torch.randn(16, 2, 2)).isfinite().all()

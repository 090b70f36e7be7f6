"""Frames drawn together, held to an implementation of their description that shares nothing with the package."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from PIL import Image
from support.frames_reference import Asked, Block, FramesReference, Picture
from support.numeric import relative_l2
from support.paths import CHECKPOINT
from support.pictures import noise

from lowmem_bagel import BagelPipeline
from lowmem_bagel.generation.inputs import PictureBlock, encode_latents, encoding_noise, shown_patches
from lowmem_bagel.sampling.denoise import Step

TOLERANCE = 1e-5
SIZE = {"height": 32, "width": 48}
TERMS: dict[str, list[Any]] = {
    "none": ["a red circle"],
    "one": [0, "make it blue"],
    "three": [0, 1, "two views", 2, "and the next"],
}
RENORM = dict(zip(((n, before) for n in (1, 2, 5) for before in TERMS), cycle(("global", "channel", "text_channel"))))


def reference_terms(pipe: BagelPipeline, terms: list[Any], generator: torch.Generator) -> list[Block]:
    """Texts as ids, and pictures as the encoders, which other cases hold to the original, make of them."""
    model, found = pipe.model, list[Block]()
    for term in terms:
        if isinstance(term, str):
            found.append(model.tokenizer.text_block(term))
            continue
        block = PictureBlock(term, True, model.folder.config)
        latents = encode_latents(model, block.image, encoding_noise(block, generator))
        seen = model.bagel.embed_picture(shown_patches(model, block), *block.vit_grid)
        found.append(Picture(latents, block.latent_grid, seen))
    return found


@pytest.fixture(scope="module")
def reference(small_pictures: BagelPipeline) -> FramesReference:
    tokenizer = small_pictures.model.tokenizer
    return FramesReference(CHECKPOINT, tokenizer.vision_start, tokenizer.vision_end)


@pytest.mark.parametrize("before", TERMS)
@pytest.mark.parametrize("count", [1, 2, 5])
@torch.inference_mode()
def test_frames_are_the_reference_s(
    small_pictures: BagelPipeline, reference: FramesReference, count: int, before: str
) -> None:
    pipe, renorm = small_pictures, RENORM[count, before]
    # Of different sizes: which positions a picture's tokens have is nothing that two equal ones would tell.
    pictures = [Image.fromarray(noise(40 + 8 * i, 56 - 8 * i, seed=i)) for i in range(3)]
    terms = [term if isinstance(term, str) else pictures[term] for term in TERMS[before]]
    delta = 1 if count == 2 else 3
    image_scale = 1.0 if before == "none" else 2.0
    steps: list[Step] = []
    result = pipe.run(
        terms, seed=5, num_timesteps=4, frames=count, frame_delta=delta, cfg_text_scale=4.0, cfg_img_scale=image_scale,
        cfg_interval=(0.0, 1.0), cfg_renorm_type=renorm, callback=steps.append, **SIZE,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    told = reference_terms(pipe, terms, generator)
    assert torch.equal(steps[0].x_t[:6], torch.randn(6, steps[0].x_t.shape[1], generator=generator))
    asked = Asked(count, delta, (2, 3), 4, 3.0, 4.0, image_scale, renorm)
    latent, velocities = reference.draw(reference.branches(told), steps[0].x_t, asked)
    assert len(result.images) == count
    for step, velocity in zip(steps, velocities, strict=True):
        assert relative_l2(step.velocity, velocity) < TOLERANCE
    assert relative_l2(result.latent, latent) < TOLERANCE


@torch.inference_mode()
def test_the_reference_tells_positions_and_masks(reference: FramesReference, small_pictures: BagelPipeline) -> None:
    """What the cases above could not tell apart they would not hold."""
    ids = small_pictures.model.tokenizer.text_block("a red circle")
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))

    def velocity(x: torch.Tensor, delta: int) -> torch.Tensor:
        return reference.velocity([ids], x, 0.5, Asked(len(x) // 6, delta, (2, 3), 4, 3.0, 4.0, 1.0, "global"))

    joint = velocity(x.double(), 1)
    assert relative_l2(velocity(x.double(), 2), joint) > 100 * TOLERANCE
    assert relative_l2(torch.cat([velocity(part.double(), 1) for part in x.split(6)]), joint) > 100 * TOLERANCE

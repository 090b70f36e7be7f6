"""A request looked into gives the very numbers that carrying it out gives."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from support.pictures import noise

from lowmem_bagel import BagelPipeline
from lowmem_bagel.generation.inputs import open_terms
from lowmem_bagel.generation.probe import PictureProbe, looking, text_logits
from lowmem_bagel.sampling.denoise import Step

SMALL: dict[str, Any] = {"seed": 3, "height": 32, "width": 48, "num_timesteps": 7, "cfg_interval": (0.6, 1.0)}
PICTURE = Image.fromarray(noise(40, 56, seed=1))


def taken(pipe: BagelPipeline, terms: list[Any], **settings: Any) -> list[Step]:
    steps: list[Step] = []
    pipe.run(terms, output="image", callback=steps.append, **SMALL | settings)
    return steps


def test_velocities_are_those_of_the_steps(small_pictures: BagelPipeline) -> None:
    for terms in (["a red circle"], [PICTURE, "make it blue"]):
        steps = taken(small_pictures, terms, step_cache="taylorseer")
        with looking(small_pictures.model):
            probe = PictureProbe(small_pictures.model, small_pictures.prepare(terms, **SMALL))
            assert torch.equal(probe.noise, steps[0].x_t)
            sampler = probe.sampler("taylorseer")
            for step in steps:
                assert torch.equal(sampler.velocity(step.x_t, step.t, torch.tensor([step.t])), step.velocity)


def test_layers_end_in_the_plain_velocity(small_pictures: BagelPipeline) -> None:
    model = small_pictures.model
    with looking(model):
        probe = PictureProbe(model, small_pictures.prepare(["a red circle"], **SMALL))
        x, time = probe.noise, torch.tensor([0.5])
        layers = [hidden.clone() for hidden in probe.sampler().layers(x, time)]
        assert len(layers) == model.folder.config.decoder.num_layers
        assert not any(torch.equal(a, b) for a, b in pairwise(layers))
        plain = probe.sampler().plain_velocity(x, time)
        assert torch.equal(model.bagel.velocity(layers[-1][None])[0], plain)
        guided = probe.sampler().velocity(x, 0.7, time)
        assert not torch.equal(guided, plain)
        assert torch.equal(probe.sampler().velocity(x, 0.5, time), plain), "guidance is off there"


def test_logits_are_those_that_an_answer_was_chosen_by(small_pictures: BagelPipeline) -> None:
    question = [PICTURE, "what is it?"]
    ids = small_pictures.run(question, output="text", max_new_tokens=8).token_ids
    with looking(small_pictures.model):
        logits = text_logits(small_pictures.model, open_terms(question), ids)
        alone = text_logits(small_pictures.model, [], ids)
    assert logits.shape == (len(ids), small_pictures.model.folder.config.decoder.vocab_size)
    assert logits.argmax(-1)[:-1].tolist() == ids[1:]
    assert not torch.equal(alone, logits), "the question is seen"

"""A request looked into instead of carried out: what any token may be followed by, and single evaluations of a sampler.

For comparing models on the same inputs. What is here is called with the model on its device and without gradients, as
`looking` sets it up, and keeps no contexts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..runtime.loaded import LoadedModel
from ..sampling.denoise import PictureSampler
from ..sampling.text import append_text
from ..settings import PictureSettings
from .drawing import frames_of, guidance_of, picture_sampler
from .inputs import Contexts, Prepared, Term, read_terms


@contextmanager
def looking(model: LoadedModel) -> Iterator[None]:
    """Probes are made and asked inside."""
    with model.on_device(), torch.inference_mode():
        yield


def text_logits(model: LoadedModel, terms: Sequence[Term], ids: Sequence[int]) -> Tensor:
    """What may follow each of the tokens `ids`, which come after the terms: logits [len(ids), vocab_size]."""
    blocks = read_terms(terms, model.folder.config, model.tokenizer, drawing=False)
    contexts = Contexts(model, blocks, 0, image_branch=False, spare=len(ids))
    generator = torch.Generator().manual_seed(0)
    for block in blocks:
        contexts.append(block, generator)
    hidden = append_text(model.bagel, contexts.full, torch.tensor(ids), model.attention)
    with model.using("lm_head"):
        return model.bagel.logits(hidden)[0]


class PictureProbe:
    """The contexts of a request to draw, and samplers on them.

    Attributes:
        noise: that the request begins from, float32 [tokens, latent_values], as `Execution.draw` draws it.
    """

    def __init__(self, model: LoadedModel, prepared: Prepared) -> None:
        assert isinstance(prepared.settings, PictureSettings) and not prepared.settings.think
        self.model, self.settings = model, prepared.settings
        blocks = read_terms(prepared.terms, model.folder.config, model.tokenizer, drawing=True)
        self.frames = frames_of(model.folder.config, blocks, self.settings)
        generator = torch.Generator().manual_seed(self.settings.seed)
        image_branch = guidance_of(self.settings).uses_image_branch
        self.contexts = Contexts(model, blocks, self.frames.tokens, image_branch, spare=0)
        for block in blocks:
            self.contexts.append(block, generator)
        self.noise = self.frames.noise(model.folder.config.latent_values, generator)

    def sampler(self, step_cache: str | None = None) -> PictureSampler:
        """A new one, with the request's step cache or another. Of several only one may be in use at a time: the
        picture's keys have one place."""
        settings = self.settings if step_cache is None else replace(self.settings, step_cache=step_cache)
        return picture_sampler(self.model, self.contexts, settings, self.frames)

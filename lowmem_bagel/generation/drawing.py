"""What a request to draw comes to before the first step: its guidance, its grid, the sampler on its contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..checkpoint.config import BagelConfig
from ..model.kv_cache import SequenceView
from ..runtime.loaded import LoadedModel
from ..sampling.denoise import Branches, PictureSampler
from ..sampling.guidance import Guidance
from ..sampling.step_caches.base import BranchCache
from ..sampling.step_caches.registry import step_cache
from ..settings import PictureSettings
from .inputs import Block, Contexts, PictureBlock


def guidance_of(settings: PictureSettings) -> Guidance:
    return Guidance(
        settings.cfg_text_scale,
        settings.cfg_img_scale,
        settings.cfg_interval,
        settings.cfg_renorm_type,
        settings.cfg_renorm_min,
    )


def latent_grid(config: BagelConfig, blocks: Sequence[Block], settings: PictureSettings) -> tuple[int, int]:
    """Rows and columns of latent tokens: the size asked for, or else the last input picture's."""
    side = config.token_pixels
    rows, columns = next((block.latent_grid for block in reversed(blocks) if isinstance(block, PictureBlock)), (0, 0))
    return (
        settings.height // side if settings.height else rows,
        settings.width // side if settings.width else columns,
    )


def picture_sampler(
    model: LoadedModel, contexts: Contexts, settings: PictureSettings, grid: tuple[int, int]
) -> PictureSampler:
    """On contexts that are complete; its step caches begin anew."""
    branches, markers = contexts.branches(), (model.tokenizer.vision_start, model.tokenizer.vision_end)
    guidance = guidance_of(settings)
    make_cache, predicts = branch_cache(settings), step_cache(settings.step_cache).predicts
    elsewhere = []
    if guidance.text_scale > 1 and model.others:
        framing = model.bagel.embed_text(torch.tensor(markers))
        elsewhere = [
            model.others[card].branches(views, framing, contexts.scratch, grid, make_cache, predicts)
            for card, views in _by_card(model, branches).items()
        ]
    return PictureSampler(
        model.bagel,
        model.attention,
        branches,
        guidance,
        markers,
        contexts.scratch,
        grid,
        make_cache,
        predicts,
        model.plan.guidance_batch,
        elsewhere,
    )


def _by_card(model: LoadedModel, branches: Branches) -> dict[int, dict[int, SequenceView]]:
    """The branches that other cards evaluate, by card; none of them is the full context's."""
    views, named = branches.distinct()
    placed: dict[int, int] = {}
    for name, card in model.plan.branches.items():
        if name in named and card in model.others:
            placed.setdefault(named[name], card)
    placed.pop(named["full"], None)
    found: dict[int, dict[int, SequenceView]] = {}
    for branch, card in placed.items():
        found.setdefault(card, {})[branch] = views[branch]
    return found


def branch_cache(settings: PictureSettings) -> Callable[[], BranchCache]:
    """What makes the step cache of a branch."""
    cache = step_cache(settings.step_cache)
    return partial(cache.branch, **{own.name: settings.step_cache_settings[own.name] for own in cache.settings})

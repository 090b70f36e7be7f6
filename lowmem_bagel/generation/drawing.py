"""What a request to draw comes to before the first step: its guidance, its frames, the sampler on its contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..checkpoint.config import BagelConfig
from ..model.kv_cache import SequenceView
from ..runtime.loaded import LoadedModel
from ..sampling.denoise import Branches, PictureSampler
from ..sampling.frames import Frames
from ..sampling.guidance import Guidance
from ..sampling.step_caches.base import BranchCache
from ..sampling.step_caches.registry import step_cache
from ..settings import PictureSettings
from .inputs import Block, Contexts, PictureBlock, TextBlock


def guidance_of(settings: PictureSettings) -> Guidance:
    return Guidance(
        settings.cfg_text_scale,
        settings.cfg_img_scale,
        settings.cfg_interval,
        settings.cfg_renorm_type,
        settings.cfg_renorm_min,
    )


def frames_of(config: BagelConfig, blocks: Sequence[Block], settings: PictureSettings) -> Frames:
    """What is drawn at a time: of the size asked for, or else of the last input picture's."""
    side = config.token_pixels
    rows, columns = next((block.latent_grid for block in reversed(blocks) if isinstance(block, PictureBlock)), (0, 0))
    return Frames(
        settings.height // side if settings.height else rows,
        settings.width // side if settings.width else columns,
        settings.frames if settings.frame_mode == "together" else 1,
        settings.frame_delta,
    )


def later_blocks(
    config: BagelConfig, frames: Frames, settings: PictureSettings, texts: Sequence[TextBlock]
) -> list[Block]:
    """What is appended after the first of frames in turn is drawn: each of them but the last, and the texts."""
    from PIL import Image

    if settings.frame_mode == "together":
        return []
    side = config.token_pixels
    blank = Image.new("RGB", (frames.columns * side, frames.rows * side))
    drawn = [PictureBlock(blank, True, config)] * (settings.frames - 1)
    return [*drawn, *texts]


def picture_sampler(
    model: LoadedModel, contexts: Contexts, settings: PictureSettings, frames: Frames
) -> PictureSampler:
    """On contexts that are complete; its step caches begin anew."""
    branches, markers = contexts.branches(), (model.tokenizer.vision_start, model.tokenizer.vision_end)
    guidance = guidance_of(settings)
    make_cache, predicts = branch_cache(settings), step_cache(settings.step_cache).predicts
    elsewhere = []
    if guidance.text_scale > 1 and model.others:
        framing = model.bagel.embed_text(torch.tensor(markers))
        elsewhere = [
            model.others[card].branches(views, framing, contexts.scratch, frames, make_cache, predicts)
            for card, views in _by_card(model, branches).items()
        ]
    return PictureSampler(
        model.bagel,
        model.attention,
        branches,
        guidance,
        markers,
        contexts.scratch,
        frames,
        make_cache,
        predicts,
        model.plan.guidance_batch,
        elsewhere,
        model.pass_graphs(),
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

"""What a request to draw comes to before the first step: its guidance, its grid, the sampler on its contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..checkpoint.config import BagelConfig
from ..runtime.loader import LoadedModel
from ..sampling.denoise import PictureSampler
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
    return PictureSampler(
        model.bagel,
        model.attention,
        contexts.branches(),
        guidance_of(settings),
        (model.tokenizer.vision_start, model.tokenizer.vision_end),
        contexts.scratch,
        grid,
        branch_cache(settings),
        step_cache(settings.step_cache).predicts,
        model.plan.guidance_batch,
    )


def branch_cache(settings: PictureSettings) -> Callable[[], BranchCache]:
    """What makes the step cache of a branch."""
    cache = step_cache(settings.step_cache)
    return partial(cache.branch, **{own.name: settings.step_cache_settings[own.name] for own in cache.settings})

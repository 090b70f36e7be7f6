"""Step caches, where those of one kind would be tried for the same."""

from __future__ import annotations

from lowmem_bagel.sampling.step_caches.base import StepCache
from lowmem_bagel.sampling.step_caches.registry import step_caches


def one_of_each_kind() -> list[StepCache]:
    """Some differ only in which steps they compute."""
    return [*{getattr(cache.branch, "func", cache.branch): cache for cache in step_caches().values()}.values()]

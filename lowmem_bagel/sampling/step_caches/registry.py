"""The step caches there are."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import SettingError
from ...extensions import with_extensions
from .base import StepCache
from .first_block import FIRST_BLOCK
from .none import NONE
from .taylorseer import TAYLORSEER
from .velocity import VELOCITY

OURS = (
    NONE,
    TAYLORSEER,
    FIRST_BLOCK,
    *VELOCITY,
)


def step_caches() -> Mapping[str, StepCache]:
    """Every cache by its name, ours first."""
    return with_extensions("step_caches", OURS, "step caches")


def step_cache(name: str) -> StepCache:
    """The cache of that name.

    Raises:
        SettingError: there is none.
    """
    known = step_caches()
    if name not in tuple(known):  # a caller may hand in anything
        raise SettingError(f"unknown step_cache {name!r}; choose one of {', '.join(known)}")
    return known[name]

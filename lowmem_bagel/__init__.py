"""BAGEL-7B-MoT on the GPU you have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors

if TYPE_CHECKING:
    from .generation.results import Result
    from .pictures.clips import Clip
    from .pipeline import BagelPipeline

__version__ = "0.1.0"
__all__ = ["BagelPipeline", "Clip", "Result", "__version__", "errors"]


def __getattr__(name: str) -> Any:
    """Torch is imported with the first use of a class that needs it, not with the package."""
    if name == "BagelPipeline":
        from .pipeline import BagelPipeline

        return BagelPipeline
    if name == "Clip":
        from .pictures.clips import Clip

        return Clip
    if name == "Result":
        from .generation.results import Result

        return Result
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

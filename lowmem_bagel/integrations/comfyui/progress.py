"""ComfyUI's progress bar and its button that stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import Cancelled
from ...generation.executor import Token
from ...sampling.denoise import Step

if TYPE_CHECKING:
    from ...generation.conversing import Drawn, Said
    from ...generation.executor import Callback
    from ...sampling.denoise import Preview

Made = TypeVar("Made")

PREVIEW_PIXELS = 512
"""Of the longer side, at most; ours are an eighth of the picture."""


class Watch:
    """A pipeline's callback: shows steps with previews, and tokens, and stops where ComfyUI says so. Whole pieces of an
    answer are shown by its node."""

    def __init__(self) -> None:
        from comfy.utils import ProgressBar

        self._bar = ProgressBar(1)
        self._coming: Preview | None = None

    def __call__(self, event: Step | Token | Said | Drawn) -> bool:
        from comfy.model_management import processing_interrupted

        if isinstance(event, Token):
            self._bar.update_absolute(event.index, event.total)
        elif isinstance(event, Step):
            self._bar.update_absolute(event.index + 1, event.total, self._preview(event))
        return not processing_interrupted()

    def _preview(self, step: Step) -> Any:
        """The picture as it forms, where one is ready: on a card at a later step, so that nobody waits."""
        if self._coming is None:
            self._coming = step.preview()
        if not self._coming.ready:
            return None
        image, self._coming = self._coming.image(), None
        return ("JPEG", image, PREVIEW_PIXELS)


def watched(run: Callable[[Callback], Made]) -> Made:
    """A request with progress, ended as ComfyUI ends its own where somebody stops it."""
    try:
        return run(Watch())
    except Cancelled:
        check_stopped()
        raise


def byte_progress() -> Callable[[int, int], None]:
    """Shows bytes done of all, and stops where ComfyUI says so: what is told may raise."""
    from comfy.utils import ProgressBar

    bar = ProgressBar(1)

    def show(done: int, total: int) -> None:
        bar.update_absolute(done, total)
        check_stopped()

    return show


def check_stopped() -> None:
    """Raises ComfyUI's InterruptProcessingException where somebody stopped it."""
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()

"""What a pipeline calls while it works: tells a job how far it is, and ends it where that is wanted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import TimeLimitError
from ..generation.conversing import Drawn, Piece, Said
from ..generation.executor import Begun, Repeated, Token
from ..sampling.denoise import Preview, Step
from .jobs import Job

if TYPE_CHECKING:
    from ..pipeline import BagelPipeline

PREVIEW_SHARE = 0.01
"""Of a picture's time, at most, goes into showing it as it forms."""
TEXT_SECONDS = 0.1
"""Between two looks at a text that is being written, at least: each decodes all of its tokens."""


@dataclass
class Watch:
    """A pipeline's callback that tells a job how far it is, and ends it where that is wanted."""

    job: Job
    pipeline: BagelPipeline
    time_limit: float
    _drawing_since: float = 0.0
    _coming: Preview | None = None
    _shown_for: float = 0.0
    """Seconds spent on previews."""
    _text_at: float = 0.0
    _ids: list[int] = field(default_factory=list)

    def __call__(self, event: Step | Token | Begun | Repeated | Piece) -> bool:
        now = time.monotonic()
        assert self.job.started is not None
        if now - self.job.started > self.time_limit:
            self.job.stop(TimeLimitError(f"took over {self.time_limit:g} s; ask for fewer steps or a smaller picture"))
        if self.job.stopped is None:
            if isinstance(event, Token):
                self._token(event, now)
            elif isinstance(event, Step):
                self._step(event, now)
            elif isinstance(event, Begun):
                self._next((), now)
            elif isinstance(event, (Said, Drawn)):
                self._next((*self.job.progress.pieces, event), now)
        return self.job.stopped is None

    def _token(self, token: Token, now: float) -> None:
        self._ids[token.index - 1 :] = [token.id]  # a request that ran out of memory begins again
        if now - self._text_at >= TEXT_SECONDS:
            self._text_at = now
            self.job.update(text=self.pipeline.model.tokenizer.decode_generated(self._ids))

    def _next(self, pieces: Sequence[Piece], now: float) -> None:
        """These are done, and another piece begins."""
        self._coming, self._shown_for, self._ids = None, 0.0, []
        left = self._predicted_left(now)
        self.job.update(pieces=pieces, text="", step=0, steps=0, preview=None, seconds_left=left)

    def _step(self, step: Step, now: float) -> None:
        done = step.index + 1
        if done == 1:  # the time of the first step is that of the preparations too
            self._drawing_since = now
            left = self._predicted_left(now)
        else:
            left = (now - self._drawing_since) / (done - 1) * (step.total - done)
        self.job.update(step=done, steps=step.total, seconds_left=left)
        if self.job.previews and self._shown_for <= PREVIEW_SHARE * (now - self._drawing_since):
            self._preview(step)

    def _preview(self, step: Step) -> None:
        begun = time.monotonic()
        if self._coming is None:
            self._coming = step.preview()
        if self._coming.ready:  # on a card at a later step
            self.job.update(preview=self._coming.image())
            self._coming = None
        self._shown_for += time.monotonic() - begun

    def _predicted_left(self, now: float) -> float:
        assert self.job.started is not None
        begun_with = self.job.progress.seconds_left or 0.0
        return max(0.0, begun_with - (now - self.job.started))

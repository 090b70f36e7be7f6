"""What a pipeline calls while it works: tells a job how far it is, and ends it where that is wanted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..errors import TimeLimitError
from ..generation.executor import Token
from ..sampling.denoise import Step
from .jobs import Job

if TYPE_CHECKING:
    from PIL import Image

    from ..pipeline import BagelPipeline

PREVIEW_SHARE = 0.01
"""Of a request's time, for pictures of it as it forms."""
TEXT_SECONDS = 0.1
"""Between two looks at a text that is being written, at least: each decodes all of its tokens."""


@dataclass
class Watch:
    """A pipeline's callback that tells a job how far it is, and ends it where that is wanted."""

    job: Job
    pipeline: BagelPipeline
    time_limit: float
    _drawing_since: float = 0.0
    _text_at: float = 0.0
    _previewing: float = 0.0
    """Seconds so far."""
    _ids: list[int] = field(default_factory=list)

    def __call__(self, event: Step | Token) -> bool:
        now = time.monotonic()
        assert self.job.started is not None
        if now - self.job.started > self.time_limit:
            self.job.stop(TimeLimitError(f"took over {self.time_limit:g} s; ask for fewer steps or a smaller picture"))
        if self.job.stopped is None:
            if isinstance(event, Token):
                self._token(event, now)
            else:
                self._step(event, now)
        return self.job.stopped is None

    def _token(self, token: Token, now: float) -> None:
        self._ids.append(token.id)
        if now - self._text_at >= TEXT_SECONDS:
            self._text_at = now
            self.job.update(text=self.pipeline.model.tokenizer.decode_generated(self._ids))

    def _step(self, step: Step, now: float) -> None:
        done = step.index + 1
        if done == 1:  # the time of the first step is that of the preparations too
            self._drawing_since = now
            left = self._predicted_left(now)
        else:
            left = (now - self._drawing_since) / (done - 1) * (step.total - done)
        preview = self._preview(step, now)
        shown = {} if preview is None else {"preview": preview}
        self.job.update(step=done, steps=step.total, seconds_left=left, **shown)

    def _preview(self, step: Step, now: float) -> Image.Image | None:
        """The picture as it forms, where it is wanted and its time is still within its share."""
        assert self.job.started is not None
        if not self.job.previews or self._previewing > PREVIEW_SHARE * (now - self.job.started):
            return None
        if step.x_t.is_cuda:  # the step's own work, which is waited for anyhow, is no preview's time
            torch.cuda.current_stream(step.x_t.device).synchronize()
        begun = time.monotonic()
        preview = step.preview()
        self._previewing += time.monotonic() - begun
        return preview

    def _predicted_left(self, now: float) -> float:
        assert self.job.started is not None
        begun_with = self.job.progress.seconds_left or 0.0
        return max(0.0, begun_with - (now - self.job.started))

"""The one thread that uses the device: loads the model, then carries out one job after the other."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import Cancelled, LowmemBagelError, TimeLimitError
from ..generation.executor import Token
from ..sampling.denoise import Step
from .jobs import Job
from .queue import FairQueue

if TYPE_CHECKING:
    from ..pipeline import BagelPipeline

LOG = logging.getLogger(__name__)
TEXT_SECONDS = 0.1
"""Between two looks at a text that is being written, at least: each decodes all of its tokens."""


@dataclass
class Pace:
    """What requests take in fact, as a multiple of what the plan says: learned from those that are done."""

    factor: float = 1.0

    def learn(self, predicted: float, seconds: float) -> None:
        """Half of what is known comes from the last request."""
        if predicted > 0:
            self.factor += (seconds / predicted - self.factor) / 2


class Worker(threading.Thread):
    """Runs until its queue is closed.

    Args:
        load: makes the pipeline; called first.
        loaded: told of the pipeline.
        failed: told why there is none; nothing is carried out then.
        ended: told of every job that was carried out, well or not.
        time_limit: seconds that a job may run.
    """

    def __init__(
        self,
        load: Callable[[], BagelPipeline],
        loaded: Callable[[BagelPipeline], None],
        failed: Callable[[BaseException], None],
        ended: Callable[[Job], None],
        queue: FairQueue,
        time_limit: float,
    ) -> None:
        super().__init__(name="lowmem-bagel worker")
        self.queue, self.time_limit, self.pace = queue, time_limit, Pace()
        self.running: Job | None = None
        self._load, self._loaded, self._failed, self._ended = load, loaded, failed, ended

    def run(self) -> None:
        try:
            pipeline = self._load()
        except BaseException as error:  # said by whoever started the server
            self._failed(error)
            return
        self._loaded(pipeline)
        while (job := self.queue.take()) is not None:
            self.running = job
            self.carry_out(job, pipeline)
            self.running = None
            self._ended(job)
            del job  # its result is its reader's alone
        pipeline.close()

    def seconds_left(self) -> float:
        """Until the running job is done; 0 where none runs."""
        job = self.running
        return 0.0 if job is None else job.progress.seconds_left or 0.0

    def carry_out(self, job: Job, pipeline: BagelPipeline) -> None:
        """Do a job. Whatever happens to it ends it, and nothing else."""
        job.started = time.monotonic()
        job.update(state="running", seconds_left=self.pace.factor * job.predicted)
        try:
            if job.stopped is not None:
                raise job.stopped
            result = pipeline.carry_out(job.prepared, Watch(job, pipeline, self.time_limit))
        except Cancelled as error:
            job.fail(job.stopped or error)
        except LowmemBagelError as error:
            job.fail(error)
        except Exception as error:
            LOG.exception("a request failed")
            job.fail(error)
        else:
            self.pace.learn(job.predicted, time.monotonic() - job.started)
            job.update(state="done", seconds_left=0.0, text=result.text, preview=None, result=result)


@dataclass
class Watch:
    """A pipeline's callback that tells a job how far it is, and ends it where that is wanted."""

    job: Job
    pipeline: BagelPipeline
    time_limit: float
    _drawing_since: float = 0.0
    _text_at: float = 0.0
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
        self.job.update(step=done, steps=step.total, seconds_left=left)

    def _predicted_left(self, now: float) -> float:
        assert self.job.started is not None
        begun_with = self.job.progress.seconds_left or 0.0
        return max(0.0, begun_with - (now - self.job.started))

"""The one thread that uses the device: loads the model, then carries out one job after the other."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import Cancelled, LowmemBagelError
from .jobs import Job
from .queue import FairQueue

if TYPE_CHECKING:
    from ..pipeline import BagelPipeline

LOG = logging.getLogger(__name__)


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
        from .watch import Watch  # which needs torch, and the server is to listen before that is there

        job.started = time.monotonic()
        job.update(state="running", seconds_left=self.pace.factor * job.predicted)
        try:
            if job.stopped is not None:
                raise job.stopped
            done = job.work(job, pipeline, Watch(job, pipeline, self.time_limit))
        except Cancelled as error:
            job.fail(job.stopped or error)
        except LowmemBagelError as error:
            job.fail(error)
        except Exception as error:
            LOG.exception("a request failed")
            job.fail(error)
        else:
            if "result" in done:  # how long a chat's answer becomes is not known beforehand
                self.pace.learn(job.predicted, time.monotonic() - job.started)
            job.update(state="done", seconds_left=0.0, preview=None, **done)

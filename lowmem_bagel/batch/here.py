"""Jobs done one after the other in this process."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ..errors import ImageError
from .jobs import Job
from .team import Tell
from .work import Outcome, carried_out, check_card, failed, fetched

if TYPE_CHECKING:
    from ..pipeline import BagelPipeline


def done_here(jobs: Iterable[Job], model: str, pipeline: BagelPipeline, tell: Tell) -> Generator[Outcome]:
    """Each job's outcome, as soon as it is there. Closes the pipeline when it ends."""
    with closing(pipeline):
        for job in jobs:
            try:
                work = fetched(job, model)
            except ImageError as error:
                yield failed(job, model, str(error))
                continue
            outcome = carried_out(pipeline, work, _telling(job, tell))
            yield outcome
            if outcome.result.traceback:
                check_card(pipeline)


def _telling(job: Job, tell: Tell) -> Any:
    """A pipeline's callback."""

    def callback(event: Any) -> None:
        drawn = hasattr(event, "x_t")
        tell("Drawing" if drawn else "Writing", job.id, event.index + drawn, event.total)

    return callback

"""Jobs done one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from ..errors import ImageError
from .jobs import Job
from .work import Outcome, Tell, carried_out, check_card, failed, fetched

if TYPE_CHECKING:
    from ..pipeline import BagelPipeline


def done_here(
    jobs: Iterable[Job], model: str, pipeline: BagelPipeline, begin: Callable[[Job], Tell | None]
) -> Iterator[Outcome]:
    """Each job's outcome, as soon as it is there. `begin` is told of each, and gives what is told of its steps."""
    for job in jobs:
        tell = begin(job)
        try:
            work = fetched(job, model)
        except ImageError as error:
            yield failed(job, model, str(error))
            continue
        outcome = carried_out(pipeline, work, tell)
        yield outcome
        if outcome.result.traceback:
            check_card(pipeline)

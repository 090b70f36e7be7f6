"""What the page's buttons do: hands a request to the service and follows it, as views to be shown. No Gradio."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...errors import LowmemBagelError
from ...pictures.opening import Picture, open_picture
from ..jobs import Job, Progress
from ..service import Outlook, Output, Service

LOG = logging.getLogger(__name__)
LOOK_SECONDS = 1.0
"""Between two looks at a job that says nothing: its place in the queue changes without it."""
VIEW_SECONDS = 0.12
"""Between two views, at least: a browser shows no more."""


class View(NamedTuple):
    """What is to be seen of a request now; `job` is None where it was refused, for `error`."""

    progress: Progress
    outlook: Outlook | None = None
    job: Job | None = None

    @property
    def error(self) -> BaseException | None:
        return self.progress.error


class Wish(NamedTuple):
    """A request as the page has it: texts, and paths of uploaded pictures."""

    terms: Sequence[str | Path]
    output: Output
    settings: Mapping[str, Any]

    def submitted(self, service: Service, client: str) -> Job:
        """Raises what `Service.submit` does."""
        return service.submit(opened_terms(self.terms), self.output, self.settings, client, previews=True)


class Submitted(Protocol):
    """What is wanted of the service: to be called beside the event loop, since pictures are opened."""

    def submitted(self, service: Service, client: str) -> Job: ...


def opened_terms(terms: Sequence[str | Path]) -> list[str | Picture]:
    """The texts, and the pictures opened within our bounds.

    Raises:
        ImageError: a file is no picture.
    """
    return [open_picture(term) if isinstance(term, Path) else term for term in terms]


@dataclass
class Clients:
    """Which job belongs to which tab of which browser page: it is cancelled there, and when that is closed."""

    service: Service
    _jobs: dict[tuple[str, str], Job] = field(default_factory=dict)

    async def follow(self, client: str, tab: str, wish: Submitted) -> AsyncIterator[View]:
        """Carry out a wish: a view of every change, the last one over. Who stops reading cancels it."""
        try:
            job = await self._submitted(client, wish)
        except LowmemBagelError as error:
            yield View(Progress(state="failed", error=error))
            return
        except Exception as error:
            LOG.exception("a request of the page failed")
            yield View(Progress(state="failed", error=error.with_traceback(None)))
            return
        self._jobs[client, tab] = job
        try:
            while True:
                progress = job.progress
                yield View(progress, self.service.outlook(job), job)
                if progress.over:
                    return
                await _news(job, progress.version)
        finally:
            self.service.cancel(job)
            if self._jobs.get((client, tab)) is job:
                del self._jobs[client, tab]

    def waits(self, client: str, tab: str) -> bool:
        """Whether a tab waits for something."""
        return (client, tab) in self._jobs

    def cancel(self, client: str, tab: str) -> None:
        """End what a tab waits for, if it does."""
        job = self._jobs.get((client, tab))
        if job is not None:
            self.service.cancel(job)

    def leave(self, client: str) -> None:
        """End all that a page waits for: it was closed."""
        for (owner, _), job in list(self._jobs.items()):
            if owner == client:
                self.service.cancel(job)

    async def _submitted(self, client: str, wish: Submitted) -> Job:
        """Pictures are opened, and the request is checked, beside the event loop. Whoever is gone meanwhile waits for
        nothing any more."""

        made: list[Job] = []
        gone = threading.Event()

        def submit() -> Job:
            made.append(wish.submitted(self.service, client))
            if gone.is_set():
                self.service.cancel(made[0])
            return made[0]

        try:
            return await asyncio.to_thread(submit)
        except asyncio.CancelledError:
            gone.set()  # before the look: whichever of the two sees the other's cancels
            for job in made:
                self.service.cancel(job)
            raise


async def _news(job: Job, seen: int) -> None:
    """Wait for a change, or until it is time to look at the queue; and never less than a browser needs."""
    begun = time.monotonic()
    with suppress(TimeoutError):
        await asyncio.wait_for(job.changed(seen), LOOK_SECONDS)
    if not job.progress.over:
        await asyncio.sleep(max(0.0, VIEW_SECONDS - (time.monotonic() - begun)))

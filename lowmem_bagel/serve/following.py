"""A request's job, followed to its end by the request's route; a client that goes away takes its job with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from starlette.requests import Request

from .jobs import Job, Progress
from .service import Service

if TYPE_CHECKING:
    from ..generation.results import Result


async def follow(request: Request, service: Service, job: Job) -> AsyncGenerator[Progress, None]:
    """The job's progress, as it changes, the last one over; who reads slowly misses some.

    The job is cancelled when the client hangs up, and when the reader of this stops early. Read the request's body
    before.
    """
    gone = asyncio.create_task(_cancel_when_gone(request, service, job))
    try:
        seen = -1
        while True:
            progress = await job.changed(seen)
            yield progress
            if progress.over:
                return
            seen = progress.version
    finally:
        gone.cancel()
        service.cancel(job)


async def result_of(request: Request, service: Service, job: Job) -> Result:
    """The job's result; raises what it failed with, and cancels it when the client hangs up."""
    async with aclosing(follow(request, service, job)) as followed:
        async for progress in followed:
            if progress.error is not None:
                raise progress.error
            if progress.result is not None:
                return progress.result
    raise AssertionError("a job ends with a result or an error")


def client_of(request: Request) -> str:
    """Whose turn in the queue a request takes: a browser's session, or else an address."""
    session: str | None = request.scope.get("state", {}).get("session")
    return session or (request.client.host if request.client else "")


async def _cancel_when_gone(request: Request, service: Service, job: Job) -> None:
    """Apart from the reader, who may be held up by what he writes to a client that no longer reads."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    service.cancel(job)

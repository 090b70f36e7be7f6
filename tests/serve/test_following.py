"""Jobs followed by a route: to their end, and no further than their client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.requests import Request
from support.serving import LONG, PROMPT, QUICK, running_service

from lowmem_bagel.errors import Cancelled
from lowmem_bagel.serve.following import client_of, follow, result_of
from lowmem_bagel.serve.jobs import Job
from lowmem_bagel.serve.service import Service


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as made:
        yield made


class Client:
    """What a request of a client receives: nothing, until it hangs up."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.request = Request({"type": "http", "client": ("10.1.2.3", 5)}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


def submit(service: Service, settings: dict[str, Any]) -> Job:
    return service.submit([PROMPT], "image", settings, "a")


def test_a_job_is_followed_to_its_end(service: Service) -> None:
    async def run() -> None:
        client, job = Client(), submit(service, QUICK)
        seen = [progress async for progress in follow(client.request, service, job)]
        assert [progress.version for progress in seen] == sorted({progress.version for progress in seen})
        assert seen[-1].state == "done"
        assert (await result_of(client.request, service, submit(service, QUICK))).image is not None
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) == 1, "nobody waits for the client any more"

    asyncio.run(run())


def test_a_client_that_hangs_up_ends_its_job_while_it_runs_and_while_it_waits(service: Service) -> None:
    async def run() -> None:
        client, other = Client(), Client()
        running, waiting = submit(service, LONG), submit(service, LONG)
        tasks = [
            asyncio.create_task(result_of(who.request, service, job))
            for who, job in ((client, running), (other, waiting))
        ]
        while running.progress.step < 2:
            await asyncio.sleep(0.01)
        other.gone.set()
        client.gone.set()
        for task in tasks:
            with pytest.raises(Cancelled):
                await task

    asyncio.run(run())


def test_it_ends_though_its_reader_is_held_up(service: Service) -> None:
    async def run() -> None:
        client, job = Client(), submit(service, LONG)
        following = follow(client.request, service, job)
        await anext(following)
        client.gone.set()
        while not job.progress.over:
            await asyncio.sleep(0.01)
        assert isinstance(job.progress.error, Cancelled)

    asyncio.run(run())


def test_a_reader_that_stops_ends_its_job(service: Service) -> None:
    async def run() -> None:
        client, job = Client(), submit(service, LONG)
        following = follow(client.request, service, job)
        await anext(following)
        await following.aclose()
        while not job.progress.over:
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_clients_are_sessions_or_addresses() -> None:
    assert client_of(Request({"type": "http", "client": ("10.1.2.3", 5)})) == "10.1.2.3"
    assert client_of(Request({"type": "http", "client": ("10.1.2.3", 5), "state": {"session": "s"}})) == "s"
    assert client_of(Request({"type": "http", "client": None})) == ""

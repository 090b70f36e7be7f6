"""A job's progress reaches whoever waits for it: another thread, several event loops, the slow and the late."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest

from lowmem_bagel.errors import Cancelled
from lowmem_bagel.serve.jobs import Job, Progress


@pytest.fixture
def job() -> Job:
    return Job(cast(Any, None), "a", 1.0)


def test_the_slow_miss_some_and_never_the_last(job: Job) -> None:
    seen: list[Progress] = []

    def follow() -> None:
        version = -1
        while not seen or not seen[-1].over:
            seen.append(job.wait(version, 10))
            version = seen[-1].version

    threads = [threading.Thread(target=follow) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(1, 200):
        job.update(state="running", step=step, steps=199)
    job.update(state="done")
    for thread in threads:
        thread.join(10)
    assert [p.state for p in seen if p.over] == ["done"] * 3
    assert {p.step for p in seen if p.over} == {199}


def test_event_loops_wait_without_a_thread(job: Job) -> None:
    async def follow() -> list[int]:
        versions = [-1]
        while not (progress := await job.changed(versions[-1])).over:
            versions.append(progress.version)
        return versions

    async def many() -> list[list[int]]:
        following = [asyncio.create_task(follow()) for _ in range(300)]
        await asyncio.sleep(0)
        before = threading.active_count()
        for step in range(20):
            await asyncio.to_thread(job.update, step=step)
        assert threading.active_count() <= before + 2
        job.update(state="done")
        return await asyncio.gather(*following)

    for versions in asyncio.run(many()):
        assert versions == sorted(set(versions))


def test_who_stops_waiting_leaves_nothing_behind(job: Job) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(job.changed(0), 0.01)

    asyncio.run(give_up())
    assert job._waiting == []
    job.update(step=1)


def test_a_loop_that_ended_is_not_woken(job: Job) -> None:
    async def leave() -> None:
        waiting = asyncio.ensure_future(job.changed(0))
        await asyncio.sleep(0)
        del waiting

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    job.update(step=1)
    assert job.progress.step == 1


def test_what_is_over_does_not_change(job: Job) -> None:
    job.fail(Cancelled("by the client"))
    job.update(state="running", step=3)
    assert (job.progress.state, job.progress.step) == ("failed", 0)
    assert isinstance(job.progress.error, Cancelled)


def test_an_error_keeps_no_frames(job: Job) -> None:
    try:
        raise ValueError("wrong")
    except ValueError as error:
        job.fail(error)
    assert job.progress.error is not None
    assert job.progress.error.__traceback__ is None


def test_the_first_reason_to_stop_counts(job: Job) -> None:
    first = Cancelled("first")
    job.stop(first)
    job.stop(Cancelled("second"))
    assert job.stopped is first

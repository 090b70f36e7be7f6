"""Who is next: clients take turns, and no more wait than may."""

from __future__ import annotations

from typing import Any, cast

import pytest

from lowmem_bagel.errors import BusyError
from lowmem_bagel.serve.jobs import Job
from lowmem_bagel.serve.queue import FairQueue


def job(client: str) -> Job:
    return Job(cast(Any, None), client, 1.0)


def filled(clients: str, limit: int = 100) -> tuple[FairQueue, list[Job]]:
    queue, jobs = FairQueue(limit), [job(client) for client in clients]
    for each in jobs:
        queue.put(each, 1.0)
    return queue, jobs


@pytest.mark.parametrize(("asked", "served"), [("aaab", "abaa"), ("aabbc", "abcab"), ("abab", "abab"), ("a", "a")])
def test_clients_take_turns(asked: str, served: str) -> None:
    queue, jobs = filled(asked)
    order = queue.order()
    taken = [queue.take() for _ in jobs]
    assert "".join(each.client for each in taken if each is not None) == served
    assert taken == order
    for client in set(asked):
        mine = [each for each in jobs if each.client == client]
        assert [each for each in taken if each in mine] == mine


def test_who_asks_again_while_others_wait_comes_after_them() -> None:
    queue, _ = filled("ab")
    first = queue.take()
    assert first is not None
    queue.put(job("a"), 1.0)
    assert [each.client for each in queue.order()] == ["b", "a"]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    queue, jobs = filled("abc", limit=3)
    with pytest.raises(BusyError, match="3 waiting already") as refused:
        queue.put(job("d"), 12.5)
    assert refused.value.retry_after == 12.5
    assert queue.remove(jobs[1])
    queue.put(job("d"), 1.0)


def test_what_is_taken_out_does_not_run() -> None:
    queue, jobs = filled("aab")
    assert queue.remove(jobs[0])
    assert not queue.remove(jobs[0])
    assert queue.order() == [jobs[1], jobs[2]]


def test_a_closed_queue_hands_over_who_waits_and_lets_nobody_in() -> None:
    queue, jobs = filled("ab")
    assert queue.close() == jobs
    assert queue.take() is None
    with pytest.raises(BusyError, match="shutting down"):
        queue.put(job("a"), 1.0)

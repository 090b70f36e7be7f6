"""Who is next: a bounded queue in which clients take turns."""

from __future__ import annotations

import threading
from collections import deque
from itertools import zip_longest

from ..errors import BusyError, UnavailableError
from .jobs import Job


class FairQueue:
    """Jobs of each client in their order, and clients in turn, so that who asks for a hundred pictures delays nobody
    by more than one.

    Args:
        limit: jobs that may wait, of all clients together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._of_client: dict[str, deque[Job]] = {}
        """The client whose turn comes first stands first."""
        self._changed = threading.Condition()
        self._closed = False

    def put(self, job: Job, seconds_ahead: float) -> None:
        """Let a job wait.

        Args:
            seconds_ahead: until the running job is done; after it, one may wait again.

        Raises:
            BusyError: the queue is full or closed; `retry_after` says when to come back.
        """
        with self._changed:
            self._check_room(seconds_ahead)
            self._of_client.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def check_room(self, seconds_ahead: float) -> None:
        """Raise what `put` would raise now: for those whose job takes work to make."""
        with self._changed:
            self._check_room(seconds_ahead)

    def take(self) -> Job | None:
        """The next job, once there is one; None once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._of_client or self._closed)
            if self._closed:
                return None
            client, jobs = next(iter(self._of_client.items()))
            job = jobs.popleft()
            del self._of_client[client]
            if jobs:
                self._of_client[client] = jobs
            return job

    def remove(self, job: Job) -> bool:
        """Take a job out of the queue; whether it was there."""
        with self._changed:
            jobs = self._of_client.get(job.client, deque())
            if job not in jobs:
                return False
            jobs.remove(job)
            if not jobs:
                del self._of_client[job.client]
            return True

    def close(self) -> list[Job]:
        """Let no more in; gives those that waited."""
        with self._changed:
            self._closed = True
            left = self._order()
            self._of_client.clear()
            self._changed.notify_all()
            return left

    def order(self) -> list[Job]:
        """The waiting jobs in the order in which they will run, if nobody else comes."""
        with self._changed:
            return self._order()

    def _check_room(self, seconds_ahead: float) -> None:
        if self._closed:
            raise closed()
        if self._waiting() >= self.limit:
            raise BusyError(
                f"the queue is full: {self.limit} waiting already, which is the most; ask again later", seconds_ahead
            )

    def _order(self) -> list[Job]:
        rounds = zip_longest(*self._of_client.values())
        return [job for turn in rounds for job in turn if job is not None]

    def _waiting(self) -> int:
        return sum(map(len, self._of_client.values()))


def closed() -> UnavailableError:
    """What is said to those who come or wait while the server leaves."""
    return UnavailableError("the server is shutting down; ask again when it is back", 30.0)

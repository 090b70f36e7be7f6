"""Jobs handed out to workers, each of which owns a pipeline; those of a worker that dies are done by another.

What a worker is (a process, an actor of Ray) is its `Team`'s business.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..errors import DoesNotFitError, ImageError, UserError
from .jobs import Job
from .work import Outcome, Work, failed, fetched

MOST_DEATHS = 2
"""Workers that a job may take with it; and times that a worker may die by itself."""

Tell = Callable[[str, str, int, int], object]
"""Told of a worker what it does (`loading`, or a job's id), how many steps are done, and how many there are."""
Note = Callable[[str], object]


@dataclass(frozen=True)
class Event:
    """What is new of a worker: it has `loaded`, a `step` or its job is done, or it is not there any more.

    Attributes:
        step: steps done, and all of them.
        outcome: of its job.
        error: why there will be no such worker, where trying again would help nothing.
        why: it died.
    """

    worker: str
    kind: Literal["loaded", "step", "done", "refused", "died"]
    step: tuple[int, int] = (0, 0)
    outcome: Outcome | None = None
    error: UserError | None = None
    why: str = ""


class Team(Protocol):
    """Workers by name."""

    @property
    def workers(self) -> Sequence[str]: ...

    def start(self, worker: str) -> None:
        """Begin to make a worker, anew where it died. It is heard of by an event."""
        ...

    def give(self, worker: str, work: Work) -> None:
        """Let a worker that has loaded do a job; the next that is heard of it, but for steps, is its end."""
        ...

    def event(self) -> Event:
        """Wait for the next one."""
        ...

    def close(self) -> None:
        """End all workers, and what they do."""
        ...


def handed_out(jobs: Iterable[Job], model: str, team: Team, tell: Tell, note: Note) -> Generator[Outcome]:
    """Each job's outcome, as soon as it is there. Ends all workers when it ends.

    Raises:
        UserError: no worker is left; the first one's reason.
    """
    try:
        yield from _Foreman(deque(jobs), model, team, tell, note).outcomes()
    finally:
        team.close()


class _Foreman:
    def __init__(self, waiting: deque[Job], model: str, team: Team, tell: Tell, note: Note) -> None:
        self.waiting, self.model, self.team, self.tell, self.note = waiting, model, team, tell, note
        self.running: dict[str, Job] = {}
        self.idle: list[str] = []
        self.deaths: Counter[tuple[str, str]] = Counter()
        """By ("job", id) and ("worker", name)."""
        self.left = [*team.workers][: len(waiting)]
        self.reason: UserError | None = None

    def outcomes(self) -> Iterator[Outcome]:
        for worker in self.left:
            self._start(worker)
        while self.waiting or self.running:
            yield from self._give()
            if self.running or self.waiting:
                yield from self._heard(self.team.event())

    def _start(self, worker: str) -> None:
        self.tell(worker, "loading", 0, 1)
        self.team.start(worker)

    def _give(self) -> Iterator[Outcome]:
        while self.idle and self.waiting:
            job = self.waiting.popleft()
            try:
                work = fetched(job, self.model)
            except ImageError as error:
                yield failed(job, self.model, str(error))
                continue
            worker = self.idle.pop(0)
            self.running[worker] = job
            self.tell(worker, job.id, 0, 1)
            self.team.give(worker, work)

    def _heard(self, event: Event) -> Iterator[Outcome]:
        worker = event.worker
        if event.kind == "step":
            self.tell(worker, self.running[worker].id, *event.step)
        elif event.kind == "loaded":
            self.idle.append(worker)
        elif event.kind == "done":
            assert event.outcome is not None
            del self.running[worker], self.deaths["worker", worker]
            self.idle.append(worker)
            yield event.outcome
        elif event.kind == "refused":
            assert event.error is not None
            self._give_up(worker, event.error)
        else:
            yield from self._died(worker, event.why)

    def _died(self, worker: str, why: str) -> Iterator[Outcome]:
        job = self.running.pop(worker, None)
        self.idle = [other for other in self.idle if other != worker]
        of = ("worker", worker) if job is None else ("job", job.id)
        self.deaths[of] += 1
        self.note(f"{worker} {why}{'' if job is None else f' while it did {job.id}'}")
        if job is None and self.deaths[of] == MOST_DEATHS:
            often = f"{worker} {why}, for the second time without a job"
            self._give_up(worker, DoesNotFitError(f"{often}; there may be no memory for one more copy of the model"))
            return
        if job is not None and self.deaths[of] == MOST_DEATHS:
            yield failed(job, self.model, f"{MOST_DEATHS} workers died of it: the last one {why}")
        elif job is not None:
            self.waiting.appendleft(job)
        if self.waiting or self.running:
            self._start(worker)

    def _give_up(self, worker: str, error: UserError) -> None:
        self.left.remove(worker)
        self.reason = self.reason or error
        if not self.left:
            raise self.reason
        self.note(f"{worker} is not used: {error}")

"""Jobs handed out: each comes back once, whatever becomes of the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lowmem_bagel.batch.jobs import Job
from lowmem_bagel.batch.results import Result
from lowmem_bagel.batch.team import Event, handed_out
from lowmem_bagel.batch.work import Outcome, Work
from lowmem_bagel.errors import DoesNotFitError, SettingError, UserError


def job(id: str, *pictures: str) -> Job:
    return Job(id, 1, "d", "generate", id, pictures, f"{id}.png", {"seed": 1})


class Played:
    """Workers that do what a function says when they are to load and when they have a job."""

    def __init__(self, *workers: str, acts: Callable[[str, str], str] = lambda worker, job: "well") -> None:
        self.workers, self.acts = workers, acts
        self.heard: list[Event] = []
        self.started: list[str] = []
        self.given: list[tuple[str, str]] = []
        self.closed = False

    def start(self, worker: str) -> None:
        self.started.append(worker)
        how = self.acts(worker, "")
        error = SettingError(f"no {worker}")
        self.heard.append(
            {"well": Event(worker, "loaded"), "dies": Event(worker, "died", why="fell")}.get(
                how, Event(worker, "refused", error=error)
            )
        )

    def give(self, worker: str, work: Work) -> None:
        self.given.append((worker, work.job.id))
        if self.acts(worker, work.job.id) == "dies":
            self.heard.append(Event(worker, "died", why="fell"))
            return
        made = Result(id=work.job.id, line=1, state="done", digest="d", model=work.model)
        self.heard += [Event(worker, "step", step=(1, 2)), Event(worker, "done", outcome=Outcome(made))]

    def event(self) -> Event:
        return self.heard.pop(0)

    def close(self) -> None:
        self.closed = True


def ended(jobs: list[Job], team: Played, notes: list[str] | None = None) -> dict[str, str]:
    """Why each has failed; empty for what is done. Asserts that each comes once."""
    outcomes = [
        outcome.result
        for outcome in handed_out(jobs, "m", team, lambda *_: None, ([] if notes is None else notes).append)
    ]
    assert team.closed
    assert sorted(result.id for result in outcomes) == sorted(job.id for job in jobs)
    return {result.id: result.why for result in outcomes}


def in_turn(*answers: str) -> Callable[[str, str], str]:
    told = iter(answers)
    return lambda worker, job: next(told, "well") if job else "well"


def test_every_worker_has_jobs_and_each_is_done_once() -> None:
    team = Played("a", "b")
    assert ended([job(str(number)) for number in range(7)], team) == {str(number): "" for number in range(7)}
    assert {worker for worker, _ in team.given} == {"a", "b"} and len(team.given) == 7


def test_no_more_workers_than_jobs() -> None:
    team = Played("a", "b", "c")
    ended([job("x")], team)
    assert team.started == ["a"]


def test_steps_are_told_by_worker_and_job() -> None:
    told: list[tuple[object, ...]] = []
    list(handed_out([job("x")], "m", Played("a"), lambda *about: told.append(about), print))
    assert told == [("a", "loading", 0, 1), ("a", "x", 0, 1), ("a", "x", 1, 2)]


def test_the_job_of_a_dead_worker_is_done_by_another() -> None:
    notes: list[str] = []
    team = Played("a", "b", acts=in_turn("dies"))
    assert set(ended([job("x"), job("y"), job("z")], team, notes).values()) == {""}
    assert [id for _, id in team.given].count("x") == 2
    assert notes[0] == "a fell while it did x"
    assert team.started.count("a") == 2


def test_a_job_that_kills_two_workers_has_failed_and_the_rest_is_done() -> None:
    team = Played("a", "b", acts=lambda worker, job: "dies" if job == "x" else "well")
    why = ended([job("x"), job("y"), job("z")], team)
    assert why == {"x": "2 workers died of it: the last one fell", "y": "", "z": ""}


def test_many_jobs_that_each_kill_one_worker_are_all_done() -> None:
    died: set[str] = set()

    def once(worker: str, job: str) -> str:
        if not job or job in died:
            return "well"
        died.add(job)
        return "dies"

    assert set(ended([job(str(number)) for number in range(9)], Played("a", "b", acts=once)).values()) == {""}


def test_the_last_job_is_done_again_by_who_has_nothing_to_do() -> None:
    team = Played("a", "b", acts=in_turn("well", "dies"))
    assert set(ended([job("x"), job("y")], team).values()) == {""}


@pytest.mark.parametrize("how", ["refuses", "dies"])
def test_a_worker_that_cannot_load_is_left_out(how: str) -> None:
    notes: list[str] = []
    team = Played("a", "b", acts=lambda worker, job: how if worker == "a" else "well")
    assert set(ended([job("x"), job("y"), job("z")], team, notes).values()) == {""}
    assert any(note.startswith("a is not used: ") for note in notes)
    assert team.started.count("a") == (2 if how == "dies" else 1)


@pytest.mark.parametrize(("how", "error"), [("refuses", SettingError), ("dies", DoesNotFitError)])
def test_without_any_worker_the_first_reason_is_raised(how: str, error: type[UserError]) -> None:
    team = Played("a", "b", acts=lambda worker, job: how)
    with pytest.raises(error, match=r"^(no )?a"):
        list(handed_out([job("x"), job("y")], "m", team, lambda *_: None, lambda _: None))
    assert team.closed


def test_a_picture_that_is_gone_by_then_is_its_jobs_failure(tmp_path: Path) -> None:
    why = ended([job("x", str(tmp_path / "gone.png")), job("y")], Played("a"))
    assert why["x"].startswith("no such picture") and why["y"] == ""


def test_who_stops_reading_ends_the_workers() -> None:
    team = Played("a")
    outcomes: Iterator[Outcome] = handed_out([job("x"), job("y")], "m", team, lambda *_: None, print)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert team.closed and len(team.given) == 1

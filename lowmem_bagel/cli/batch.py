"""`lowmem-bagel batch`: many requests from a file."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, ModelOption, byte_bars, duration, job_bars, notes_shown, opening
from .options import Values, takes
from .terminal import note, print_json

if TYPE_CHECKING:
    from ..batch.folder import BatchFolder
    from ..batch.jobs import Job
    from ..batch.loading import Recipe
    from ..batch.options import BatchOptions
    from ..batch.results import Result
    from ..batch.team import Team
    from ..batch.todo import Todo
    from ..batch.work import Outcome
    from ..checkpoint.folder import ModelFolder
    from ..settings import Option

MOST_SHOWN = 8
"""Bars beside that of all jobs."""
OWN = ("devices", "divide")
"""Options of loading that mean something else here."""


def batch_options() -> tuple[Option, ...]:
    from ..batch.options import BatchOptions
    from ..settings import options_of

    return options_of(BatchOptions)


def load_flags() -> tuple[Option, ...]:
    """Options of loading; what jobs tell is not asked for beside them."""
    from ..planner.load_options import load_options

    return tuple(option for option in load_options() if option.name not in OWN)


@takes(batch=batch_options, loading=load_flags)
def batch_command(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS.jsonl", help="One JSON object a line; - for stdin.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pictures and results.jsonl.")],
    batch: Values,
    loading: Values,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Do every job of a file; a run that was ended goes on where it was.

    A line is {"prompt": ..., "image": ..., "task": "generate", "edit" or "ask", "id": ..., "output": ...} and any
    setting by its name; a prompt alone is drawn. OUT/results.jsonl gets a line a job, done or failed and why. Exit code
    2 where any has failed.
    """
    from ..batch.folder import opened_folder
    from ..batch.lines import STDIN, read_lines
    from ..batch.loading import Recipe, told_by
    from ..batch.options import BatchOptions
    from ..checkpoint.folder import ModelFolder
    from ..demo_checkpoint import FOLDER
    from ..files import expanded
    from ..planner.load_options import options_from

    options = BatchOptions(**batch)
    team = _team(options, loading)
    options_from(loading)  # what is wrong with them is said before anything is written
    lines = read_lines(jobs)
    if model is None:
        note("Using the embedded demo checkpoint (coloured shapes); name another folder with --model.")
    folder = ModelFolder.open(model or FOLDER, **opening(loading))
    beside = Path() if str(jobs) == STDIN else expanded(jobs).parent
    with _ended_by_sigterm(), notes_shown(), opened_folder(out) as place:
        todo = _todo(lines, folder, beside, place, options)
        place.forget(todo.forgotten)
        progress = Progress(len(lines), todo.done, todo.failed)
        for result in todo.refused:
            place.keep(result)
            progress.has_ended(result)
        if todo.jobs:
            # The demo's matrices are so small that more threads would only wait for each other.
            recipe = Recipe(model, {**told_by(todo.jobs), **loading}, threads=1 if model is None else None)
            outcomes = _outcomes(todo.jobs, folder, recipe, team, progress)
            with progress.shown(), closing(outcomes):
                for outcome in outcomes:
                    place.keep(outcome.result, outcome.content)
                    progress.has_ended(outcome.result)
    _end(progress, place.path, as_json)


def _team(options: BatchOptions, loading: Values) -> Callable[[Recipe], Team] | None:
    """What makes the workers; None where the jobs are done in this process."""
    from ..batch.processes import Processes, recipes_for, worker_devices
    from ..batch.ray_team import RayTeam
    from ..errors import SettingError

    chosen = [flag for flag, said in (("--devices", options.devices), ("--ray", options.ray)) if said]
    if len(chosen) > 1 or (options.devices and "device" in loading):
        raise SettingError("give one of --device, --devices and --ray")
    if options.ray and loading.get("device", "auto") not in ("auto", "cuda", "cpu"):
        raise SettingError("with --ray cards are Ray's to give; --device may be cpu alone")
    if options.ray_workers and not options.ray:
        raise SettingError("--ray-workers are workers on Ray; say where it is with --ray")
    if options.ray:
        return lambda recipe: RayTeam(options.ray, options.ray_workers, recipe)
    if options.devices:
        names = worker_devices(options.devices)
        return lambda recipe: Processes(recipes_for(names, recipe))
    return None


def _todo(lines: Sequence[Any], folder: ModelFolder, beside: Path, place: BatchFolder, options: Any) -> Todo:
    from ..batch.jobs import Checker
    from ..batch.loading import named
    from ..batch.todo import what_to_do
    from ..planner.facts import ModelFacts

    checker = Checker(folder, ModelFacts.of_folder(folder), beside, place.path)
    return what_to_do(lines, place.results, checker, named(folder), options)


def _outcomes(
    jobs: Sequence[Job], folder: ModelFolder, recipe: Recipe, team: Callable[[Recipe], Team] | None, progress: Progress
) -> Generator[Outcome]:
    """What becomes of each job, by whoever does them."""
    from ..batch.here import done_here
    from ..batch.loading import named
    from ..batch.team import handed_out

    if team is not None:
        if "limits" in folder.reading.lines:
            note(f"note: {folder.reading.lines['limits']}")
        return handed_out(jobs, named(folder), team(recipe), progress.step, note)
    with byte_bars() as show:
        pipeline = recipe.load(lambda done, total: show("Loading", done, total))
    return done_here(jobs, named(folder), pipeline, progress.step)


@dataclass
class Progress:
    """How far all jobs are, and what is said of each."""

    jobs: int
    done: int
    failed: int
    _begun: float = field(default_factory=time.monotonic)
    _ended: int = 0
    """Of this run."""
    _show: Callable[..., None] | None = None
    _shown: set[str] = field(default_factory=set)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Bars meanwhile."""
        self._begun, self._ended = time.monotonic(), 0
        with job_bars() as self._show:
            self._tell_all()
            yield
        self._show = None

    def step(self, where: str, what: str, done: int, total: int) -> None:
        """Show how far one job is, or what a worker does; of the first workers alone, where there are very many."""
        if self._show is not None and (where in self._shown or len(self._shown) < MOST_SHOWN):
            self._shown.add(where)
            self._show(where, done, total, what)

    def has_ended(self, result: Result) -> None:
        """Say what became of a job."""
        self.done += result.state == "done"
        self.failed += result.state == "failed"
        self._ended += 1
        for said in result.notes:
            note(f"note: {result.id}: {said}")
        what = ", ".join(result.files) or "answered"
        became = f"failed: {result.why}" if result.state == "failed" else f"{what}, {duration(result.seconds)}"
        note(f"{self.done + self.failed}/{self.jobs} {result.id} (line {result.line}): {became}")
        self._tell_all()

    def _tell_all(self) -> None:
        if self._show is None:
            return
        left = self.jobs - self.done - self.failed
        took = time.monotonic() - self._begun
        when = f", about {duration(took / self._ended * left)} left" if self._ended and left else ""
        self._show("Jobs", self.done + self.failed, self.jobs, f"{self.failed} failed, {left} to do{when}")


def _end(progress: Progress, out: Path, as_json: bool) -> None:
    from ..batch.folder import RESULTS
    from ..errors import JobsFailedError

    results = out / RESULTS
    if as_json:
        print_json({"jobs": progress.jobs, "done": progress.done, "failed": progress.failed, "results": str(results)})
    if progress.failed:
        raise JobsFailedError(
            f"{progress.failed} of {progress.jobs} jobs failed; {results} says why, and --retry-failed does them again"
        )
    note(f"{results}: {progress.done} jobs done")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: the running job is dropped, and nothing is left half-written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

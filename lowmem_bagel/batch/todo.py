"""What of a jobs file is left to do, beside the results that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import SettingError, UserError
from ..values import shown
from .jobs import Checker, Job
from .lines import Line
from .options import BatchOptions
from .results import Result


@dataclass(frozen=True)
class Todo:
    """Jobs to do, in the order of their lines.

    Attributes:
        refused: results of lines that cannot be done, not yet kept.
        forgotten: ids of results that are to be taken out first.
        done, failed: results of the file's jobs that stay.
    """

    jobs: tuple[Job, ...]
    refused: tuple[Result, ...]
    forgotten: frozenset[str]
    done: int
    failed: int


def what_to_do(
    lines: Sequence[Line], results: Mapping[str, Result], checker: Checker, model: str, options: BatchOptions
) -> Todo:
    """Compare lines with results.

    Args:
        model: which model is asked.

    Raises:
        SettingError: what was done under an id differs from its line, or is of another model, and is not to be done
            again; with `strict`, a line is wrong.
    """
    kept = {line.id for line in lines if _stays(line, results.get(line.id), model, options)}
    again = {line.id for line in lines if line.id in results} - kept
    checker.owners |= {
        name.casefold(): id for id, result in results.items() if id not in again for name in result.files
    }
    checker.look_at(lines)
    jobs: list[Job] = []
    refused: list[Result] = []
    for line in lines:
        if line.id in kept:
            continue
        try:
            jobs.append(checker.job(line))
        except UserError as error:
            if options.strict:
                raise SettingError(f"line {line.number}: {error}") from error
            about = Result(
                id=line.id, line=line.number, digest=line.digest, model=model, state="failed", why=str(error)
            )
            refused.append(about)
    done = sum(results[id].state == "done" for id in kept)
    return Todo(tuple(jobs), tuple(refused), frozenset(again), done, len(kept) - done)


def _stays(line: Line, result: Result | None, model: str, options: BatchOptions) -> bool:
    """Whether a line's job is not to be done any more."""
    if result is None:
        return False
    if result.state == "failed":
        return not options.retry_failed and (result.digest, result.model) == (line.digest, model)
    if result.digest != line.digest:
        return _not_changed(f"line {line.number} has changed since its job {shown(line.id)} was done", options)
    if result.model != model:
        other = f"the job {shown(line.id)} was done by another model ({result.model}, now {model})"
        return _not_changed(other, options)
    return True


def _not_changed(how: str, options: BatchOptions) -> bool:
    if options.redo_changed:
        return False
    raise SettingError(f"{how}; give it another id, choose another folder, or do such jobs again with --redo-changed")

"""What can be asked for of a batch itself, beside how its model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import option, options_of


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What is done, and what is not done again. Checked when made."""

    retry_failed: bool = option(False, "Do the jobs again that have failed")
    redo_changed: bool = option(
        False, "Do the jobs again that differ from what was done under their id, or by which model"
    )
    strict: bool = option(False, "Do nothing where a line is wrong or a picture is missing")
    devices: str = option("", "Cards that jobs are handed out to, one worker each, such as 0,1; cpu is one too")
    ray: str = option(
        "",
        "Ray that jobs are handed out to: HOST:PORT of a cluster, auto for the one that runs here, local to start one",
    )
    ray_workers: int | None = option(None, "Workers on Ray; default: one a GPU", low=1, high=10_000)

    def __post_init__(self) -> None:
        for known in options_of(BatchOptions):
            value = getattr(self, known.name)
            object.__setattr__(self, known.name, None if value is None else known.checked(value))

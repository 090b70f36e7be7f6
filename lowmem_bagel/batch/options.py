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

    def __post_init__(self) -> None:
        for known in options_of(BatchOptions):
            object.__setattr__(self, known.name, known.checked(getattr(self, known.name)))

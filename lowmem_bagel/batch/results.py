"""What became of a job, as one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..files import parse_json

State = Literal["done", "failed"]
OMITTED_WHERE_EMPTY = ("notes", "traceback")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One job's.

    Attributes:
        line: its number in the jobs file.
        why: it failed; empty where it is done.
        files: names in the batch's folder.
        text: the answer, or the plan of `think`.
        seconds: that the request took.
        settings: every setting that was used, the seed among them; of a failed job, those that were given.
        digest: of what the line said.
        model: which model was asked.
        notes: what was assumed or changed.
        traceback: of a failure that is a fault of ours.
    """

    id: str
    line: int
    state: State
    task: str = ""
    why: str = ""
    files: tuple[str, ...] = ()
    text: str = ""
    seconds: float = 0.0
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    digest: str
    model: str
    notes: tuple[str, ...] = ()
    traceback: str = ""

    def to_json(self) -> bytes:
        """The line, with its end."""
        values = {known.name: getattr(self, known.name) for known in fields(self)}
        told = {name: value for name, value in values.items() if value or name not in OMITTED_WHERE_EMPTY}
        return json.dumps(told).encode() + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> Result:
        """Raises ValueError where it is no result's line."""
        value = parse_json(line)
        if not isinstance(value, dict) or value.get("state") not in ("done", "failed"):
            raise ValueError("it says nothing of a job")
        texts = [value.get(name) for name in ("id", "digest", "model")]
        files = value.get("files", [])
        if not all(isinstance(text, str) for text in texts) or not isinstance(files, list):
            raise ValueError("it does not say which job it is of")
        known = {known.name for known in fields(cls)}
        return cls(**{name: value[name] for name in value if name in known} | {"files": tuple(map(str, files))})

"""Records of one benchmark that were made in several runs, put together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_bagel.errors import SettingError

from .record import Record, command, save

Alike = Callable[[Record], Mapping[str, Any]]
"""What records have in common that are put together, by the words for it."""


def records_alike(paths: Sequence[Path], benchmark: str, alike: Alike) -> list[Record]:
    """Records that have the same in common, in the order of their paths.

    Raises:
        SettingError: one cannot be read, is broken or another benchmark's, or differs from the first.
    """
    records: list[Record] = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingError(f"cannot read {path} ({error}); name records of bench {benchmark}") from error
        if not isinstance(record, dict) or record.get("benchmark") != benchmark:
            raise SettingError(f"{path} is no record of bench {benchmark}")
        records.append(record)
    must_be_alike(paths, records, alike)
    return records


def must_be_alike(paths: Sequence[Path], records: Sequence[Record], alike: Alike) -> None:
    """Records that differ stay apart.

    Raises:
        SettingError: one differs from the first, or lacks what is asked for.
    """
    for path, record in zip(paths, records, strict=True):
        try:
            other = [name for name, of_first in alike(records[0]).items() if alike(record)[name] != of_first]
        except (KeyError, TypeError, AttributeError) as error:
            raise SettingError(f"{path} is broken: it lacks {error}; measure it again") from error
        if other:
            raise SettingError(f"{path} is of another {other[0]} than {paths[0]}; records that differ stay apart")


def save_merged(out: Path, records: Sequence[Record], settings: Mapping[str, Any], results: object) -> None:
    """One record in their place, which says by which commands they were made.

    Raises:
        OutputError: it cannot be written.
    """
    commands = [one for record in records for one in record.get("commands") or [record["command"]]]
    save(out, {**records[0], "command": command(), "commands": commands, "settings": settings}, results)

"""Records of one benchmark that were made in several runs, put together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_bagel.errors import SettingError

from .record import Record, command, save


def records_alike(paths: Sequence[Path], benchmark: str, alike: Callable[[Record], Mapping[str, Any]]) -> list[Record]:
    """Records whose `alike` are equal, in the order of their paths.

    Raises:
        SettingError: one cannot be read, is another benchmark's, or is of another of those than the first.
    """
    records: list[Record] = []
    for path in paths:
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise SettingError(f"cannot read {path} ({error}); name records of bench {benchmark}") from error
        if records[-1].get("benchmark") != benchmark:
            raise SettingError(f"{path} is no record of bench {benchmark}")
        for name, of_first in alike(records[0]).items():
            if alike(records[-1])[name] != of_first:
                raise SettingError(f"{path} is of another {name} than {paths[0]}; records that differ stay apart")
    return records


def save_merged(out: Path, records: Sequence[Record], settings: Mapping[str, Any], results: object) -> None:
    """One record in their place, which says by which commands they were made.

    Raises:
        OutputError: it cannot be written.
    """
    commands = [one for record in records for one in record.get("commands") or [record["command"]]]
    save(out, {**records[0], "command": command(), "commands": commands, "settings": settings}, results)

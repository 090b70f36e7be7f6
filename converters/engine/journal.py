"""The journal of an unfinished conversion: one JSON line for every step that is safely on disk.

A line is written only after what it speaks of is synced, and is itself synced before the next step begins. A process
that is killed therefore leaves whole lines that are true, and at most one torn line at the end, which is dropped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lowmem_bagel.checkpoint.manifest import StoredFile, TensorRecord
from lowmem_bagel.errors import ConversionError

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """An open journal, locked against a second converter until it is closed or the process ends.

    Attributes:
        lines: what was found on opening, then what was added.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        """Open or begin the journal in `folder`; `fresh` forgets what it holds.

        Raises:
            ConversionError: another process holds it, or it is damaged elsewhere than in its last line.
        """
        self.path = folder / JOURNAL_NAME
        self._file = self.path.open("a+b")
        try:
            _lock(self._file, folder)
            self.lines: list[dict[str, Any]] = []
            if fresh:
                self.forget()
            self.lines = self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(line)

    def forget(self) -> None:
        """Forget all lines."""
        self._file.truncate(0)
        self.lines.clear()

    def close(self) -> None:
        self._file.close()

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        whole, newline, torn = data.rpartition(b"\n")
        if torn:
            self._file.truncate(len(whole) + len(newline))
        try:
            lines = [json.loads(line) for line in whole.split(b"\n") if line]
        except ValueError as error:
            raise ConversionError(f"{self.path}: damaged ({error}); start again with --restart") from error
        if not all(isinstance(line, dict) for line in lines):
            raise ConversionError(f"{self.path}: damaged; start again with --restart")
        return lines


def record_shard(journal: Journal, stored: StoredFile, records: list[TensorRecord]) -> None:
    """Note a shard that is synced under its final name."""
    journal.append({"shard": vars(stored), "tensors": [*map(vars, records)]})


def journaled_shards(journal: Journal) -> Iterator[tuple[StoredFile, list[TensorRecord]]]:
    """Shards noted so far; one that was written twice comes twice, the valid note last.

    Raises:
        ConversionError: a note is not of the form that `record_shard` gives it.
    """
    for line in journal.lines:
        if "shard" in line:
            try:
                records = [
                    TensorRecord(**{**row, "shape": tuple(row["shape"]), "stored": tuple(row["stored"])})
                    for row in line["tensors"]
                ]
                yield StoredFile(**line["shard"]), records
            except (KeyError, TypeError) as error:
                raise ConversionError(f"{journal.path}: damaged ({error!r}); start again with --restart") from error


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            # A byte far behind the end, because Windows' locks forbid reading what they cover.
            file.seek(1 << 40)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConversionError(f"{folder}: another conversion is working in it; wait for its end") from error

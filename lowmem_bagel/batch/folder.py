"""The folder of a batch: its results, a line each, and the pictures, in an order that no kill can upset.

A picture is written beside its place, synced and renamed; then its job's line is appended and synced. So a job that has
a line is done, whole; one that has none is done again. Only one run at a time may write.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError
from ..files import expanded, open_file
from .results import Result

RESULTS = "results.jsonl"
LOCK = ".lowmem-bagel-batch.lock"
BEGINNING = b'{"id": '
"""Of every line in it."""
PARTIAL = ".lowmem-bagel-batch-{}.partial"


class BatchFolder:
    """An open folder. `results` has those that there are, by the id of their job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Result] = {}
        self._end = 0
        """Bytes of the results that are whole."""
        with _on_disk(path):
            for partial in path.glob(PARTIAL.format("*")):
                partial.unlink()
        if os.path.lexists(self._file):
            self._read()

    @property
    def _file(self) -> Path:
        return self.path / RESULTS

    def keep(self, result: Result, content: bytes = b"") -> None:
        """Write a job's picture, if it has one, and then its line.

        Raises:
            OutputError: the disk is full, or the folder cannot be written. Nothing is left half-written.
        """
        assert result.id not in self.results
        with _on_disk(self.path):
            for name in result.files:
                self._write(name, content)
            self._append(result.to_json())
        self.results[result.id] = result

    def forget(self, ids: Collection[str]) -> None:
        """Take results out, so that their jobs are done again.

        Raises:
            OutputError: as of `keep`.
        """
        if not ids:
            return
        left = {id: result for id, result in self.results.items() if id not in ids}
        content = b"".join(result.to_json() for result in left.values())
        with _on_disk(self.path):
            self._write(RESULTS, content)
        self.results, self._end = left, len(content)

    def _read(self) -> None:
        """What a kill left of a last line is cut off."""
        with _on_disk(self.path), open_file(self._file) as file:
            content = file.read()
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if number == len(lines) and _is_torn(line):
                break
            try:
                result = Result.from_json(line)
                if result.id in self.results:
                    raise ValueError("another line is of the same job")
            except (ValueError, TypeError) as error:
                message = f"{self._file}: line {number} is no result of a batch ({error}); choose another folder"
                raise OutputError(message) from error
            self.results[result.id] = result
            self._end += len(line)
        if self._end < len(content):
            with _on_disk(self.path):
                os.truncate(self._file, self._end)

    def _append(self, line: bytes) -> None:
        """All of a line, or nothing of it."""
        new = not os.path.lexists(self._file)
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            left = memoryview(line)
            while left:  # a disk that becomes full takes some of it first, and then refuses
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except BaseException:
            with suppress(OSError):  # what is left of it then is cut off by who reads it
                os.ftruncate(descriptor, self._end)
            raise
        finally:
            os.close(descriptor)
        self._end += len(line)
        if new:
            _sync_folder(self.path)

    def _write(self, name: str, content: bytes) -> None:
        """A file that appears whole or not at all."""
        partial = self.path / PARTIAL.format(secrets.token_hex(8))
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path / name)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(self.path)


@contextmanager
def opened_folder(path: Path) -> Iterator[BatchFolder]:
    """The folder, made where there is none, held by this run alone; one that nothing was written to is removed again.

    The lock is the system's, which a run that was killed does not hold any more.

    Raises:
        OutputError: another run holds it, it cannot be written, or its results are not those of a batch.
    """
    from filelock import FileLock, Timeout

    path = expanded(path)
    new = [above for above in (path, *path.parents) if not os.path.lexists(above)]
    lock = FileLock(path / LOCK, timeout=0)
    with _on_disk(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                f"{path}: another run writes there; wait for its end, or choose another folder"
            ) from error
    try:
        yield BatchFolder(path)
    finally:
        lock.release()
        if not os.path.lexists(path / RESULTS):
            with suppress(OSError):  # somebody else's file in there is not ours to remove
                (path / LOCK).unlink(missing_ok=True)
                for made in new:
                    made.rmdir()


def _is_torn(line: bytes) -> bool:
    """Whether a file's last line is what a kill, or a power failure, left of one of ours."""
    begun = line[: len(BEGINNING)] == BEGINNING[: len(line)]
    return not line.endswith(b"\n") and (begun or not line.strip(b"\0"))


def _sync_folder(path: Path) -> None:
    """So that a file's new name outlives a power failure too."""
    if os.name == "nt":  # which has no such thing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Around work on files: what the system refuses, in one line."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what = "the disk is full; free some space, and the same command goes on from here"
        else:
            what = f"cannot be written ({getattr(error, 'strerror', None) or error}); choose another folder"
        raise OutputError(f"{path}: {what}") from error

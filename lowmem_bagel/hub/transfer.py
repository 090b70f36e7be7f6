"""Files on their way from a hub into a folder: resumed where they stopped, and checked before they count.

The bytes are fetched by plain HTTP ranges. A file is collected in `.download/` inside the target folder and moved to
its own name only after its size and checksum are right. Whatever stops a download leaves nothing but such parts.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import glob
import hashlib
import os
import queue
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..errors import DownloadError
from .hubs import Listing, RemoteFile, new_digest
from .web import Answer, ConnectionFailed, Web

PARTS_FOLDER = ".download"
DISK_MARGIN = 256 * 2**20
"""Bytes that must stay free beside the download."""
DAMAGED_ATTEMPTS = 2
CHUNK = 2**20
SLOWEST = 1000
"""Bytes a second of patience that a connection has to bring; with fewer it has failed."""

Action = Literal["present", "fetched", "resumed", "replaced", "copied"]


@dataclass(frozen=True)
class Patience:
    """How long a silent or failing server is put up with: seconds of silence, failures in a row, first pause."""

    timeout: float = 30.0
    attempts: int = 6
    pause: float = 1.0

    def after(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row: doubling, at most half a minute."""
        return float(min(self.pause * 2 ** (failures - 1), 30.0))


@dataclass(frozen=True)
class Progress:
    """One file's state: `done` of `total` bytes received or checked. Goes back when a file has to start anew."""

    name: str
    phase: Literal["download", "check"]
    done: int
    total: int


@dataclass(frozen=True)
class FileResult:
    """What happened to a file. `received` counts bytes from the network, `damaged` the times it arrived wrong."""

    name: str
    size: int
    action: Action
    received: int = 0
    damaged: int = 0


@dataclass(frozen=True)
class Wanted:
    """What a folder is to hold: files of hubs by the name they get there, with the listing each is from, and copies."""

    files: Mapping[str, tuple[RemoteFile, Listing]]
    copies: Mapping[str, Path] = field(default_factory=dict)


def bring(
    wanted: Wanted, folder: Path, web: Web, workers: int, patience: Patience, notify: Callable[[Progress], None]
) -> tuple[FileResult, ...]:
    """Make a folder hold what is wanted; files that are there and right are kept, others are replaced.

    Raises:
        DownloadError: refused, too little disk, or damaged.
    """
    files = [replace(file, name=name) for name, (file, _) in wanted.files.items()]
    files.sort(key=lambda file: (file.size, file.name))  # the small ones first, so that trouble shows early
    present = {file.name for file in files if _is_right(folder / file.name, file, notify)}
    missing = [file for file in files if file.name not in present]
    results = [FileResult(file.name, file.size, "present") for file in files if file.name in present]
    same = {name for name, source in wanted.copies.items() if _is_same(folder / name, source)}
    copies = {name: source for name, source in wanted.copies.items() if name not in same}
    results += [FileResult(name, _size(folder / name), "present") for name in same]
    if missing or copies:
        _check_disk(folder, missing, copies)
        with _parts_folder(folder) as parts:
            results += [_copied(source, parts, folder / name, name) for name, source in copies.items()]
            if missing:
                listings = {name: listing for name, (_, listing) in wanted.files.items()}
                results += _Job(folder, parts, web, listings, patience).run(missing, workers, notify)
    return tuple(sorted(results, key=lambda file: file.name))


def _is_same(path: Path, source: Path) -> bool:
    if not os.path.isfile(path):
        return False
    with _on_disk(path):
        return filecmp.cmp(path, source, shallow=False)


def _copied(source: Path, parts: Path, target: Path, name: str) -> FileResult:
    part = parts / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.copy.part"
    with _on_disk(target):
        try:
            shutil.copyfile(source, part)
            _publish(part, target)
        finally:
            part.unlink(missing_ok=True)
        return FileResult(name, _size(target), "copied")


def _is_right(path: Path, file: RemoteFile, notify: Callable[[Progress], None]) -> bool:
    if not os.path.isfile(path) or _size(path) != file.size:
        return False
    with _on_disk(path):
        return _digest(path, file, lambda done: notify(Progress(file.name, "check", done, file.size))) == file.digest


def _digest(path: Path, file: RemoteFile, advance: Callable[[int], None]) -> str:
    """The checksum of `path` as the hub would write it for `file`; `advance` gets the bytes read so far."""
    digest, done = new_digest(file), 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            advance(done)
    return digest.hexdigest()


def _part(parts: Path, file: RemoteFile) -> Path:
    """Where a file is collected. The checksum in the name keeps another revision's part from being continued."""
    return parts / f"{_part_name(file)}.{file.digest[:16]}.part"


def _part_name(file: RemoteFile) -> str:
    flat = file.name.replace("/", "__")
    return flat if len(flat.encode()) < 200 else hashlib.sha256(flat.encode()).hexdigest()


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _check_disk(folder: Path, missing: Sequence[RemoteFile], copies: Mapping[str, Path]) -> None:
    need = sum(max(file.size - _size(_part(folder / PARTS_FOLDER, file)), 0) for file in missing)
    need += sum(_size(source) for source in copies.values())
    with _on_disk(folder):
        above = folder.absolute()
        free = shutil.disk_usage(next(path for path in (above, *above.parents) if os.path.exists(path))).free
    if free < need + DISK_MARGIN:
        raise DownloadError(
            f"{folder}: {need / 1e9:.2f} GB are still to come, with {DISK_MARGIN / 1e9:.2f} GB to spare, and only "
            f"{free / 1e9:.2f} GB are free; free some space or choose a folder on another disk"
        )


@contextlib.contextmanager
def _parts_folder(folder: Path) -> Iterator[Path]:
    """The folder of unfinished files, held by one process at a time and removed when nothing is in them."""
    from filelock import FileLock, Timeout

    parts, is_new = folder / PARTS_FOLDER, not os.path.exists(folder)
    lock = FileLock(parts / "lock", timeout=0)
    with _on_disk(folder):
        parts.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise DownloadError(f"{folder}: another download into it is running; wait for it or stop it") from error
    try:
        yield parts
    finally:
        with contextlib.suppress(OSError):
            for part in parts.glob("*.part"):
                if not _size(part):
                    part.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # somebody else's file in there is not ours to remove
            if not any(parts.glob("*.part")):
                (parts / "lock").unlink(missing_ok=True)
                parts.rmdir()
            if is_new:
                folder.rmdir()


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Around work on files, so that their OSError is not taken for the network's."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full; free some space and run the same command again to resume"
        else:
            what = f"cannot be read or written ({error.strerror or error}); choose another folder"
        raise DownloadError(f"{path}: {what}") from error


class _Pace:
    """Whether a connection still brings bytes, rather than one now and then."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._since, self._before = time.monotonic(), 0

    def fails(self, brought: int) -> bool:
        """Told the bytes so far: whether the last `window` seconds brought too few of them."""
        now = time.monotonic()
        if now - self._since <= self._window:
            return False
        slow = brought - self._before < SLOWEST * (now - self._since)
        self._since, self._before = now, brought
        return slow


class _StoppedError(Exception):
    """Ends a worker whose result nobody waits for any more."""


@dataclass
class _Job:
    """The files of one download on their way, several at a time."""

    folder: Path
    parts: Path
    web: Web
    listings: Mapping[str, Listing]
    patience: Patience
    stop: threading.Event = field(default_factory=threading.Event)
    events: queue.SimpleQueue[Progress | FileResult | BaseException] = field(default_factory=queue.SimpleQueue)
    reported: dict[str, float] = field(default_factory=dict)
    received: Counter[str] = field(default_factory=Counter)

    def run(self, files: Sequence[RemoteFile], workers: int, notify: Callable[[Progress], None]) -> list[FileResult]:
        """Fetch all; the first failure stops the others, whose parts stay for the next call."""
        todo: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        for file in files:
            todo.put(file)
        # Daemons, because a worker may sit in a read for `timeout` seconds after Ctrl-C. Losing one there is safe: it
        # only ever appends to a part, and a file gets its name in a single step.
        count = min(workers, len(files))
        threads = [threading.Thread(target=self._work, args=(todo,), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        results: list[FileResult] = []
        try:
            while len(results) < len(files):
                event = self.events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Progress):
                    notify(event)
                else:
                    results.append(event)
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(timeout=1)
        return results

    def _work(self, todo: queue.SimpleQueue[RemoteFile]) -> None:
        try:
            while True:
                self.events.put(self._obtain(todo.get_nowait()))
        except (queue.Empty, _StoppedError):
            return
        except BaseException as error:  # carried to the caller's thread, which raises it
            self.events.put(error)

    def _obtain(self, file: RemoteFile) -> FileResult:
        target, part = self.folder / file.name, _part(self.parts, file)
        with _on_disk(self.parts):
            for old in self.parts.glob(f"{glob.escape(_part_name(file))}.*.part"):
                if old != part or _size(old) > file.size:
                    old.unlink()
        action: Action = "replaced" if target.exists() else "resumed" if _size(part) else "fetched"
        for damaged in range(DAMAGED_ATTEMPTS):
            self._collect(file, part)
            with _on_disk(target):
                digest = _digest(part, file, lambda done: self._report(file, "check", done))
                if digest == file.digest:
                    _publish(part, target)
                    return FileResult(file.name, file.size, action, self.received[file.name], damaged)
                part.unlink()
        raise DownloadError(
            f"{file.name} arrived damaged {DAMAGED_ATTEMPTS} times ({file.digest_kind} {digest[:12]} instead of "
            f"{file.digest[:12]}) and was not kept; give another --endpoint or --source, or try again later"
        )

    def _collect(self, file: RemoteFile, part: Path) -> None:
        """Bring `part` to the file's size, over as many connections as it takes."""
        failures = 0
        with _on_disk(part):
            part.touch()
        while (have := _size(part)) < file.size:
            problem = self._continue(file, part, have)
            now = _size(part)
            if now >= file.size:
                break
            # A server that drips is as good as silent, and would go on for years.
            failures = 1 if now - have > SLOWEST * self.patience.timeout else failures + 1
            if failures >= self.patience.attempts:
                raise DownloadError(f"{file.name}: {problem}; the same command resumes what is there")
            if self.stop.wait(self.patience.after(failures)):
                raise _StoppedError

    def _continue(self, file: RemoteFile, part: Path, have: int) -> str:
        """Append to `part` what one connection brings, and say why that is not all; another may bring more."""
        listing = self.listings[file.name]
        headers = {**listing.headers, **({"Range": f"bytes={have}-"} if have else {})}
        try:
            with self.web.get(file.url, headers, whole=False) as answer:
                if answer.status in (200, 206):
                    return self._append(answer, part, file, have)
                if answer.status == 416:  # the part is of no use to this server
                    with _on_disk(part):
                        part.write_bytes(b"")
                elif answer.status not in (408, 429) and answer.status < 500:
                    raise DownloadError(listing.explain(answer, file.name))
                return listing.explain(answer, file.name)
        except ConnectionFailed as error:
            return str(error)

    def _append(self, answer: Answer, part: Path, file: RemoteFile, have: int) -> str:
        """Write an answer's body behind the `have` bytes of `part`, up to the file's size; says why it ended."""
        if answer.status == 206:
            answered = re.match(r"bytes (\d{1,18})-", answer.headers.get("content-range", ""), re.ASCII)
            if answered is None or int(answered[1]) != have:
                raise DownloadError(
                    f"{answer.origin} answers with a wrong range of {file.name}; give another --endpoint"
                )
        else:
            have = 0  # the server ignores ranges and sends the whole file
        with _on_disk(part):
            stream = part.open("r+b")
            stream.seek(have)
        self._report(file, "download", have)
        pace, brought = _Pace(self.patience.timeout), 0
        with stream:
            for chunk in answer.body:
                chunk = chunk[: file.size - have]
                with _on_disk(part):
                    stream.write(chunk)
                    stream.flush()
                have += len(chunk)
                brought += len(chunk)
                self.received[file.name] += len(chunk)
                self._report(file, "download", have)
                if have == file.size or pace.fails(brought):
                    break
        return f"{answer.origin} sent {brought} bytes and no more"

    def _report(self, file: RemoteFile, phase: Literal["download", "check"], done: int) -> None:
        """Tell the caller's thread, ten times a second at most, and learn from it whether to go on."""
        if self.stop.is_set():
            raise _StoppedError
        now = time.monotonic()
        if now - self.reported.get(file.name, 0.0) >= 0.1 or done in (0, file.size):
            self.reported[file.name] = now
            self.events.put(Progress(file.name, phase, done, file.size))


def _publish(part: Path, target: Path) -> None:
    """Give a complete file its name in one step, after its bytes are on the disk."""
    with part.open("r+b") as stream:
        os.fsync(stream.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, target)

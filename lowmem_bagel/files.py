"""Reading what others wrote: ordinary files only, and JSON within limits.

Whatever a name leads to (a FIFO, a device, a file without end) and whatever bytes are in a file, the answer comes at
once: the content, an OSError or a ValueError. Who asked makes its own error of it.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 16 << 20
"""Of one JSON text: twice BAGEL's largest (tokenizer.json). In memory it may take some thirty times as much."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""What begins a text that PowerShell wrote."""
MAX_DEPTH = 64
"""Of objects and lists inside each other."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home that a `~` at its beginning stands for; as it is where nobody knows that home."""
    return Path(os.path.expanduser(path))


def open_file(path: Path) -> BinaryIO:
    """An ordinary file, opened to be read; links are followed.

    Raises:
        OSError: there is none, it cannot be read, it is something else (`strerror` says so), or no file can have
            this name.
    """
    try:
        # Asked first, because opening alone can have effects on a device; and again, because files are replaced.
        _check_ordinary(os.stat(path))
        # A FIFO that took the file's place in between would keep us waiting for its writer.
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except ValueError as error:  # NUL, or half a character
        raise OSError(errno.EINVAL, "no file can have such a name") from error
    try:
        _check_ordinary(os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def _check_ordinary(info: os.stat_result) -> None:
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "it is not an ordinary file")


@contextmanager
def readable(error: type[Exception]) -> Iterator[None]:
    """What the system refuses while a folder is looked through, such as a name that is too long, as an `error`."""
    try:
        yield
    except OSError as refusal:
        raise error(f"{refusal.filename}: cannot be read ({refusal.strerror or refusal})") from refusal


def read_file(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of an ordinary file.

    Raises:
        OSError: as of `open_file`, or it holds more than `limit` bytes.
    """
    with open_file(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit >> 20} MiB")
    return data


def parse_json(data: bytes, limit: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Stricter than Python's: no key twice, no number beyond float64, no half characters, no deep nesting, so that what
    comes out can be shown, stored and walked through without surprises.

    Raises:
        ValueError: any other bytes; it says in a few words why.
    """
    if len(data) > limit:
        raise ValueError(f"larger than {limit >> 20} MiB")
    try:
        value = json.loads(
            data.decode("utf-16" if data[:2] in UTF_16 else "utf-8-sig"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_number,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("nested too deep") from None
    _check_depth(value)
    if b"\\u" in data:  # only an escape can bring in half a character
        json.dumps(value, ensure_ascii=False).encode()
    return value


_NESTED = (dict, list)
"""What a parser makes, whose types need no more than a look: most of a header is short lists of numbers."""


def _check_depth(value: Any) -> None:
    level = [value] if type(value) in _NESTED else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        level = [
            inner for outer in level for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in _NESTED
        ]  # fmt: skip
    if level:
        raise ValueError("nested too deep")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text[:40]} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _refuse_number(text)

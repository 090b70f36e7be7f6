"""Where everything that is said goes out: answers to stdout, notes to stderr, made printable, in any encoding.

What a command prints is often not ours: names and texts from files, models and hubs. And where it goes is not ours
either: a pipe whose reader has left, a full disk, a console that knows no é. None of that may lose an answer or end a
command with a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import OutputError, printable

if TYPE_CHECKING:
    from pathlib import Path

EXIT_NOBODY_READS = 0
"""Of `lowmem-bagel ... | head -1`: the reader has what it wanted."""
MAX_TEXT = 100_000
"""Characters of one text on stdout; JSON is never cut."""
MIN_FOLDED = 20
"""Columns: a terminal that leaves fewer wraps by itself."""


def say(text: str = "", style: str = "") -> None:
    """An answer, on stdout; it may have several lines. `style`, such as "bold red", is for terminals that have it."""
    text = printable(text, MAX_TEXT, lines=True)
    if not style or not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text(text, style), soft_wrap=True)


def note(text: str) -> None:
    """One line about the work, on stderr, so that stdout stays clean for answers."""
    print(printable(text), file=sys.stderr)


def next_line(prompt: str, limit: int) -> str | None:
    """The next line of stdin without blanks around it, at most so many characters at a time; None where there is no
    more. A person at a terminal sees the prompt, on stderr."""
    if at_terminal():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline(limit) if sys.stdin is not None else ""
    return line.strip() if line else None


def at_terminal() -> bool:
    """Whether lines of stdin are typed by a person."""
    return sys.stdin is not None and sys.stdin.isatty()


def print_json(value: object, indent: int | None = 1) -> None:
    r"""A value as JSON on stdout, whole: what may not be printed as it is, is written as `\u`. Without an indent it is
    one line."""
    import json

    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(value, indent=indent, ensure_ascii=not utf8)
    # What is left to escape stands inside strings: between them JSON has spaces and line breaks alone.
    print("".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text))


def print_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Aligned columns on stdout, those numbered in `right` to the right. Nothing is cut.

    The last column is folded where it would leave a terminal; into a pipe or file, every row is one line.
    """
    import shutil

    from rich.cells import cell_len

    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*shown, strict=True)]
    start = sum(widths[:-1]) + 2 * len(widths[:-1])
    room = shutil.get_terminal_size().columns - start if sys.stdout.isatty() else 0
    for row in shown:
        blanks = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        pairs = enumerate(zip(row, blanks, strict=True))
        *cells, last = (blank + cell if number in right else cell + blank for number, (cell, blank) in pairs)
        print("  ".join([*cells, _folded(last.rstrip(), room, start)]).rstrip())


def _folded(text: str, room: int, indent: int) -> str:
    import textwrap

    if room < MIN_FOLDED:
        return text
    return f"\n{' ' * indent}".join(textwrap.wrap(text, room, break_on_hyphens=False)) or text


def quoted(path: str | Path) -> str:
    """A path as a command that is to be copied needs it, on the system at hand."""
    import shlex
    import subprocess

    if os.name != "nt":
        return shlex.quote(str(path))
    text = subprocess.list2cmdline([str(path)])
    return f'"{text}"' if set(text) & set("&|<>^()%!;,=") and not text.startswith('"') else text


@contextmanager
def prepared() -> Iterator[Callable[[], None]]:
    """For the time of a command, stdout and stderr take every text; gives what sends out the last of it.

    From then on saying something, and that function, raise:
        OutputError: stdout cannot be written.
        SystemExit: nobody reads stdout any more.
    """
    outer = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Answers(outer[0]), _Notes(outer[1])
    try:
        yield sys.stdout.flush
    finally:
        sys.stdout, sys.stderr = outer


class _Stream:
    """A text stream that writes what its encoding lacks as backslashes, line by line, until it fails.

    There is none where it was closed before the program began. What takes the stream's binary side, as the library that
    reads the command line does in some locales, would go past this; so it has none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._failure: OSError | None = None
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer" or self._stream is None:
            raise AttributeError(name)
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with self._failures():
            self._open_stream().write(text)
        return len(text)

    def flush(self) -> None:
        with self._failures():
            if self._failure is not None or self._stream is not None:
                self._open_stream().flush()

    def _open_stream(self) -> TextIO:
        """The stream, unless it has failed before: whoever wrote then may have gone on regardless."""
        if self._stream is None:
            raise self._failure or OSError(errno.EBADF, "it is closed")
        return self._stream

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._abandon()
            self._failure = error
            self._failed(error)

    def _abandon(self) -> None:
        """What is still in the stream's buffer goes nowhere; Python's own last flush would fail again, and say so."""
        if self._stream is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream = None

    def _failed(self, error: OSError) -> None:
        raise NotImplementedError


class _Answers(_Stream):
    def _failed(self, error: OSError) -> None:
        # Windows has its own word for a closed pipe.
        if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
            raise SystemExit(EXIT_NOBODY_READS) from None
        raise OutputError(f"cannot write to stdout ({error.strerror or error}); send it somewhere else") from error


class _Notes(_Stream):
    """Where it fails there is no place left to say so: the work goes on without it."""

    def _failed(self, error: OSError) -> None:
        pass

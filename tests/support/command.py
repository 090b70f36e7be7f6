"""The command line, in this process and in one of its own."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""Begins a program that a test interrupts: Python leaves SIGINT ignored where its parent ignores it (nohup, `&`)."""


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal, without the program's name.

        Asserts that the command was refused as a user's mistake should be: exit code 2, nothing on stdout, one line
        of error, no traceback. Notes may come before it.
        """
        lines = [line for line in self.err.splitlines() if not line.startswith(("note: ", "Using the embedded"))]
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.out == ""
        assert len(lines) == 1, self.err
        assert lines[0].startswith("lowmem-bagel: ")
        return lines[0].removeprefix("lowmem-bagel: ")


ATTACK = "\x1b]0;title\x07\x1b[2J\r\nlowmem-bagel: fine\n\x9b31m\u202eevil\u2066 \u2028\x7f\b"
"""Text that, printed as it is, drives a terminal or looks like lines of ours."""


def drives_a_terminal(text: str) -> bool:
    """Whether a text holds what only a program may send to a terminal: all that is not printable but line breaks."""
    return any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text if c not in "\n\u200c\u200d")

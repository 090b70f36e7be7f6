"""The command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..errors import Cancelled, OutputError, SettingError, UserError, printable
from .terminal import note, prepared

EXIT_FAULT, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


def main() -> None:
    """Entry point: runs a command and turns the package's errors into one line and an exit code.

    Exit codes: 0, 2 for a user's mistake, 130 when interrupted, 1 (with a traceback) for a fault of ours. A reader of
    stdout that leaves early (`| head -1`) ends the command quietly, with 0.
    """
    with prepared() as send_out:
        code = _exit_code(_command) or _exit_code(send_out)
    sys.exit(code)


def _command() -> int:
    _check_surroundings()
    from .app import app

    code = int(app(prog_name="lowmem-bagel", standalone_mode=False) or 0)
    # typer makes an exit code of a KeyboardInterrupt, and says nothing.
    return _fail("interrupted", code) if code == EXIT_INTERRUPTED else code


def _check_surroundings() -> None:
    """What every command takes for granted: a folder to work in, and arguments that the system can hand on."""
    try:
        os.getcwd()
    except OSError as error:
        raise OutputError(f"the working folder is gone ({error.strerror}); change to another one") from error
    for argument in sys.argv[1:]:
        try:
            known = b"\0" not in os.fsencode(argument)
        except UnicodeEncodeError:
            known = False
        if not known:
            raise SettingError(f"the argument {printable(argument, 100)!r} holds a character that no text has")


def _exit_code(run: Callable[[], int | None]) -> int:
    try:
        return run() or 0
    except UserError as error:
        return _fail(str(error), EXIT_USER)
    except (KeyboardInterrupt, Cancelled):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        code = _usage_error(error)
        if code is None:
            raise
        return code


def _usage_error(error: Exception) -> int | None:
    """The exit code of an error of the command line's syntax, shown as the library shows it; None for others."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if type(error).__name__ == "Abort":
        return _fail("interrupted", EXIT_INTERRUPTED)
    if code is None:
        return None
    if show is not None:
        if type(error).__name__ != "NoArgsIsHelpError":  # the message is the help
            error.message = printable(getattr(error, "message", ""))  # type: ignore[attr-defined]
        show()
    return int(code)


def _fail(message: str, code: int) -> int:
    note(f"lowmem-bagel: {message}")
    return code

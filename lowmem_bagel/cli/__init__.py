"""The command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys

from ..errors import Cancelled, UserError

EXIT_FAULT, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


def main() -> None:
    """Entry point: runs a command and turns the package's errors into one line and an exit code.

    Exit codes: 0, 2 for a user's mistake, 130 when interrupted, 1 (with a traceback) for a fault of ours.
    """
    try:
        from .app import app

        code = app(prog_name="lowmem-bagel", standalone_mode=False) or 0
        # typer makes an exit code of a KeyboardInterrupt, and says nothing.
        sys.exit(_fail("interrupted", code) if code == EXIT_INTERRUPTED else code)
    except UserError as error:
        sys.exit(_fail(str(error), EXIT_USER))
    except (KeyboardInterrupt, Cancelled):
        sys.exit(_fail("interrupted", EXIT_INTERRUPTED))
    except Exception as error:
        code = _usage_error(error)
        if code is None:
            raise
        sys.exit(code)


def _usage_error(error: Exception) -> int | None:
    """The exit code of an error of the command line's syntax, shown as the library shows it; None for others."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if type(error).__name__ == "Abort":
        return _fail("interrupted", EXIT_INTERRUPTED)
    if code is None:
        return None
    if show is not None:
        show()
    return int(code)


def _fail(message: str, code: int) -> int:
    print(f"lowmem-bagel: {message}", file=sys.stderr)
    return code

"""Every exception this package raises on purpose.

`UserError` and below are mistakes or conditions a person can act on: one line that says what is wrong and what
to do; the CLI prints it and exits with 2. Anything else is a fault of ours.
"""

MAX_LINE = 1000
"""Characters of a message: room for two long paths and what is to be done."""
_BLANKS = frozenset(
    "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}" + "".join(map(chr, range(0x2000, 0x200B)))
)
_JOINERS = frozenset("\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}")
_SHOWN = _BLANKS | _JOINERS
"""What Python escapes in a repr, and a terminal may have: letters of some scripts and emoji need the joiners."""


def printable(text: str, limit: int | None = MAX_LINE, lines: bool = False) -> str:
    r"""Text of unknown origin as a terminal may have it: in one line, without anything that drives the terminal.

    Control and formatting characters (escape sequences, bidi overrides, half characters) become `\x1b`, `\u202e`. From
    a text of more than `limit` characters the middle is left out, since what is wrong stands at the beginning of a
    message and what to do at its end. With `lines`, line breaks and tabs stay.
    """
    if limit is not None and len(text) > 2 * limit:
        text = text[:limit] + text[-limit:]  # escaping makes nothing shorter
    if not text.isprintable():
        kept = _SHOWN | {"\n", "\t"} if lines else _SHOWN
        text = "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
    if limit is None or len(text) <= limit:
        return text
    return f"{text[: limit - limit // 4]} ... {text[-(limit // 4) :]}"


class LowmemBagelError(Exception):
    """Root of the package's exceptions. Its text is `printable`, whatever it quotes."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(LowmemBagelError):
    """Something the caller can put right."""


class CheckpointError(UserError):
    """A model folder or file is missing, truncated, corrupt or not what its configuration says."""


class ConfigError(UserError):
    """A configuration file of a model folder is missing a value or holds a wrong one."""


class ImageError(UserError):
    """An input is not a picture that can be used."""


class ChatError(UserError):
    """A file is not a saved chat that can be gone on with."""


class SettingError(UserError):
    """A request has an impossible or unknown setting."""


class OutputError(UserError):
    """A result could not be written."""


class DownloadError(UserError):
    """A download failed, was refused or arrived damaged."""


class ConversionError(UserError):
    """A conversion was refused or had to stop."""


class MissingExtraError(UserError):
    """An optional package is needed; the message names the extra to install."""


class PipelineClosedError(UserError):
    """A pipeline was used after it was closed."""


class DoesNotFitError(UserError):
    """No placement fits the limits, or memory ran out; the message names the setting to try."""


class JobsFailedError(UserError):
    """Jobs of a batch have failed; its results say why."""


class DeviceError(UserError):
    """A card failed that nothing can be done without; the pipeline is closed."""


class BusyError(UserError):
    """A server cannot take a request now.

    Attributes:
        retry_after: seconds after which it is worth asking again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(BusyError):
    """A server takes no requests at all now: its model is loading, or it is shutting down."""


class TimeLimitError(UserError):
    """A request took longer than a server allows."""


class Cancelled(LowmemBagelError):
    """The step callback asked to stop."""


def first_line(failure: BaseException) -> str:
    """Of another's exception, for a reason: 200 characters at most."""
    return (str(failure).strip().splitlines() or ["no message"])[0][:200]

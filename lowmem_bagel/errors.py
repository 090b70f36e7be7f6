"""Every exception this package raises on purpose.

`UserError` and below are mistakes or conditions a person can act on: one line that says what is wrong and what
to do; the CLI prints it and exits with 2. Anything else is a fault of ours.
"""


class LowmemBagelError(Exception):
    """Root of the package's exceptions."""


class UserError(LowmemBagelError):
    """Something the caller can put right."""


class CheckpointError(UserError):
    """A model folder or file is missing, truncated, corrupt or not what its configuration says."""


class ConfigError(UserError):
    """A configuration file of a model folder is missing a value or holds a wrong one."""


class ImageError(UserError):
    """An input is not a picture that can be used."""


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


class Cancelled(LowmemBagelError):
    """The step callback asked to stop."""


def first_line(failure: BaseException) -> str:
    """Of another's exception, for a reason: 200 characters at most."""
    return (str(failure).strip().splitlines() or ["no message"])[0][:200]

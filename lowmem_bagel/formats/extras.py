"""Importing the optional packages."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingExtraError, SettingError
from ..hardware.features import why_off


def require(module: str, package: str, extra: str) -> Any:
    """Import the optional module `module` of `package`.

    Raises:
        MissingExtraError: it is not installed or does not load; the message gives the command to install it.
        SettingError: it is switched off by hand.
    """
    off = why_off(extra)
    if off is not None:
        raise SettingError(f"{package} is {off}; unset it, or choose another backend")
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise MissingExtraError(
            f'{package} cannot be imported ({error}); install it with: pip install "lowmem-bagel[{extra}]"'
        ) from error

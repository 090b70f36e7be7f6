"""What callers hand over as a number, a flag or a path, of whatever library; and how a message quotes it.

Nothing that a foreign class does leaves these functions: what is not to be read is None.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from itertools import islice
from typing import Any

SHOWN = 80
"""Characters of a value that a message quotes."""


def shown(value: Any) -> str:
    """A value as a message may quote it: in a few words of one line."""
    try:
        text = repr(value)
    except Exception:  # a caller's own class may fail in any way
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def whole_number(value: Any) -> int | None:
    """By `__index__`, as Python's and other libraries' whole numbers are; True and False are none."""
    try:
        return None if isinstance(value, bool) or _is_flag(value) else operator.index(value)
    except Exception:  # arrays of several values and foreign classes refuse in many ways
        return None


def number(value: Any) -> float | None:
    """By `__float__`; texts are no numbers, nor are True and False."""
    try:
        return None if isinstance(value, (bool, str, bytes, bytearray)) or _is_flag(value) else float(value)
    except Exception:  # as above
        return None


def flag(value: Any) -> bool | None:
    """True and False of any library, 1 and 0."""
    try:
        said = bool(value) if isinstance(value, bool) or _is_flag(value) else operator.index(value)
    except Exception:  # as above
        return None
    return bool(said) if said in (0, 1) else None


def several(value: Any, most: int) -> tuple[Any, ...] | None:
    """The values in whatever gives them one after the other, and no more than `most` + 1 of them."""
    try:
        return None if isinstance(value, (str, bytes, Mapping)) else tuple(islice(value, most + 1))
    except Exception:  # not to be gone through, or it fails meanwhile
        return None


def path_text(value: Any) -> str | None:
    """What a path is called, if it is one."""
    try:
        said = os.fspath(value)
    except Exception:  # no path, or a foreign class
        return None
    return said if isinstance(said, str) else None


def _is_flag(value: Any) -> bool:
    """Whether it is numpy's or torch's True or False, which both would take for a number."""
    return str(getattr(value, "dtype", "")).endswith("bool")

"""Sizes as people write them: of memory and files, to bytes and back; of pictures."""

from __future__ import annotations

import re

from .errors import SettingError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?)?b?", re.IGNORECASE)
GIB = 1 << 30


def parse_bytes(size: str | float | int | None, name: str = "size") -> int | None:
    """ "8GB" (10^9 bytes a GB), "7.5GiB", "500MB" or a number of bytes -> bytes; None and "" stay None.

    Raises:
        SettingError: not a size, or not a positive one.
    """
    if size is None or size == "":
        return None
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        count = float(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0.0
    else:
        count = 0.0 if isinstance(size, bool) else float(size)
    if not 1 <= count < 2**60:
        raise SettingError(f"{name} must be a size such as 8GB or a number of bytes, not {size!r}")
    return int(count)


def parse_memory(size: str, name: str = "size") -> float:
    """Memory as it is sold, in units of 2^30 bytes: "24GB", "24 GiB" and "24" are all 24.0; "512MB" is 0.5.

    Raises:
        SettingError: not a size, or not a positive one.
    """
    match = _SIZE.fullmatch(size.strip())
    if match is None or not 0 < float(match[1]) < 1e6:
        raise SettingError(f"{name} must be an amount of memory such as 24GB, not {size!r}")
    prefix = (match[2] or "g").lower().rstrip("i")
    return float(match[1]) * {"k": 2.0**-20, "m": 2.0**-10, "g": 1.0, "t": 2.0**10}[prefix]


def parse_sides(size: str, name: str = "size") -> tuple[int, int]:
    """Width and height in pixels: "768x1024", or "1024" for a square.

    Raises:
        SettingError: neither of these.
    """
    sides = size.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() and 0 < int(side) <= 1 << 16 for side in sides):
        raise SettingError(f"{name} must be like 1024 or 768x1024, not {size!r}")
    return int(sides[0]), int(sides[-1])


def format_bytes(count: int | float) -> str:
    """Bytes as a short text with decimal units, such as "7.50 GB"."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB"

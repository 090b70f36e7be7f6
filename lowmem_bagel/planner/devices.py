"""Which devices are asked for. Pure; no torch."""

from __future__ import annotations

from ..errors import SettingError
from ..settings import LoadOptions
from ..values import shown

MOST = 8
"""Devices at most."""


def device_names(options: LoadOptions) -> tuple[str, ...]:
    """One name, or those of several devices, of which the first is the one that does all but what it can share.

    Raises:
        SettingError: a name is none or given twice, cards and processors are mixed, or `device` is given too.
    """
    if not options.devices:
        return (options.device,)
    if options.device != "auto":
        raise SettingError("give either device or devices, whose first is what device would be")
    names = tuple(device_name(text) for text in options.devices.split(","))
    if len(names) > MOST:
        raise SettingError(f"devices names {len(names)}; {MOST} at most work on one picture")
    kinds = {name.partition(":")[0] for name in names}
    if len(kinds) > 1:
        raise SettingError("devices must be cards, such as 0,1, or stand-ins for them, such as cpu,cpu; not both")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None and kinds == {"cuda"}:
        raise SettingError(f"devices names {twice} twice; each card once")
    return names


def device_name(text: str) -> str:
    """A card's number, or a device's name, as a name.

    Raises:
        SettingError: it is neither.
    """
    text = text.strip()
    name = f"cuda:{int(text)}" if text.isascii() and text.isdecimal() else text
    kind, _, index = name.partition(":")
    if name != "cpu" and not (kind == "cuda" and index.isascii() and index.isdecimal()):
        raise SettingError(f"devices must be numbers of cards, such as 0,1, not {shown(text)}")
    return name

"""Which devices are asked for. Pure; no torch."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import SettingError
from ..settings import LoadOptions
from ..values import shown

MOST = 8
"""Devices at most."""
BETWEEN = re.compile(r",(?=\s*(?:\d+|cuda(?::\d+)?|cpu)?\s*(?:[=,]|$))")
"""A comma before a device, or before nothing: a folder's name may have others."""


class Asked(NamedTuple):
    """A device that is asked for, and the folder of its own that it is to hold, if any."""

    name: str
    variant: str = ""


def asked_devices(options: LoadOptions) -> tuple[Asked, ...]:
    """What `device_names` names, and what each is to hold.

    Raises:
        SettingError: as of `device_names`; or the first one is given a folder, or one that is empty.
    """
    names = device_names(options)
    if not options.devices:
        return tuple(map(Asked, names))
    parts = [text.partition("=")[1:] for text in BETWEEN.split(options.devices)]
    if parts[0][0]:
        raise SettingError(f"devices gives {names[0]} a folder of its own; the first one has the model that is loaded")
    for name, (equals, variant) in zip(names, parts, strict=True):
        if equals and not variant.strip():
            raise SettingError(f"devices gives {name} no folder after '='; say {name}=FOLDER, or {name} alone")
    return tuple(Asked(name, variant.strip()) for name, (_, variant) in zip(names, parts, strict=True))


def device_names(options: LoadOptions) -> tuple[str, ...]:
    """One name, or those of several devices, of which the first is the one that does all but what it can share.

    Raises:
        SettingError: a name is none or given twice, cards and processors are mixed, or `device` is given too.
    """
    if not options.devices:
        return (options.device,)
    if options.device != "auto":
        raise SettingError("give either device or devices, whose first is what device would be")
    names = tuple(device_name(text.partition("=")[0]) for text in BETWEEN.split(options.devices))
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

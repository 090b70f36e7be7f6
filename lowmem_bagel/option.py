"""One option, as data, and what its values are checked by."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import SettingError
from .values import flag, number, path_text, several, shown, whole_number

MAX_TEXTS = 100

Kind = Literal["flag", "whole", "number", "pair", "sides", "text", "texts", "names", "bytes", "path"]
"""What a value is: true or false, a whole number, a number, two numbers (from, to), height and width in pixels, a text,
any number of texts, some of the choices, a size such as "8GB" or a number of bytes, a file's path."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, as data."""

    name: str
    kind: Kind
    help: str
    """Without a full stop: what is appended says the choices and the default."""
    default: Any = None
    """None: said by the model or the machine, or drawn, where none is given."""
    choices: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of choices."""
    low: float = -math.inf
    high: float = math.inf
    flag: str = ""
    """On the command line, where it is not the name's."""
    told_by_request: bool = False
    """Of loading: known where a request is at hand, so that only what plans without one asks for it."""

    def checked(self, value: Any) -> Any:
        """The value as it is used from here on.

        Raises:
            SettingError: it is not of the kind, beyond the limits or none of the choices.
        """
        return CHECKS[self.kind](self, value)

    def to_json(self) -> dict[str, Any]:
        """Plain data for those who describe the option elsewhere; what does not apply is left out."""
        limits = {"minimum": self.low, "maximum": self.high}
        return (
            {"name": self.name, "type": self.kind, "help": self.help, "default": self.default}
            | ({"choices": list(self.choices)} if self.choices else {})
            | {name: limit for name, limit in limits.items() if math.isfinite(limit)}
        )


def _within(about: Option, form: str) -> str:
    return "" if math.inf in (-about.low, about.high) else f" from {about.low:{form}} to {about.high:{form}}"


def _whole(about: Option, value: Any) -> int:
    said = whole_number(value)
    if said is None or not about.low <= said <= about.high:
        raise SettingError(f"{about.name} must be a whole number{_within(about, 'd')}, not {shown(value)}")
    return said


def _number(about: Option, value: Any) -> float:
    said = number(value)
    if said is None or not about.low <= said <= about.high:
        raise SettingError(f"{about.name} must be a number{_within(about, 'g')}, not {shown(value)}")
    return said


def _two(about: Option, value: Any, wanted: str) -> tuple[Any, Any]:
    parts = several(value, 2)
    if parts is None or len(parts) != 2:
        raise SettingError(f"{about.name} must be {wanted}, not {shown(value)}")
    return parts[0], parts[1]


def _pair(about: Option, value: Any) -> tuple[float, float]:
    low, high = (_number(about, part) for part in _two(about, value, "two numbers (from, to)"))
    if low > high:
        raise SettingError(f"{about.name} is reversed: give ({high:g}, {low:g})")
    return low, high


def _sides(about: Option, value: Any) -> tuple[int, int]:
    height, width = (_whole(about, part) for part in _two(about, value, "height and width in pixels"))
    return height, width


def _text(about: Option, value: Any) -> str:
    if not isinstance(value, str):
        raise SettingError(f"{about.name} must be a text, not {shown(value)}")
    text = about.aliases.get(value, str(value))
    if about.choices and text not in about.choices:
        raise SettingError(f"unknown {about.name} {shown(text)}; choose one of {', '.join(about.choices)}")
    return text


def _texts(about: Option, value: Any) -> tuple[str, ...]:
    given = (value,) if path_text(value) is not None else several(value, MAX_TEXTS)
    texts = [path_text(text) for text in given] if given is not None else [""]
    if len(texts) > MAX_TEXTS or not all(texts):
        raise SettingError(f"{about.name} must be texts or paths, not {shown(value)}")
    return tuple(text for text in texts if text)


def _names(about: Option, value: Any) -> tuple[str, ...]:
    names = several(value, len(about.choices) ** 2)
    if not names or not all(isinstance(name, str) and name in about.choices for name in names):
        raise SettingError(f"{about.name} must be some of {', '.join(about.choices)}, not {shown(value)}")
    return names


def _flag(about: Option, value: Any) -> bool:
    said = flag(value)
    if said is None:
        raise SettingError(f"{about.name} must be True or False, not {shown(value)}")
    return said


def _bytes(about: Option, value: Any) -> str | float | None:
    """Texts are read where the units are known."""
    said = value if value is None or isinstance(value, str) else number(value)
    if said is None and value is not None:
        raise SettingError(f"{about.name} must be a size such as 8GB or a number of bytes, not {shown(value)}")
    return said


def _path(about: Option, value: Any) -> str | os.PathLike[str] | None:
    if value is not None and not path_text(value):
        raise SettingError(f"{about.name} must be the path of a file or folder, not {shown(value)}")
    path: str | os.PathLike[str] | None = value
    return path


CHECKS: Mapping[Kind, Callable[[Option, Any], Any]] = {
    "flag": _flag,
    "whole": _whole,
    "number": _number,
    "pair": _pair,
    "sides": _sides,
    "text": _text,
    "texts": _texts,
    "names": _names,
    "bytes": _bytes,
    "path": _path,
}
"""What `Option.checked` does, by kind."""

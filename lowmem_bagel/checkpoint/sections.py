"""Typed reading of one JSON object of a configuration, with errors that name the file and the key. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError

Value = TypeVar("Value")

_REQUIRED: Any = object()


class Section:
    """One JSON object. `path` is the file that it stands in, `name` its place there, empty for the whole file."""

    def __init__(self, path: Path, values: object, name: str = "") -> None:
        self.path, self.name = path, name
        self.where = f"{path}: {name}." if name else f"{path}: "
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: {name or 'the file'} must be a JSON object")
        self.values: Mapping[str, Any] = values

    def inside(self, *names: str) -> Section | None:
        """The first of these objects that is there. A text in its place is the name of a file of its own."""
        values = self.values
        found = next(
            (name for name in names if values.get(name) is not None and not isinstance(values[name], str)), None
        )
        if found is None:
            return None
        return Section(self.path, self.values[found], f"{self.name}.{found}" if self.name else found)

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = 2**31) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not minimum <= value <= maximum:
            raise ConfigError(f"{self.where}{key} must be a whole number from {minimum} to {maximum}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not abs(value) < 1e12:
            raise ConfigError(f"{self.where}{key} must be a number, not {value!r}")
        return float(value)

    def spelled(self, names: Sequence[str], read: Callable[[str], Value], default: Value = _REQUIRED) -> Value:
        """A value that has several spellings. The default holds only where none of them is there.

        Raises:
            ConfigError: two of them say different things.
        """
        found = {name: read(name) for name in names if name in self.values}
        if not found:
            return read(names[0]) if default is _REQUIRED else default
        first, *others = found
        for other in others:
            if found[other] != found[first]:
                raise ConfigError(
                    f"{self.where}{first} is {found[first]!r} and {other} is {found[other]!r}; keep the one that holds"
                )
        return found[first]

    def only(self, key: str, allowed: Sequence[object], why: str) -> None:
        """Refuse a setting that would change the arithmetic to one that is not BAGEL's; null is as good as absent.

        Raises:
            ConfigError: it has another value than those allowed.
        """
        value = self.values.get(key)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise ConfigError(f"{self.where}{key} is {_short(value)}, which is not supported: {why}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."

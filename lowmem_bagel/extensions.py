"""What other distributions add to ours: formats, step caches, attention backends and options, found by entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeVar

from .errors import SettingError


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def extensions(kind: str) -> Mapping[str, Any]:
    """The objects registered under the entry-point group `lowmem_bagel.KIND`, by their names there.

    Our own stand in lists beside the code that uses them; these come after.

    Raises:
        SettingError: one cannot be imported.
    """
    found = {}
    for point in _registered(f"lowmem_bagel.{kind}", tuple(sys.path)):
        try:
            found[point.name] = point.load()
        except Exception as failure:  # whatever another's module raises, the remedy is the same
            package = point.dist.name if point.dist else point.value
            why = f"{type(failure).__name__}: {failure}"
            refusal = f"{package}, which adds {point.name}, cannot be imported ({why}); mend or uninstall it"
            raise SettingError(refusal) from failure
    return found


@cache
def _registered(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """What is installed along the path. Read once: going through every distribution, several times a request and a
    tensor, took longer than what was asked for; one that is installed meanwhile is found by the next process."""
    return tuple(entry_points(group=group))


def with_extensions(kind: str, ours: Iterable[T], words: str) -> dict[str, T]:
    """Ours and what is registered under the kind, by the names that they say themselves, ours first.

    Args:
        words: what they are, in the plural.

    Raises:
        SettingError: one cannot be imported, or two say the same.
    """
    found: dict[str, T] = {}
    for thing in (*ours, *extensions(kind).values()):
        if thing.name in found:
            raise SettingError(f"two {words} are called {thing.name!r}; uninstall one of the packages that add them")
        found[thing.name] = thing
    return found


def registered_names(kind: str) -> tuple[str, ...]:
    """What is registered under the kind, in order; nothing is imported."""
    return tuple(sorted({point.name for point in _registered(f"lowmem_bagel.{kind}", tuple(sys.path))}))


def tool(name: str) -> Callable[..., Any]:
    """A function from beside the package, by its name among the tools.

    Raises:
        SettingError: it is not installed.
    """
    for point in _registered("lowmem_bagel.tools", tuple(sys.path)):
        if point.name == name:
            found: Callable[..., Any] = point.load()
            return found
    raise SettingError(f"the tool {name!r} is not installed; reinstall lowmem-bagel")

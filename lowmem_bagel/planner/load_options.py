"""Options of loading that only change the plan: ours, and those that other distributions add.

Such an option is one object, a `LoadOption`, and one line: in `OURS`, or in its distribution's entry points,

    [project.entry-points."lowmem_bagel.load_options"]
    made-up = "their_module:MADE_UP"

It is then a flag of the commands that load or plan and a keyword of `BagelPipeline.from_pretrained`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ..errors import SettingError
from ..extensions import with_extensions
from ..settings import Kind, LoadOptions, Option, options_of
from .plan import Plan

P = ParamSpec("P")
Class = TypeVar("Class")
Source = TypeVar("Source")
Loaded = TypeVar("Loaded")

KINDS: Mapping[type, Kind] = {bool: "flag", int: "whole", float: "number", str: "text"}
"""What an option's values are, by the type of its default."""


class LoadOption(Protocol):
    """Declares an option: its default, a bool, int, float or str, says what its values are."""

    @property
    def name(self) -> str:
        """As a keyword."""
        ...

    @property
    def help(self) -> str:
        """A line without a full stop."""
        ...

    @property
    def default(self) -> Any: ...

    @property
    def choices(self) -> tuple[str, ...]:
        """Empty where any value of the kind will do."""
        ...

    def apply(self, plan: Plan, value: Any) -> Plan:
        """The plan changed for a value that is not the default, with the reason among its `reasons`.

        Pure: it is called more than once. Raises SettingError where the plan cannot have it.
        """
        ...


OURS: tuple[LoadOption, ...] = ()


def added_options() -> dict[str, LoadOption]:
    """Every such option by its name, ours first.

    Raises:
        SettingError: two are called the same, or one as an option that is no addition.
    """
    found = with_extensions("load_options", OURS, "load options")
    taken = [field.name for field in fields(LoadOptions) if field.name in found]
    if taken:
        raise SettingError(f"two load options are called {taken[0]!r}; uninstall one of the packages that add them")
    return found


def load_options(planning: bool = False) -> tuple[Option, ...]:
    """All options of loading; without those that a request tells unless one is `planning` without a request."""
    own = (about for about in options_of(LoadOptions) if planning or not about.told_by_request)
    return (*own, *map(described, added_options().values()))


def described(added: LoadOption) -> Option:
    """The option as data."""
    kind = KINDS[type(added.default)]
    return Option(name=added.name, kind=kind, help=added.help, default=added.default, choices=added.choices)


def options_from(keywords: Mapping[str, Any]) -> LoadOptions:
    """Load options from the keywords of `from_pretrained`.

    Raises:
        TypeError: an unknown keyword.
        SettingError: an impossible value.
    """
    own = {field.name for field in fields(LoadOptions)} - {"added"}
    given = {name: keywords[name] for name in keywords if name not in own}
    known = added_options() if given else {}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; known are {', '.join(sorted(own | {*known}))}")
    added = {name: described(known[name]).checked(value) for name, value in given.items()}
    return LoadOptions(**{name: keywords[name] for name in keywords if name in own}, added=added)


def keywords_of(
    options: Callable[P, LoadOptions],
) -> Callable[[Callable[[Class, Source, LoadOptions], Loaded]], Callable[Concatenate[Class, Source, P], Loaded]]:
    """Makes keywords of a method's load options: those of `LoadOptions` for who reads, completes or type-checks a call,
    and the added ones too when it runs."""

    def decorate(
        method: Callable[[Class, Source, LoadOptions], Loaded],
    ) -> Callable[Concatenate[Class, Source, P], Loaded]:
        called: Callable[..., Loaded] = method
        *own, _ = inspect.signature(method).parameters.values()

        @functools.wraps(method)
        def taking(*before: Any, **keywords: Any) -> Loaded:
            named = {known.name: keywords.pop(known.name) for known in own if known.name in keywords}
            return called(*before, **named, options=options_from(keywords))

        listed = [known for name, known in inspect.signature(options).parameters.items() if name != "added"]
        taking.__signature__ = inspect.Signature([*own, *listed])  # type: ignore[attr-defined]
        return taking

    return decorate


def with_added(plan: Plan, options: LoadOptions) -> Plan:
    """The plan as the added options change it, in the order of their list. Those that keep their default do nothing."""
    if not options.added:
        return plan
    for name, added in added_options().items():
        value = options.added.get(name, added.default)
        if value != added.default:
            plan = added.apply(plan, value)
    return plan

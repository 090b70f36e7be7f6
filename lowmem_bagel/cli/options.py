"""Parameters of commands, made from options that are declared elsewhere: by settings, load options and formats."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from ..errors import SettingError
from ..settings import Kind, Option

TYPES: Mapping[Kind, Any] = {
    "flag": bool,
    "whole": int | None,
    "number": float | None,
    "pair": tuple[float, float] | None,
    "path": Path | None,
    "texts": list[str] | None,
}
"""What typer reads; other kinds are texts to it."""

Values: TypeAlias = Mapping[str, Any]
"""Options given on the command line, by name. Those that were not given are not there."""


@dataclass(frozen=True)
class Command:
    """A command one of whose parameters for each group of options holds what was given of them.

    The options are looked up when the command is asked for, because other distributions may add some.
    """

    run: Callable[..., None]
    groups: Mapping[str, Callable[[], Iterable[Option]]]

    def made(self) -> Callable[..., None]:
        """The function that typer is given: it has one parameter for every option."""
        groups = {group: tuple(options()) for group, options in self.groups.items()}
        own = inspect.signature(self.run, eval_str=True).parameters.values()
        kept = [known.replace(kind=known.KEYWORD_ONLY) for known in own if known.name not in groups]
        flags = [parameter(option) for options in groups.values() for option in options]
        _check_names([known.name for known in (*kept, *flags)])

        def command(**given: Any) -> None:
            said = {group: _said(options, given) for group, options in groups.items()}
            self.run(**{known.name: given[known.name] for known in kept}, **said)

        command.__signature__ = inspect.Signature([*kept, *flags])  # type: ignore[attr-defined]
        command.__doc__ = self.run.__doc__
        return command


def _check_names(names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SettingError(f"two options are called {twice[0]!r}; uninstall one of the packages that add them")


def takes(**groups: Callable[[], Iterable[Option]]) -> Callable[[Callable[..., None]], Command]:
    """Makes a command of a function whose parameters of these names are to hold the values of these options."""
    return lambda run: Command(run, groups)


def parameter(option: Option) -> inspect.Parameter:
    """An option of the command line; not given, it is False for a flag and None for all others."""
    annotation: Any = Annotated[TYPES.get(option.kind, str | None), typer.Option(flag_of(option), help=help_of(option))]
    default = False if option.kind == "flag" else None
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def flag_of(option: Option) -> str:
    """How the option is said; one that is on unless one says otherwise is turned off."""
    return option.flag or ("--no-" if option.default is True else "--") + option.name.replace("_", "-")


def help_of(option: Option) -> str:
    """What the option is, what may be chosen, and what holds where it is not given."""
    text = f"Do not {option.help[0].lower()}{option.help[1:]}" if option.default is True else option.help
    if option.choices:
        text += f": {', '.join(option.choices)}"
    if option.kind != "flag" and option.default != "" and _is_said(option.default):
        text += f"; default {SHOWN.get(option.kind, str)(option.default)}"
    return text + "."


def _said(options: Iterable[Option], given: Mapping[str, Any]) -> Values:
    said = [(option, given[option.name]) for option in options if _is_said(given[option.name])]
    return {option.name: _read(option, value) for option, value in said}


def _read(option: Option, value: Any) -> Any:
    if option.kind == "flag":
        return not option.default
    return READ[option.kind](value) if option.kind in READ else value


def _is_said(value: Any) -> bool:
    return value is not None and value is not False and value not in ((), [])


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _sides(text: str) -> tuple[int, int]:
    from ..units import parse_sides

    width, height = parse_sides(text, "--size")
    return height, width


READ: Mapping[Kind, Callable[[Any], Any]] = {"names": _names, "texts": tuple, "sides": _sides}
"""What is made of the text that is given for a kind of value."""
SHOWN: Mapping[Kind, Callable[[Any], str]] = {
    "number": "{:g}".format,
    "pair": lambda pair: f"{pair[0]:g} {pair[1]:g}",
    "names": ",".join,
    "sides": lambda sides: f"{sides[1]}x{sides[0]}",
}
"""How a default is written on the command line."""

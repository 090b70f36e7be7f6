"""Options as widgets of a node, and what those say as options: a new option is a widget without a line here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...settings import Kind, Option

LEFT = " 0: left to the model."
SEED = "seed"


def widgets(options: Iterable[Option], shown: frozenset[str] = frozenset()) -> list[Any]:
    """Inputs of ComfyUI's API for options; all but those that are `shown` are folded away."""
    from comfy_api.latest import io

    found = []
    for about in options:
        made = MADE[about.kind](io, about, {"optional": True})
        if about.name not in shown:
            for widget in made:
                # Older versions of the API have no argument for it, and all have the dict.
                widget.extra_dict = {**widget.extra_dict, "advanced": True}
        found += made
    return found


def given(options: Iterable[Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that widgets give a value to; what is impossible, their checks refuse."""
    said = ((about.name, _value(about, values)) for about in options)
    return {name: value for name, value in said if value is not None}


def _value(about: Option, values: Mapping[str, Any]) -> Any:
    parts = [values.get(name) for name in names_of(about)]
    if any(part is None for part in parts):
        return None
    return READ[about.kind](about, *parts)


def names_of(about: Option) -> tuple[str, ...]:
    """Of an option's widgets."""
    return tuple(f"{about.name}_{part}" if part else about.name for part in PARTS.get(about.kind, ("",)))


PARTS: Mapping[Kind, tuple[str, ...]] = {"pair": ("from", "to"), "sides": ("height", "width")}


def _flag(io: Any, about: Option, common: dict[str, Any]) -> list[Any]:
    return [io.Boolean.Input(about.name, default=about.default, tooltip=_tip(about), **common)]


def _whole(io: Any, about: Option, common: dict[str, Any]) -> list[Any]:
    if about.name == SEED:
        low, high = int(about.low), int(about.high)
        return [
            io.Int.Input(
                SEED, default=0, min=low, max=high, control_after_generate=True, tooltip="Noise and choices", **common
            )
        ]
    left = about.default is None
    low = 0 if left else int(about.low)
    default = 0 if left else about.default
    tip = _tip(about) + (LEFT if left else "")
    return [io.Int.Input(about.name, default=default, min=low, max=int(about.high), tooltip=tip, **common)]


def _number(io: Any, about: Option, common: dict[str, Any]) -> list[Any]:
    return [_float(io, about.name, about, about.default, common)]


def _pair(io: Any, about: Option, common: dict[str, Any]) -> list[Any]:
    return [_float(io, *part, common) for part in zip(names_of(about), (about, about), about.default, strict=True)]


def _float(io: Any, name: str, about: Option, default: float, common: dict[str, Any]) -> Any:
    limits = {"min": about.low, "max": about.high}
    held = {which: limit for which, limit in limits.items() if math.isfinite(limit)}
    return io.Float.Input(name, default=default, step=0.01, round=0.001, tooltip=_tip(about), **held, **common)


def _sides(io: Any, about: Option, common: dict[str, Any]) -> list[Any]:
    held = {"min": int(about.low), "max": int(about.high)}
    return [
        io.Int.Input(name, default=side, tooltip=_tip(about), **held, **common)
        for name, side in zip(names_of(about), about.default, strict=True)
    ]


def _text(io: Any, about: Option, common: dict[str, Any]) -> list[Any]:
    if about.choices:
        return [
            io.Combo.Input(
                about.name, options=list(about.choices), default=about.default, tooltip=_tip(about), **common
            )
        ]
    return [io.String.Input(about.name, default=_shown(about.default), tooltip=_tip(about), **common)]


def _lines(io: Any, about: Option, common: dict[str, Any]) -> list[Any]:
    tip = f"{about.help}. One a line."
    return [io.String.Input(about.name, default="", multiline=True, tooltip=tip, **common)]


def _names(io: Any, about: Option, common: dict[str, Any]) -> list[Any]:
    tip = f"{about.help}: some of {', '.join(about.choices)}."
    return [io.String.Input(about.name, default=",".join(about.default), tooltip=tip, **common)]


def _shown(default: Any) -> str:
    return "" if default is None else str(default)


def _tip(about: Option) -> str:
    return f"{about.help}."


MADE: Mapping[Kind, Callable[[Any, Option, dict[str, Any]], list[Any]]] = {
    "flag": _flag,
    "whole": _whole,
    "number": _number,
    "pair": _pair,
    "sides": _sides,
    "text": _text,
    "texts": _lines,
    "names": _names,
    "bytes": _text,
    "path": _text,
}


def _as_it_is(about: Option, value: Any) -> Any:
    return value


def _unless_left(about: Option, value: Any) -> Any:
    """0 leaves an option to the model that has no default of its own; so does an empty text."""
    return None if about.default is None and about.name != SEED and value == 0 else value


def _said(about: Option, value: Any) -> Any:
    text = value.strip() if isinstance(value, str) else value
    return None if text == "" else text


def _texts(about: Option, value: str) -> Any:
    return tuple(line.strip() for line in value.splitlines() if line.strip()) or None


def _some(about: Option, value: str) -> Any:
    return tuple(name.strip() for name in value.split(",") if name.strip()) or None


def _both(about: Option, first: Any, second: Any) -> Any:
    return first, second


READ: Mapping[Kind, Callable[..., Any]] = {
    "flag": _as_it_is,
    "whole": _unless_left,
    "number": _as_it_is,
    "pair": _both,
    "sides": _both,
    "text": _said,
    "texts": _texts,
    "names": _some,
    "bytes": _said,
    "path": _said,
}

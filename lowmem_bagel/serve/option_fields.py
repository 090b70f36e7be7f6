"""Options as fields of a request's schema: a new option is checked and described by the API without a line here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ..settings import Kind, Option


def fields_of(options: Iterable[Option]) -> dict[str, Any]:
    """What `pydantic.create_model` takes: name -> (type, field). None, the default, leaves the choice to the option."""
    return {about.name: (TYPES[about.kind](about) | None, _field(about)) for about in options}


def given(body: BaseModel, options: Iterable[Option]) -> dict[str, Any]:
    """The settings that a request names."""
    said = ((about.name, getattr(body, about.name, None)) for about in options)
    return {name: value for name, value in said if value is not None}


def _field(about: Option) -> Any:
    default = ", ".join(map(str, about.default)) if isinstance(about.default, tuple) else about.default
    known = "" if default is None or "default:" in about.help else f"; default: {str(default).lower()}"
    return Field(None, description=about.help + known)


def _limited(kind: type, about: Option) -> Any:
    """Numbers are JSON's: neither texts nor true and false, and finite."""
    limits: dict[str, Any] = {"ge": about.low, "le": about.high}
    held = {name: limit for name, limit in limits.items() if math.isfinite(limit)}
    finite: dict[str, Any] = {"allow_inf_nan": False} if kind is float else {}
    return Annotated[kind, Field(strict=True, **held, **finite)]


def _text(about: Option) -> Any:
    return Literal[(*about.choices, *about.aliases)] if about.choices else Annotated[str, Field(max_length=1000)]


def _pair(about: Option) -> Any:
    number: Any = _limited(float, about)
    return Annotated[tuple.__class_getitem__((number, number)), Field(examples=[list(about.default)])]


TYPES: Mapping[Kind, Callable[[Option], Any]] = {
    "flag": lambda about: Annotated[bool, Field(strict=True)],
    "whole": lambda about: _limited(int, about),
    "number": lambda about: _limited(float, about),
    "pair": _pair,
    "text": _text,
}
"""By kind, for those that settings of a request have."""

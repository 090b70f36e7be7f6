"""Finding converters by format name. They are entry points, so that a new one needs no change here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

from lowmem_bagel.errors import ConversionError
from lowmem_bagel.variant import Option

from .base import Converter

GROUP = "lowmem_bagel.converters"


def available_formats() -> tuple[str, ...]:
    """Names of the installed converters; none is imported."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def make_converter(format_name: str, options: Mapping[str, Option] | None = None) -> Converter:
    """A converter for `format_name`; options that are False are taken as not given.

    Raises:
        ConversionError: no such format, or an option that it does not have.
    """
    for point in entry_points(group=GROUP, name=format_name):
        given = {name: value for name, value in (options or {}).items() if value is not False}
        converter: Converter = point.load()(given)
        return converter
    raise ConversionError(f"no converter for {format_name!r}; choose one of {', '.join(available_formats())}")

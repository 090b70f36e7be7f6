"""Finding converters by format name. They are entry points, so that a new one needs no change here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lowmem_bagel.checkpoint.manifest import Manifest, Option
from lowmem_bagel.errors import ConversionError

from .base import Converter

GROUP = "lowmem_bagel.converters"


def available_formats() -> tuple[str, ...]:
    """Names of the installed converters; none is imported."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def make_converter(format_name: str, options: Mapping[str, Option] | None = None) -> Converter:
    """A converter for `format_name` with the given options of that format.

    Raises:
        ConversionError: no such format, or an option that it does not have.
    """
    for point in entry_points(group=GROUP, name=format_name):
        try:
            make: Callable[[Mapping[str, Option]], Converter] = point.load()
        except ImportError as error:
            raise ConversionError(f"the converter for {format_name} needs what is not installed ({error})") from error
        return make(options or {})
    raise ConversionError(f"no converter for {format_name!r}; choose one of {', '.join(available_formats())}")


def convert_folder(
    source: Path, out: Path, format_name: str, options: Mapping[str, Option] | None = None, **settings: Any
) -> Manifest:
    """`engine.convert` with the converter of that name: what the command line reaches as an entry point.

    `settings` and errors are those of `engine.convert`.
    """
    from .convert import convert

    return convert(source, out, make_converter(format_name, options), **settings)

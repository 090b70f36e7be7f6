"""Every weight format: ours, and what other distributions register. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import CheckpointError, SettingError
from ..extensions import extensions, with_extensions
from .bf16.spec import CONVERTED as BF16
from .bf16.spec import SPEC as SOURCE
from .dfloat11.spec import SPEC as DFLOAT11
from .fp16.spec import SPEC as FP16
from .gguf.spec import SPECS as GGUF
from .int8.spec import SPEC as INT8
from .nf4.spec import SPEC as NF4
from .spec import FormatSpec

FORMATS = (SOURCE, BF16, DFLOAT11, INT8, FP16, NF4, *GGUF)


def formats() -> Mapping[str, FormatSpec]:
    """All formats by name; entry points of `lowmem_bagel.formats` add some, those of `lowmem_bagel.ways`, which are
    pairs of a format's name and a way, add to their ways."""
    found = with_extensions("formats", FORMATS, "formats")
    for name, way in extensions("ways").values():
        found[name] = replace(found[name], ways=(*found[name].ways, way))
    return found


def format_spec(name: str) -> FormatSpec:
    """The format called `name`.

    Raises:
        CheckpointError: there is none.
    """
    found = formats().get(name)
    if found is None:
        raise CheckpointError(f"unknown format {name!r}; choose one of {', '.join(formats())}, or update lowmem-bagel")
    return found


def packages() -> Mapping[str, tuple[str, str]]:
    """What must be installed for a backend that is another's: its module and its name on the package index."""
    ways = [way for spec in formats().values() for way in spec.ways]
    return dict(sorted((way.backend, way.package) for way in ways if way.package is not None))


def check_backend(spec: FormatSpec, backend: str) -> None:
    """Raises SettingError for a backend that no way of the format has."""
    if backend not in ("auto", *spec.backends):
        choices = ", ".join(spec.backends)
        raise SettingError(f"backend {backend!r} cannot run {spec.name}; choose auto or one of {choices}")

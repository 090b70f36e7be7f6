"""Encoding tensors in memory, for those who measure a format without a folder: what a converter would store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lowmem_bagel.checkpoint.manifest import Option
from lowmem_bagel.checkpoint.tensors import TensorSpec

from .base import SourceTensor
from .convert import KEPT_ENCODINGS
from .registry import make_converter
from .shards import plan_units

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InMemory:
    """A tensor as a variant has it; see `base.Encoded`."""

    encoding: str
    stored: Mapping[str, Tensor]
    options: Mapping[str, Option] = field(default_factory=dict)


def encode_tensors(
    format_name: str, options: Mapping[str, Option], tensors: Mapping[TensorSpec, Tensor]
) -> tuple[dict[TensorSpec, InMemory], Mapping[str, Any]]:
    """All tensors of a checkpoint, CPU tensors that stay as they are, as a variant has them; and what the format adds
    to `config.json`.

    Raises:
        ConversionError: no such format, or a tensor that it cannot hold.
    """
    from lowmem_bagel.formats.rows import roomy

    converter, found = make_converter(format_name, options), {}
    for unit in plan_units(tensors):
        given = [
            SourceTensor(spec, "BF16", tuple(data.shape), data.clone(), "", roomy)
            for spec, data in ((spec, tensors[spec]) for spec in unit.specs if converter.encodes(spec))
        ]
        for made in converter.convert(given) if given else ():
            found[made.source.spec] = InMemory(made.encoding, made.stored, made.options)
        for spec in unit.specs:
            kept = tensors[spec]
            found.setdefault(spec, InMemory(KEPT_ENCODINGS[str(kept.dtype).split(".")[1]], {spec.name: kept}))
    return found, converter.config_entries(list(tensors))

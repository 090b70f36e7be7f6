"""What the planner must know of a model: its dimensions, and how large each part is. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, cast

from ..checkpoint.adapters import Beside, values_beside
from ..checkpoint.check_tensors import Lack, lacking
from ..checkpoint.config import BAGEL_7B, BAGEL_MOE_7B, BagelConfig
from ..checkpoint.manifest import ROUNDING
from ..checkpoint.tensors import (
    EMBEDDING,
    LATENT_POSITIONS,
    LM_HEAD,
    VIT_POSITIONS,
    Expert,
    TensorSpec,
    tensor_table,
)
from ..errors import SettingError
from ..formats.registry import format_spec, formats
from ..formats.spec import FormatSpec, Layout
from .plan import Unit

if TYPE_CHECKING:
    from ..checkpoint.folder import ModelFolder

SHAPES: Mapping[str, BagelConfig] = {"bagel-7b": BAGEL_7B, "bagel-moe-7b": BAGEL_MOE_7B}
POSITION_SIDES = {LATENT_POSITIONS: 64, VIT_POSITIONS: 70}
"""Sides of the published position tables, which a folder's own tables replace."""


NOTHING_BESIDE = Beside()


@dataclass(frozen=True)
class Stored:
    """Some tensors: `plain` values kept as floats, `compressed` weights kept in `packed` bytes, and adapters'
    factors beside them, which are multiplied too."""

    plain: int
    compressed: int = 0
    packed: int = 0
    beside: Beside = NOTHING_BESIDE

    def nbytes(self, itemsize: int, decoded: bool = False) -> int:
        """Bytes in memory with floats of `itemsize` bytes; `decoded`: the weights are decoded while loading."""
        return (self.plain + self.beside.values) * itemsize + (self.compressed * itemsize if decoded else self.packed)


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model folder.

    `units` has every (layer, expert) of the folder; `vision` is the vision tower with its connector and positions,
    `latent` the projections, positions and time embedder of pictures being drawn, both in values, as are `embedding`
    and `vae`. `missing` has features of an `Environment` that the folder rules out, and why.
    """

    config: BagelConfig
    format: str
    units: Mapping[Unit, Stored]
    lm_head: Stored
    embedding: int
    vision: int
    latent: int
    vae: int
    latent_side: int
    name: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    lacking: Mapping[str, Lack] = field(default_factory=dict)
    """Parts that the folder lacks; see `check_tensors.lacking`."""
    rounded: bool = False
    """Whether weights of a variant had lost bits before they were encoded, their checkpoint not being bf16."""
    wider: bool = False
    """Whether weights are stored that bf16 cannot hold."""
    reading: Mapping[str, str] = field(default_factory=dict)
    """How the folder was read, in lines by topic."""
    left_out: frozenset[str] = frozenset()
    """Stageable parts that are on another device."""
    whole: bool = True
    """False for some of a model's layers."""

    @cached_property
    def spec(self) -> FormatSpec:
        return format_spec(self.format)

    @cached_property
    def experts(self) -> frozenset[Expert]:
        return frozenset(expert for _, expert in self.units)

    @cached_property
    def by_expert(self) -> Mapping[Expert, Stored]:
        """All units of an expert together."""
        sums: dict[Expert, list[int]] = {}
        for (_, expert), unit in self.units.items():
            found = sums.setdefault(expert, [0] * 5)
            each = unit.plain, unit.compressed, unit.packed, unit.beside.values, unit.beside.passed
            found[:] = [total + size for total, size in zip(found, each, strict=True)]
        return {
            expert: Stored(found[0], found[1], found[2], Beside(found[3], found[4])) for expert, found in sums.items()
        }

    @cached_property
    def values(self) -> int:
        """All values of the model."""
        stored = (self.lm_head, *self.units.values())
        others = self.embedding + self.vision + self.latent + self.vae
        return others + sum(tensors.plain + tensors.compressed for tensors in stored)

    def of_layers(self, layers: range) -> ModelFacts:
        """The same with these layers alone, counted from 0."""
        decoder = self.config.decoder
        routed = decoder.routed
        if routed is not None:
            routed = replace(routed, layers=frozenset(layers.index(at) for at in routed.layers if at in layers))
        return replace(
            self,
            config=replace(self.config, decoder=replace(decoder, num_layers=len(layers), routed=routed)),
            units={(layers.index(at), of): unit for (at, of), unit in self.units.items() if at in layers},
            whole=False,
        )

    @property
    def lossless(self) -> bool:
        return self.spec.lossless and not self.rounded

    @classmethod
    def of_shape(cls, format: str, shape: str = "bagel-7b") -> ModelFacts:
        """The published shape with nothing on disk, in a known format.

        Raises:
            SettingError: an unknown shape or format.
        """
        if shape not in SHAPES:
            raise SettingError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
        return cls.of_config(SHAPES[shape], format, shape)

    @classmethod
    def of_config(cls, config: BagelConfig, format: str, name: str = "") -> ModelFacts:
        """A model of these dimensions, its compressed sizes by the formats' bits a weight.

        Raises:
            SettingError: an unknown format.
        """
        spec_of_format = formats().get(format)
        if spec_of_format is None:
            raise SettingError(f"unknown format {format!r}; choose one of {', '.join(formats())}")
        return replace(_of_config(config, spec_of_format), name=name)

    @classmethod
    def of_folder(cls, folder: ModelFolder) -> ModelFacts:
        """A folder's sizes, from its headers."""
        spec_of_format = format_spec(folder.format)
        table, layout = tensor_table(folder.config), spec_of_format.layout(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        encoded: dict[str, int] = {}
        for spec in table.values():
            stored = stored_names(folder, spec.name, layout)
            if not stored:
                continue  # a variant that only answers; the loader says so where something else is missing
            plain = stored == (spec.name,) and spec.name in folder.stored and not folder.stored[spec.name].encoded
            shapes[spec.name] = folder.entry(spec.name).shape if None in spec.shape and plain else known_shape(spec)
            if spec_of_format.encoded and _is_encoded(folder, spec_of_format, spec.name, plain):
                kept = [name for name in stored if name.rpartition(".")[2] not in spec_of_format.not_on_device]
                encoded[spec.name] = sum(folder.stored[name].entry.nbytes for name in kept if name in folder.stored)
        facts = _added_up(folder.config, spec_of_format, folder.path.name, table, shapes, encoded, layout.missing)
        beside = values_beside(folder.beside, table)
        records = () if folder.manifest is None else folder.manifest.tensors.values()
        return replace(
            facts,
            units={unit: replace(stored, beside=beside.get(unit, Beside())) for unit, stored in facts.units.items()},
            lacking=lacking(folder, layout.stored),
            rounded=any(record.errors.get(ROUNDING) for record in records),
            wider=folder.manifest is None and any(_is_wider(folder, spec) for spec in table.values()),
            reading=folder.reading.lines,
        )


@lru_cache(maxsize=64)  # a choice asks for a few models in every format, and again for what would fit
def _of_config(config: BagelConfig, spec_of_format: FormatSpec) -> ModelFacts:
    table = tensor_table(config)
    shapes = {spec.name: known_shape(spec) for spec in table.values()}
    encoded = {
        spec.name: spec_of_format.nbytes(shapes[spec.name])
        for spec in table.values()
        if spec.linear and spec_of_format.encoded
    }
    return _added_up(config, spec_of_format, "", table, shapes, encoded, {})


def _is_wider(folder: ModelFolder, spec: TensorSpec) -> bool:
    """Of a checkpoint's tensor that is rounded as it is loaded; the VAE's dtype is its own."""
    return spec.part != "vae" and spec.name in folder.stored and folder.entry(spec.name).dtype in ("F16", "F32")


def known_shape(spec: TensorSpec) -> tuple[int, ...]:
    """A tensor's shape, that of a position table being the published one's."""
    if None not in spec.shape:
        return cast("tuple[int, ...]", spec.shape)
    side = POSITION_SIDES.get(spec.name, 0)
    return tuple(side * side if size is None else size for size in spec.shape)


def stored_names(folder: ModelFolder, name: str, layout: Layout) -> tuple[str, ...]:
    """What a tensor of the model is stored as in a folder of this layout; empty where it is not there."""
    if folder.manifest is not None:
        record = folder.manifest.tensors.get(name)
        return () if record is None else record.stored
    return layout.stored.get(name) or ((name,) if name in folder.stored else ())


def _is_encoded(folder: ModelFolder, format: FormatSpec, name: str, plain: bool) -> bool:
    if folder.manifest is not None:
        return format.holds(folder.manifest.tensors[name].encoding)
    return not plain


def _added_up(
    config: BagelConfig,
    spec_of_format: FormatSpec,
    name: str,
    table: Mapping[str, TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    encoded: Mapping[str, int],
    missing: Mapping[str, str],
) -> ModelFacts:
    parts = {"vit": 0, "connector": 0, "latent": 0, "vae": 0, "embedding": 0, "decoder": 0}
    units: dict[Unit, list[int]] = {}
    for spec in table.values():
        if spec.name not in shapes:
            continue
        count = math.prod(shapes[spec.name])
        if spec.layer is not None and spec.expert is not None:
            plain_compressed_packed = units.setdefault((spec.layer, spec.expert), [0, 0, 0])
            if spec.name in encoded:
                plain_compressed_packed[1] += count
                plain_compressed_packed[2] += encoded[spec.name]
            else:
                plain_compressed_packed[0] += count
        elif spec.name != LM_HEAD:
            parts[spec.part] += count
    head = math.prod(shapes.get(LM_HEAD, (0,)))
    packed_head = spec_of_format.runs_head and LM_HEAD in encoded
    return ModelFacts(
        config,
        spec_of_format.name,
        {unit: Stored(sizes[0], sizes[1], sizes[2]) for unit, sizes in units.items()},
        Stored(0, head, encoded[LM_HEAD]) if packed_head else Stored(head),
        embedding=math.prod(shapes.get(EMBEDDING, (0,))),
        vision=parts["vit"] + parts["connector"],
        latent=parts["latent"] + parts["decoder"],
        vae=parts["vae"],
        latent_side=math.isqrt(shapes.get(LATENT_POSITIONS, (0,))[0]),
        name=name,
        missing=missing,
    )

"""Which gen MLPs of a model are cut into routed experts (BAGEL-MoE): what its weights hold and its configuration says.

The published code makes a layer's experts of its whole MLP when the model is built, by settings that its configuration
need not hold. So the tensors decide which layers have experts and how many; how many of them a token goes through
stands in the configuration alone. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..errors import CheckpointError, ConfigError
from .config import DecoderConfig, Routed
from .sections import Section

COUNT = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "num_activated_experts")
TOP_K, SAMPLED_TOP_K = "top_k", 50
"""What the published code calls the number of active experts; and what transformers writes so, for drawing texts."""
MAX_COUNT = 512
REMEDY = "take the configuration that belongs to the weights"
_EXPERT = re.compile(r"language_model\.model\.layers\.(\d{1,6})\.mlp_moe_gen\.experts\.(\d{1,6})\.")
_MLP = re.compile(r"language_model\.model\.layers\.(\d{1,6})\.mlp_moe_gen\.")


@dataclass(frozen=True)
class Said:
    """What a configuration says of routed experts; None of what it does not say. `where` it stands."""

    where: str = ""
    count: int | None = None
    active: int | None = None
    size: int | None = None
    layers: frozenset[int] | None = None


def read_said(llm: Section) -> Said:
    """What a decoder's description says.

    Raises:
        ConfigError: experts of a kind that is not run, or a value that cannot be.
    """
    llm.only("transformed_und", (False, []), "BAGEL-MoE's experts are routed for pictures alone")
    layers = llm.values.get("transformed_gen")
    listed = isinstance(layers, list) and all(type(layer) is int and layer >= 0 for layer in layers)
    if layers is not None and not isinstance(layers, bool) and not listed:
        raise ConfigError(f"{llm.where}transformed_gen must be true, false or a list of layers")
    count, active = _number(llm, COUNT), _number(llm, ACTIVE)
    if active is None and llm.values.get(TOP_K) != SAMPLED_TOP_K:
        active = _number(llm, (TOP_K,))
    size = _number(llm, ("moe_intermediate_size",))
    return Said(llm.where, count, active, size, frozenset(layers) if isinstance(layers, list) else None)


def _number(llm: Section, names: tuple[str, ...]) -> int | None:
    """The value of whichever spelling is there; null and 0 are as good as absent."""
    present = tuple(name for name in names if llm.values.get(name) not in (None, 0))
    return llm.spelled(present, llm.integer) if present else None


def held(names: Iterable[str]) -> tuple[dict[int, int], set[int]]:
    """Layers of gen with experts and how many each has, and layers with any gen MLP, by the names of tensors.

    Raises:
        CheckpointError: more experts than any model has.
    """
    counts: dict[int, int] = {}
    layers: set[int] = set()
    for name in names:
        if mlp := _MLP.match(name):
            layers.add(int(mlp[1]))
        if found := _EXPERT.match(name):
            layer, number = int(found[1]), int(found[2])
            if number >= MAX_COUNT:
                raise CheckpointError(f"tensor {name}: a layer has at most {MAX_COUNT} routed experts")
            counts[layer] = max(counts.get(layer, 0), number + 1)
    return counts, layers


def with_routed(decoder: DecoderConfig, said: Said, own: Iterable[str], lent: Iterable[str] = ()) -> DecoderConfig:
    """The decoder with the experts that its weights have: `own` names of tensors, and those that a base has, which
    lends the MLPs that are not there.

    Raises:
        CheckpointError, ConfigError: weights and configuration contradict each other.
    """
    counts, layers = held(own)
    if not counts and not layers:  # of pictures it has nothing, or will borrow it
        counts, layers = held(lent)
    elif lent_counts := held(lent)[0]:
        counts |= {layer: count for layer, count in lent_counts.items() if layer not in layers}
    counts = {layer: count for layer, count in counts.items() if layer < decoder.num_layers}
    if not counts:
        if said.count not in (None, 1) and layers:
            raise ConfigError(
                f"{said.where}num_experts is {said.count}, and the weights hold whole MLPs; take the configuration "
                "that belongs to them"
            )
        return decoder
    return _routed(decoder, said, max(counts.values()), frozenset(counts))


def _routed(decoder: DecoderConfig, said: Said, count: int, layers: frozenset[int]) -> DecoderConfig:
    active = said.active or half_of(count)
    if said.count not in (None, count):
        raise ConfigError(f"{said.where}num_experts is {said.count}, and the weights hold {count} a layer; {REMEDY}")
    if active > count:
        raise ConfigError(f"{said.where}{active} experts are to be active, and a layer has {count}; {REMEDY}")
    if said.layers not in (None, layers):
        raise ConfigError(
            f"{said.where}transformed_gen names {len(said.layers or ())} layers, and the weights hold experts in "
            f"{len(layers)}; {REMEDY}"
        )
    # The published code gives its configuration a size even where it says no number of experts, of one that it assumes.
    size = (said.size if said.count else None) or decoder.intermediate_size // count
    return replace(decoder, routed=Routed(count, active, size, layers))


def half_of(count: int) -> int:
    """How many are active where nothing says it: as in the published models (8 of 16, 16 of 32)."""
    return max(1, count // 2)


def line(decoder: DecoderConfig, said: Said) -> str:
    """How the experts were read, in a line."""
    routed = decoder.routed
    if routed is None:
        return ""
    why = "" if said.active else ", half of them, as no num_experts_per_tok says otherwise"
    return (
        f"{routed.count} of intermediate size {routed.size} in {len(routed.layers)} layers of gen, {routed.active} "
        f"active for each token{why}"
    )

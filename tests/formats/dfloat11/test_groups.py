"""Which weights a DFloat11 file's groups hold: this project's grouping, and the published whole-layer one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.dfloat11_groups import GEN, LINEARS, PUBLISHED, own_groups
from support.paths import DATA

from lowmem_bagel.checkpoint.config import BagelConfig, DecoderConfig, VaeConfig, VitConfig
from lowmem_bagel.checkpoint.tensors import EMBEDDING, LM_HEAD, tensor_table
from lowmem_bagel.errors import CheckpointError, ConfigError
from lowmem_bagel.formats.dfloat11 import codec as dfloat11
from lowmem_bagel.formats.dfloat11.groups import (
    COMPONENTS,
    Group,
    own_config,
    read_config,
    resolve_groups,
    stored_name,
)

LAYER = "language_model.model.layers.0"
CONFIG = BagelConfig(DecoderConfig(32, 2, 4, 2, 96, 100, 1e6, 1e-6), VitConfig(32, 1, 2, 64, 14, 56, 1e-6), VaeConfig())
TABLE = tensor_table(CONFIG)


def stored_of(modules: list[str]) -> list[str]:
    return [stored_name(module, component) for module in modules for component in COMPONENTS]


def test_own_grouping_covers_every_linear_once() -> None:
    groups = own_groups(TABLE.values())
    assert [group.weights for group in groups] == [
        (name,) for name, spec in TABLE.items() if spec.linear or name in (EMBEDDING, LM_HEAD)
    ]
    assert len(groups) == 2 * 2 * 7 + 2
    assert groups[0] == Group("language_model.model.embed_tokens", (EMBEDDING,))


def test_own_config_leads_back_to_the_own_grouping() -> None:
    groups = own_groups(TABLE.values())
    patterns = read_config({"dfloat11_config": own_config()})
    resolved = resolve_groups(patterns, stored_of([group.module for group in groups]), TABLE)
    assert sorted(resolved, key=lambda g: g.module) == sorted(groups, key=lambda g: g.module)
    for pattern in patterns:
        matching = [group.module for group in groups if re.fullmatch(pattern, group.module)]
        assert matching, pattern
    assert not any(re.fullmatch(p, name.removesuffix(".weight")) for p in patterns for name, spec in TABLE.items()
                   if not spec.linear and name not in (EMBEDDING, LM_HEAD))  # fmt: skip


def test_published_whole_layer_file() -> None:
    """A layer as DFloat11/BAGEL-7B-MoT-DF11 stores it, made by the package's encoder."""
    stored = load_file(DATA / "dfloat11" / "layer.safetensors")
    source = {name.removeprefix("source."): stored.pop(name) for name in list(stored) if name.startswith("source.")}
    [group] = resolve_groups(PUBLISHED, stored, TABLE)
    assert group == Group(LAYER, tuple(f"{LAYER}.{name}.weight" for name in LINEARS + GEN))
    parts = {component: stored[stored_name(group.module, component)] for component in COMPONENTS}
    shapes = [[int(size) for size in TABLE[weight].shape if size is not None] for weight in group.weights]
    decoded = dfloat11.decode_weights(dfloat11.from_tensors(parts, group.module), shapes, name=group.module)
    assert len(decoded) == 14
    for name, weight in zip(group.weights, decoded, strict=True):
        assert weight.shape == source[name].shape
        assert torch.equal(weight.view(torch.int16), source[name].view(torch.int16)), name


def test_plain_tensors_are_in_no_group() -> None:
    assert resolve_groups(PUBLISHED, [*TABLE], TABLE) == []


def test_one_weight_under_a_pattern_with_names_is_itself() -> None:
    """The package ignores the names where the module is a Linear."""
    module = f"{LAYER}.self_attn.q_proj"
    assert resolve_groups({r".*_proj": ["weight"]}, stored_of([module]), TABLE) == [
        Group(module, (f"{module}.weight",))
    ]


@pytest.mark.parametrize(
    ("patterns", "stored", "message"),
    [
        (PUBLISHED, stored_of([LAYER])[1:], "luts is missing"),
        (PUBLISHED, [stored_name(LAYER, "gaps")], "is missing"),
        ({}, stored_of([LAYER]), "no pattern"),
        ({r"language_model\.model\.layers": []}, stored_of([LAYER]), "no pattern"),
        ({r".*layers\.\d+": []}, stored_of([LAYER]), "names no linears"),
        (PUBLISHED, stored_of(["language_model.model.layers.7"]), "does not have"),
        ({r".*": ["mlp.middle_proj"]}, stored_of([LAYER]), "does not have"),
        (PUBLISHED, [*stored_of([LAYER]), f"{LAYER}.mlp.up_proj.weight"], "plainly"),
        (PUBLISHED | {r".*up_proj": []}, stored_of([LAYER, f"{LAYER}.mlp.up_proj"]), "stored twice"),
        ({r".*": ["mlp.up_proj", "mlp.up_proj"]}, stored_of([LAYER]), "stored twice"),
    ],
)
def test_groups_that_cannot_be_right(patterns: dict[str, list[str]], stored: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve_groups(patterns, stored, TABLE)


@pytest.mark.parametrize(
    "section",
    [
        None,
        [],
        {},
        own_config() | {"threads_per_block": [256]},
        own_config() | {"threads_per_block": {}},
        own_config() | {"bytes_per_thread": 4},
        own_config() | {"pattern_dict": []},
        own_config() | {"pattern_dict": {"a": "b"}},
        own_config() | {"pattern_dict": {"a": [1]}},
        own_config() | {"pattern_dict": {"(": []}},
        own_config() | {"pattern_dict": {"(" * 5000: []}},
    ],
)
def test_configs_that_cannot_be_read(section: Any) -> None:
    with pytest.raises(ConfigError, match="dfloat11_config"):
        read_config({"dfloat11_config": section})

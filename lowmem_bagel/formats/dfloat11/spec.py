"""DFloat11: bf16 without loss, exponents coded by Huffman's method in groups of weights (see `groups`). No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...checkpoint.config import read_json
from ...checkpoint.tensors import tensor_table
from ..spec import FormatSpec, Layout, Requires, Way, linears_and_embeddings
from .groups import COMPONENTS, read_config, resolve_groups, stored_name

if TYPE_CHECKING:
    from ...checkpoint.folder import ModelFolder

MAKE = "lowmem_bagel.formats.dfloat11.ways"
BITS = 10.87
"""Bits a weight that real weights take, positions and gaps included."""
SINGLE = "groups of one weight"
AT_USE = Requires("cuda", ("bfloat16", "float16"), features=(SINGLE, "nvrtc"))
AT_LOAD = "decoded while loading: {why}"


def layout(folder: ModelFolder) -> Layout:
    """The tensors of every weight's group, and whether groups can stay compressed.

    Raises:
        CheckpointError, ConfigError: the folder's groups contradict its configuration.
    """
    table = tensor_table(folder.config)
    groups = resolve_groups(read_config(read_json(folder.path / "config.json")), folder.stored, table)
    joint = next((group.module for group in groups if len(group.weights) > 1), None)
    why = f"{joint} groups several linears; convert the source to group each by itself"
    stored = {
        weight: tuple(stored_name(group.module, component) for component in COMPONENTS)
        for group in groups
        for weight in group.weights
    }
    return Layout(stored, {} if joint is None else {SINGLE: why})


SPEC = FormatSpec(
    "dfloat11",
    "DFloat11",
    lossless=True,
    bits=BITS,
    encodes=linears_and_embeddings,
    layout=layout,
    not_on_device=("luts", "split_positions"),
    ways=(
        Way(
            "decoded at use", f"{MAKE}:at_use", requires=AT_USE, weights="decoded at use",
            says="compressed in memory, decoded at every use",
        ),
        Way(
            "at load, processor", f"{MAKE}:at_load", requires=Requires("cpu"), says=AT_LOAD, weights="decoded at load",
            adds=True,
        ),
        Way(
            "at load, float32", f"{MAKE}:at_load", requires=Requires(dtypes=("float32",)), says=AT_LOAD,
            weights="decoded at load", adds=True,
        ),
        Way("at load", f"{MAKE}:at_load", "cpu", says=AT_LOAD, weights="decoded at load", adds=True),
    ),
)  # fmt: skip

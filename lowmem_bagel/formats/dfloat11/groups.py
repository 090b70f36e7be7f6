"""DFloat11 on disk, as data: the stored components, their names, and which weights belong to which group. No torch.

A *group* is one or more bf16 weights that share a code book. Its tensors are stored under the name of a module: a
Linear or Embedding whose own weight it is, or a larger module (published files use whole layers) that its weights lie
in. `config.json` says which, in `dfloat11_config.pattern_dict`: regex of module name -> names of the linears in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...checkpoint.tensors import TensorSpec
from ...errors import CheckpointError, ConfigError
from .patterns import MAX_PATTERNS, matcher

FORMAT_VERSION = "0.5.0"
THREADS_PER_BLOCK = 512
BYTES_PER_THREAD = 8
BLOCK_BYTES = THREADS_PER_BLOCK * BYTES_PER_THREAD

COMPONENTS: dict[str, str] = {
    "luts": "U8",
    "encoded_exponent": "U8",
    "sign_mantissa": "U8",
    "output_positions": "U8",
    "gaps": "U8",
    "split_positions": "I64",
}
"""Component -> dtype in safetensors' terms. Shapes, for n weights whose codes take b bytes, blocks = ceil(b / 4096):
luts [tables + 1, 256], encoded_exponent [b], sign_mantissa [n], output_positions [4 * (blocks + 1)] (uint32, little
endian), gaps [320 * blocks] (5 bits a thread, highest first), split_positions [weights in the group - 1]."""

OWN_PATTERNS: dict[str, list[str]] = {
    r"language_model\.model\.embed_tokens": [],
    r"language_model\.lm_head": [],
    r"language_model\.model\.layers\.\d+\.self_attn\.[qkvo]_proj(_moe_gen)?": [],
    r"language_model\.model\.layers\.\d+\.mlp(_moe_gen)?\.(gate|up|down)_proj": [],
}
"""The grouping of this project's converter: every Linear and Embedding of the decoder by itself."""
ROUTED_PATTERNS: dict[str, list[str]] = {
    r"language_model\.model\.layers\.\d+\.mlp_moe_gen\.experts\.\d+\.(gate|up|down)_proj": []
}
"""The same of routed experts, in folders of models that have them."""


Pattern = tuple[str, Callable[[str], bool], list[str]]
"""A pattern as it is written and as it is matched, and the names of the linears in a module that it matches."""


@dataclass(frozen=True)
class Group:
    """`module` names the stored components; `weights` are the tensors they decode to, in order."""

    module: str
    weights: tuple[str, ...]


def stored_name(module: str, component: str) -> str:
    """The name in the file of a module's component."""
    assert component in COMPONENTS, component
    return f"{module}.{component}"


def own_config(routed: bool = False) -> dict[str, Any]:
    """`dfloat11_config` for files of this project's converter; `routed`: of a model with routed experts."""
    return {
        "version": FORMAT_VERSION,
        "threads_per_block": [THREADS_PER_BLOCK],
        "bytes_per_thread": BYTES_PER_THREAD,
        "pattern_dict": OWN_PATTERNS | (ROUTED_PATTERNS if routed else {}),
    }


def read_config(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The pattern_dict of a `config.json` that holds a `dfloat11_config`.

    Raises:
        ConfigError: it is missing or malformed, or the file was made for another size of block.
    """
    section = config.get("dfloat11_config")
    if not isinstance(section, Mapping):
        raise ConfigError("config.json has no dfloat11_config; is this a DFloat11 folder?")
    threads, nbytes = section.get("threads_per_block"), section.get("bytes_per_thread")
    if threads not in ([THREADS_PER_BLOCK], THREADS_PER_BLOCK) or nbytes != BYTES_PER_THREAD:
        raise ConfigError(
            f"dfloat11_config: blocks of {threads!r} threads of {nbytes!r} bytes are not supported, only [512] of 8"
        )
    patterns = section.get("pattern_dict")
    if not isinstance(patterns, Mapping):
        raise ConfigError("dfloat11_config.pattern_dict must be an object of pattern -> list of names")
    if len(patterns) > MAX_PATTERNS:
        raise ConfigError(f"dfloat11_config.pattern_dict has {len(patterns)} patterns, more than {MAX_PATTERNS}")
    for pattern, names in patterns.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"dfloat11_config.pattern_dict: {pattern!r} must have a list of names")
        try:
            matcher(pattern)
        except ValueError as error:
            raise ConfigError(
                f"dfloat11_config.pattern_dict: {pattern[:200]!r} is no pattern of module names ({error}); "
                "convert the checkpoint yourself, with --to dfloat11"
            ) from error
    return {pattern: list(names) for pattern, names in patterns.items()}


def resolve_groups(
    patterns: Mapping[str, list[str]], stored: Iterable[str], table: Mapping[str, TensorSpec]
) -> list[Group]:
    """The groups of a file with the tensors `stored`, under a pattern_dict of `read_config`.

    Every module with stored components is one group; the first pattern that matches its whole name says what it
    holds. Tensors of the table that are stored plainly are not part of any group.

    Raises:
        CheckpointError: a component is missing; a module matches no pattern; or a weight is unknown, in two groups, or
            stored both plainly and compressed.
    """
    present = set(stored)
    known = [(pattern, matcher(pattern), names) for pattern, names in patterns.items()]
    groups: list[Group] = []
    owner: dict[str, str] = {}
    for module in _modules(present):
        for component in COMPONENTS:
            if stored_name(module, component) not in present:
                raise CheckpointError(
                    f"{stored_name(module, component)} is missing; convert the checkpoint with --to dfloat11"
                )
        group = Group(module, _weights(module, known, table))
        for weight in group.weights:
            if weight not in table:
                raise CheckpointError(f"{module}: its pattern leads to {weight}, which BAGEL does not have")
            if weight in present:
                raise CheckpointError(f"{weight} is stored twice: plainly, and compressed under {module}")
            if weight in owner:
                raise CheckpointError(f"{weight} is stored twice: under {owner[weight]} and under {module}")
            owner[weight] = module
        groups.append(group)
    return groups


def _modules(stored: set[str]) -> list[str]:
    """Modules that any component is stored for, sorted."""
    parts = (name.rpartition(".") for name in stored)
    return sorted({module for module, _, last in parts if module and last in COMPONENTS})


def _weights(module: str, patterns: Iterable[Pattern], table: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    own = f"{module}.weight"
    for pattern, matches, names in patterns:
        if matches(module):
            if own in table:
                return (own,)
            if names:
                return tuple(f"{module}.{name}.weight" for name in names)
            raise CheckpointError(f"{module}: its pattern {pattern!r} names no linears and it is none itself")
    raise CheckpointError(f"{module} is compressed and no pattern of dfloat11_config.pattern_dict matches it")

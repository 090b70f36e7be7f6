"""From the names in files of weights to the model's own: wrappers taken off, buffers and a whole SigLIP's rest left,
FP8 weights with their scales, and whatever is not BAGEL refused in a line that says what it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import CheckpointError
from ..files import parse_json
from .config import BagelConfig
from .gguf_blocks import BLOCK_TYPES
from .safetensors_file import TensorFile
from .stored import FP8, Decoded, Dequantized, PatchConvolution, Piece, StoredTensor, check_scale
from .tensors import TensorSpec
from .vae_names import published_name

WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module")
)
"""Segments that data parallelism, compilation and checkpointing put into names, anywhere."""
ROOTS = frozenset(
    (
        "language_model", "vit_model", "connector", "vae2llm", "llm2vae", "time_embedder", "latent_pos_embed",
        "vit_pos_embed",
    )
)  # fmt: skip
VAE_PREFIXES = ("vae", "vae_model", "ae", "autoencoder", "first_stage_model")
BUFFERS = frozenset(("position_ids", "inv_freq", "original_inv_freq", "cos_cached", "sin_cached"))
"""Last segments of what modules compute for themselves and some programs save."""
SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
ACTIVATION_SCALES = frozenset(("scale_input", "input_scale", "activation_scale", "act_scale"))
FP8_MARKS = frozenset(("scaled_fp8", "comfy_quant"))
PATCHES = "vit_model.vision_model.embeddings.patch_embedding.weight"
FLOATS = ("BF16", "F16", "F32")
FLOAT_NAMES = f"{', '.join(FLOATS)} and FP8"

OURS = "make a smaller one of the bf16 checkpoint: lowmem-bagel convert FOLDER OUT --to int8 (or nf4, dfloat11)"
QUANTIZED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$|\.(nested_)?(absmax|quant_map)$"), "4 bits by bitsandbytes"),
    (re.compile(r"\.SCB$|\.weight_format$"), "INT8 by bitsandbytes (LLM.int8())"),
    (re.compile(r"\.weight\._(data|scale|shift)$|\._qtype$|\.(input|output)_scale$"), "by optimum-quanto"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "by GPTQ, AutoRound or AWQ"),
    (re.compile(r"\.weight_(packed|shape|zero_point)$"), "by compressed-tensors"),
    (re.compile(r"\.(W_q|wscales|smooth_factor|wtscale)$"), "by HQQ or nunchaku"),
    (re.compile(r"\.(weight_scale|scale_weight|scales|scale)$"), "by another program"),
)
OTHERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"\.mlp(_moe_gen)?\.(experts|shared_expert)\."),
        "routed experts of another kind than BAGEL-MoE's, which are gen's alone, and all of them routed",
    ),
    (
        re.compile(r"\.lora_|\.base_layer\.|\.modules_to_save\."),
        "an adapter that is not merged (PEFT); merge it into its model first",
    ),
    (re.compile(r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer)(\.|$)"), "the state of an optimizer, not a model"),
    (
        re.compile(r"(^|\.)_?flat_param(_\d+)?$"),
        "FSDP's flattened parameters; save the model with full_state_dict, where each has its name",
    ),
)
_VIT_LAYER = re.compile(r"vit_model\.vision_model\.encoder\.layers\.(\d{1,6})\.")
_VIT_HEAD = "vit_model.vision_model.head."
_SHARED_GATE = ".mlp_moe_gen.gate_shared.weight"


@dataclass
class Names:
    """Tensors in files by the model's own names, as far as wrappers can be told from names alone.

    `prefix` is what all names began with, `wrapped` how many held a wrapper.
    """

    pieces: dict[str, Piece]
    prefix: str = ""
    wrapped: int = 0

    @classmethod
    def of(cls, files: Iterable[TensorFile]) -> Names:
        """Raises CheckpointError where two tensors have one name."""
        raw: dict[str, Piece] = {}
        for file in files:
            for name, entry in file.entries.items():
                _add(raw, name, Piece(file, entry))
        bare = {name: unwrapped(name) for name in raw}
        prefixes = {own: _prefix(own) for own in bare.values()}
        counted = Counter(prefix for own in bare.values() if (prefix := prefixes[own]) is not None)
        common = counted.most_common(1)[0][0] if counted else ""
        found = cls({}, common, sum(name != own for name, own in bare.items()))
        for name, own in bare.items():
            _add(found.pieces, own.removeprefix(common) if prefixes[own] in (common, None) else own, raw[name])
        return found

    @property
    def vit_layers(self) -> int:
        """Layers of a vision tower that are there; 0 where there is none."""
        numbers = [int(match[1]) for name in self.pieces if (match := _VIT_LAYER.match(name))]
        return max(numbers, default=-1) + 1

    @property
    def whole_siglip(self) -> bool:
        """Whether the tower's head is there, which BAGEL has not."""
        return any(name.startswith(_VIT_HEAD) for name in self.pieces)

    @property
    def strange(self) -> bool:
        """Whether none of the names can be BAGEL's."""
        return all(_prefix(name) is None for name in self.pieces)

    def note(self) -> str:
        said = [f"all names began with {self.prefix}"] if self.prefix else []
        said += [f"{self.wrapped} names held a wrapper of training"] if self.wrapped else []
        return "; ".join(said)


@dataclass
class Resolved:
    """The model's tensors, and what was left: a kind -> how many."""

    stored: dict[str, StoredTensor] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)


def unwrapped(name: str) -> str:
    """A name without the segments that wrappers put into it."""
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def vit_layers_run(names: Names, said: int) -> int | None:
    """How many layers of a vision tower the model runs, None where none is there.

    The published configuration counts the layers of SigLIP, the last of which BAGEL leaves out, and its files lack;
    a folder saved as built counts those that it holds; a whole SigLIP has its head too. Where the files hold another
    number, the published rule holds, and what is missing or too many shows.
    """
    held = names.vit_layers
    if not held:
        return None
    if names.whole_siglip and held in (said, said + 1):
        return held - 1
    return held if held in (said - 1, said) else said - 1


def resolve(
    names: Names, config: BagelConfig, table: Mapping[str, TensorSpec], folder: str, says: str = ""
) -> Resolved:
    """Every tensor under the model's own name.

    Args:
        says: what the folder's configuration calls another model, or its quantization.

    Raises:
        CheckpointError: a tensor is none of the model's; the message says what the files are instead.
    """
    found, unknown = Resolved(), []
    scales = _scales(names, table)
    for name, piece in names.pieces.items():
        spec = table.get(name)
        if spec is not None:
            found.stored[name] = _seen(spec, piece, scales.get(name), folder)
            continue
        kind = _left(name, piece, scales, config)
        if kind is not None:
            found.ignored[kind] += 1
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{folder}: {_what(unknown, names, table, says)}")
    for stored in found.stored.values():
        dtype = stored.entry.dtype
        if dtype not in FLOATS and not stored.encoded:
            what = "save it in one of them" if dtype == "F64" else f"quantised by another program; {OURS}"
            raise CheckpointError(f"{folder}: tensor {stored.entry.name} is {dtype}, not one of {FLOAT_NAMES}: {what}")
    return found


def resolve_vae(names: Names, table: Mapping[str, TensorSpec], folder: str) -> dict[str, StoredTensor]:
    """The autoencoder's tensors in a file of its own, under FLUX's names or diffusers'.

    Raises:
        CheckpointError: a tensor is none of FLUX's autoencoder's.
    """
    found: dict[str, StoredTensor] = {}
    levels = sum(name.endswith(".downsample.conv.weight") for name in table) + 1
    for name, piece in names.pieces.items():
        own = _vae_name(name, levels, table)
        if own is None:
            raise CheckpointError(
                f"{folder}: unexpected tensor {name} in {piece.file.path.name}; BAGEL's autoencoder is FLUX's"
            )
        found[own] = _seen(table[own], piece, None, folder)
    return found


def _add(pieces: dict[str, Piece], name: str, piece: Piece) -> None:
    if name in pieces:
        first, second = (one.file.path for one in (pieces[name], piece))
        places = f"in {first.name} and in {second.name}" if first != second else f"twice in {first.name}"
        raise CheckpointError(f"{second.parent}: tensor {name} is {places}; remove what does not belong")
    pieces[name] = piece


def _prefix(name: str) -> str | None:
    """What stands before BAGEL's own name; None where no part of the name is one of BAGEL's."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part in ROOTS), None)
    return None if at is None else "".join(f"{part}." for part in parts[:at])


def _scales(names: Names, table: Mapping[str, TensorSpec]) -> dict[str, Piece]:
    """The scale of every FP8 weight that has one, by the weight's name and by the scale's own."""
    found: dict[str, Piece] = {}
    for name, piece in names.pieces.items():
        if piece.entry.dtype not in FP8 or name not in table:
            continue
        module = name.rpartition(".")[0]
        held = [f"{module}.{scale}" for scale in SCALES if f"{module}.{scale}" in names.pieces]
        if len(held) > 1:
            raise CheckpointError(f"{piece.file.path}: {name} has two scales, {held[0]} and {held[1]}")
        for scale in held:
            found[name] = found[scale] = names.pieces[scale]
    return found


def _seen(spec: TensorSpec, piece: Piece, scale: Piece | None, folder: str) -> StoredTensor:
    """A tensor as the model has it."""
    entry = piece.entry
    if entry.dtype in BLOCK_TYPES:
        return _of_blocks(spec, piece, folder)
    dtype = "BF16" if entry.dtype in FP8 else entry.dtype
    if scale is not None:
        check_scale(folder, entry, scale.entry)
    pieces = (piece, scale) if scale is not None else (piece,)
    if spec.name == PATCHES and len(entry.shape) == 4 and _patch_shape(entry.shape) == spec.shape:
        return StoredTensor.viewed(PatchConvolution(), spec.name, dtype, _patch_shape(entry.shape), *pieces)
    if entry.dtype in FP8:
        return StoredTensor.viewed(Dequantized(), spec.name, dtype, entry.shape, *pieces)
    if spec.part == "vae" and (*entry.shape, 1, 1) == spec.shape:  # a projection as diffusers keeps it
        return StoredTensor.plain(piece.file, entry, spec.name, (*entry.shape, 1, 1))
    return StoredTensor.plain(piece.file, entry, spec.name)


def _of_blocks(spec: TensorSpec, piece: Piece, folder: str) -> StoredTensor:
    """A decoder linear stays in its blocks; whatever else is in some is made bf16."""
    entry = piece.entry
    if spec.linear is None:
        return StoredTensor.viewed(Decoded(entry.dtype), spec.name, "BF16", entry.shape, piece)
    if entry.shape != spec.shape:
        raise CheckpointError(
            f"{folder}: tensor {spec.name} is {list(entry.shape)}, and the configuration demands {list(spec.shape)}; "
            "the checkpoint does not belong to its configuration"
        )
    return StoredTensor.blocks(piece.file, entry, spec.name)


def _patch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], shape[1] * shape[2] * shape[3]


def _left(name: str, piece: Piece, scales: Mapping[str, Piece], config: BagelConfig) -> str | None:
    """What a tensor is that the model does without; None where it is not known."""
    last = name.rpartition(".")[2]
    if last in BUFFERS:
        return "buffers that are computed anew"
    if name in scales:
        return "scales of FP8 weights (applied)"
    if last in FP8_MARKS and _is_fp8_mark(last, piece):
        return "marks of FP8 weights"
    if last in ACTIVATION_SCALES and f"{name.removesuffix(last)}weight" in scales:
        return "scales of FP8 activations"
    if name.endswith(_SHARED_GATE):
        return "gates of a shared expert, which is not there"
    layer = _VIT_LAYER.match(name)
    if name.startswith(_VIT_HEAD) or (layer is not None and int(layer[1]) == config.vit.num_layers):
        return "SigLIP's last layer and head, which BAGEL leaves out"
    return None


def _is_fp8_mark(last: str, piece: Piece) -> bool:
    """ComfyUI's marks: an empty FP8 tensor, or a text that names the format."""
    if last == "scaled_fp8":
        return piece.entry.nbytes <= 16
    if piece.entry.nbytes > 1 << 10:
        return False
    try:
        said = parse_json(bytes(piece.file.raw(piece.entry.name)))
    except ValueError:
        return False
    return isinstance(said, dict) and str(said.get("format", "")).startswith("float8_e")


def _vae_name(name: str, levels: int, table: Mapping[str, TensorSpec]) -> str | None:
    """The autoencoder's own name of a tensor."""
    first, _, rest = name.partition(".")
    for bare in (name, rest if first in VAE_PREFIXES else name):
        for own in (bare, published_name(bare, levels)):
            if own in table and table[own].part == "vae":
                return own
    return None


def split_vae(names: Names, table: Mapping[str, TensorSpec]) -> Names:
    """Takes the autoencoder's tensors out of names that hold the whole model, and returns them."""
    levels = sum(name.endswith(".downsample.conv.weight") for name in table) + 1
    own = {name: vae for name in names.pieces if name not in table and (vae := _vae_name(name, levels, table))}
    own |= {name: name for name in names.pieces if name in table and table[name].part == "vae"}
    taken = Names({})
    for name, vae in own.items():
        _add(taken.pieces, vae, names.pieces.pop(name))
    return taken


def _what(unknown: list[str], names: Names, table: Mapping[str, TensorSpec], says: str) -> str:
    """What files with these tensors are, in words with the remedy."""
    for pattern, what in QUANTIZED:
        marked = next((name for name in unknown if pattern.search(name)), None)
        if marked is not None:
            by = f"; its configuration says {says}" if says else ""
            return f"its weights were quantised: {what} (tensor {marked}{by}); {OURS}"
    for pattern, what in OTHERS:
        marked = next((name for name in unknown if pattern.search(name)), None)
        if marked is not None:
            return f"holds {what} (tensor {marked})"
    if not any(name in table for name in names.pieces):
        return not_bagel(unknown, says)
    modules = Counter(_module(name) for name in unknown)
    first = f"unexpected tensor {unknown[0]}{_and_more(len(unknown) - 1)}"
    if all(module in ROOTS for module in modules):
        return f"{first}; the files do not belong to this configuration"
    listed = ", ".join(f"{module} ({count})" for module, count in modules.most_common(4))
    return f"{first}: it has modules that BAGEL has not ({listed}), and what they compute would be missing"


def not_bagel(names: Iterable[str], says: str) -> str:
    """What files are called whose tensors have none of BAGEL's names."""
    more = f"; its configuration says {says}" if says else ""
    return f"is not BAGEL: its tensors are called {', '.join(sorted(names)[:3])}{more}"


def _module(name: str) -> str:
    return name.split(".")[0]


def _and_more(count: int) -> str:
    return f" and {count} more" if count else ""

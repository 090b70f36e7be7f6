"""LoRA adapters as PEFT saves them: which weights of the model they change, and by what. No torch here.

An adapter folder has `adapter_config.json` and `adapter_model.safetensors` with tensors lora_A [rank, in] and lora_B
[out, rank] for each weight W [out, in] that it changes. What the adapted model multiplies by is (Hu et al.,
arXiv:2106.09685, and for rank-stabilised scales Kalajdzievski, arXiv:2312.03732)

    W + scale * B A,   scale = alpha / rank, or alpha / sqrt(rank) where `use_rslora`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import CheckpointError
from ..files import expanded
from .config import read_json
from .safetensors_file import SafetensorsFile, TensorEntry
from .stored import Piece, StoredTensor
from .tensors import FUSED, Expert, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
FLOATS = ("F32", "F16", "BF16")
MAX_RANK = 4096
UNUSABLE = {"use_dora": "DoRA", "use_qalora": "QALoRA", "fan_in_fan_out": "transposed weights", "lora_bias": "a bias"}
"""Settings that change the arithmetic into another, where they are on."""
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin training (`init_lora_weights`) that change the base's weights too, which the adapter does not hold."""
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_layer.")
_FACTOR = re.compile(r"(?P<module>[^\s]{1,400})\.lora_(?P<factor>[AB])(\.[A-Za-z0-9_-]{1,64})?\.weight")


@dataclass(frozen=True)
class LowRank:
    """What one adapter adds to one weight [out, in]: scale * B A. a: [rank, in]; b: [out, rank]."""

    a: Piece
    b: Piece
    scale: float

    @property
    def rank(self) -> int:
        return self.a.entry.shape[0]


@dataclass(frozen=True)
class Merged:
    """The view of a weight to which adapters are added, in their order: float32, each product rounded once."""

    base: StoredTensor
    changes: tuple[LowRank, ...]
    encoding: str = "adapted"

    def made(self, pieces: Sequence[Piece], entry: TensorEntry) -> Tensor:
        own = len(self.base.pieces)
        weight = replace(self.base, pieces=tuple(pieces[:own])).tensor().float()
        for change, a, b in zip(self.changes, pieces[own::2], pieces[own + 1 :: 2], strict=True):
            weight = weight + change.scale * (b.tensor().float() @ a.tensor().float())
        return weight


def merged(name: str, base: StoredTensor, changes: tuple[LowRank, ...]) -> StoredTensor:
    """A stored weight with adapters added to it, as the model's own tensor of that name."""
    factors = (piece for change in changes for piece in (change.a, change.b))
    return StoredTensor.viewed(Merged(base, changes), name, "F32", base.entry.shape, *base.pieces, *factors)


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. `changes` has what it adds, by the model's own name of the weight."""

    path: Path
    weight: float
    changes: Mapping[str, LowRank]

    @property
    def said(self) -> str:
        """In a plan and in a picture's record."""
        return self.path.name if self.weight == 1 else f"{self.path.name}:{self.weight:g}"


def read_adapters(given: Iterable[str], table: Mapping[str, TensorSpec]) -> tuple[Adapter, ...]:
    """Adapters in the order in which they are added; each is said as FOLDER or FOLDER:WEIGHT.

    Args:
        table: the model's tensors.

    Raises:
        CheckpointError: a folder is not an adapter, or one that does not fit the model; it names the tensor.
    """
    return tuple(_read(*folder_and_weight(text), table) for text in given)


def folder_and_weight(text: str) -> tuple[Path, float]:
    """The parts of FOLDER:WEIGHT; without a weight, 1. A folder that has such a name is meant itself."""
    folder, colon, end = text.rpartition(":")
    try:
        weight = float(end) if colon and folder else 1.0
    except ValueError:
        return expanded(text), 1.0
    if not colon or not folder or Path(text).exists():
        return expanded(text), 1.0
    if not math.isfinite(weight):
        raise CheckpointError(f"{folder}: the weight of an adapter must be a number, not {end}")
    return expanded(folder), weight


def _read(path: Path, weight: float, table: Mapping[str, TensorSpec]) -> Adapter:
    folder = path.parent if path.is_file() else path
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder}: {CONFIG_FILE} is missing; a LoRA adapter is a folder that PEFT saved")
    settings = _Settings(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE))
    if not (folder / WEIGHTS_FILE).exists() and (folder / PICKLE_FILE).exists():
        raise CheckpointError(
            f"{folder}: holds {PICKLE_FILE}, a pickle, which is never loaded (it can run code); save the adapter again "
            "with save_pretrained(..., safe_serialization=True)"
        )
    file = SafetensorsFile(folder / WEIGHTS_FILE)
    modules = {spec.name.removesuffix(".weight"): spec for spec in table.values() if _can_be_changed(spec)}
    changes = dict(_changes(file, settings, modules, weight))
    if not changes:
        raise CheckpointError(f"{file.path}: holds no lora_A and lora_B")
    return Adapter(folder, weight, changes)


def _can_be_changed(spec: TensorSpec) -> bool:
    return spec.name.endswith(".weight") and len(spec.shape) == 2 and spec.part != "embedding"


class _Settings:
    """`adapter_config.json`, checked."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values
        if values.get("peft_type", "LORA") != "LORA":
            raise CheckpointError(f"{path}: is an adapter of type {_shown(values['peft_type'])}; only LORA can be used")
        for name, what in UNUSABLE.items():
            if values.get(name):
                raise CheckpointError(f"{path}: {name} is on ({what}), which cannot be used; only plain LoRA can")
        begun = values.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(CHANGED_BASE):
            raise CheckpointError(
                f"{path}: trained from {_shown(begun)}, which changes the base's weights as well; convert it to plain "
                "LoRA first (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
            )
        if values.get("bias", "none") != "none":
            raise CheckpointError(f"{path}: trains biases ({_shown(values['bias'])}); only bias 'none' can be used")
        self.rank, self.alpha = self._number("r", 8.0), self._number("lora_alpha", 8.0)
        self.stabilised = bool(values.get("use_rslora"))
        self.ranks, self.alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")

    def scale(self, module: str, rank: int) -> float:
        """Of a module, as it is called in the adapter's file.

        Raises:
            CheckpointError: the file's rank is not the settings'.
        """
        wanted = matching(self.ranks, module, self.rank)
        if rank != wanted:
            raise CheckpointError(f"{self.path}: says rank {wanted:g} for {module}, and its lora_A has {rank} rows")
        return matching(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.stabilised else rank)

    def _number(self, name: str, default: float) -> float:
        return self._checked(name, self.values.get(name, default))

    def _pattern(self, name: str) -> dict[str, float]:
        value = self.values.get(name) or {}
        if not isinstance(value, dict) or len(value) > 10_000:
            raise CheckpointError(f"{self.path}: {name} is not an object of numbers")
        for key in value:
            if not re.fullmatch(r"[A-Za-z0-9_.\\^$-]{1,400}", key):
                raise CheckpointError(
                    f"{self.path}: {name} has the pattern {_shown(key)}; only names of modules can be used"
                )
        return {key.replace("\\.", ".").strip("^$"): self._checked(name, number) for key, number in value.items()}

    def _checked(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise CheckpointError(f"{self.path}: {name} is {_shown(value)}, not a number above 0")
        return float(value)


def matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first key that is the module's name or its end, from a dot on: so PEFT reads names."""
    return next((n for key, n in patterns.items() if module == key or module.endswith(f".{key}")), default)


def _changes(
    file: SafetensorsFile, settings: _Settings, modules: Mapping[str, TensorSpec], weight: float
) -> Iterable[tuple[str, LowRank]]:
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in file.entries.items():
        found = _FACTOR.fullmatch(name)
        if found is None:
            raise CheckpointError(f"{file.path}: tensor {_shown(name)} is no factor of a LoRA; it cannot be used")
        factors = pairs.setdefault(found["module"], {})
        if found["factor"] in factors:
            raise CheckpointError(f"{file.path}: holds two adapters for {_shown(found['module'])}; save one alone")
        factors[found["factor"]] = entry
    taken: dict[str, str] = {}
    for module, factors in pairs.items():
        spec = _weight_of(file, module, modules)
        if spec.name in taken:
            raise CheckpointError(f"{file.path}: {_shown(module)} and {_shown(taken[spec.name])} are one weight")
        taken[spec.name] = module
        if set(factors) != {"A", "B"}:
            missing = {"A", "B"}.difference(factors).pop()
            raise CheckpointError(f"{file.path}: {_shown(module)} has no lora_{missing}")
        _check_shapes(file, spec, factors["A"], factors["B"])
        scale = settings.scale(module, factors["A"].shape[0]) * weight
        yield spec.name, LowRank(Piece(file, factors["A"]), Piece(file, factors["B"]), scale)


def _weight_of(file: SafetensorsFile, module: str, modules: Mapping[str, TensorSpec]) -> TensorSpec:
    """The weight that a module of the adapter's file is called after: PEFT puts `base_model.model.` before the name
    that the module had in what was trained, which may have been the language model alone."""
    name = module
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "") if wrapper != "module." else name.removeprefix(wrapper)
    name = name.removeprefix("base_model.model.")
    for candidate in (name, f"language_model.{name}", name.removeprefix("model."), f"language_model.model.{name}"):
        if candidate in modules:
            return modules[candidate]
    raise CheckpointError(f"{file.path}: changes {_shown(module)}, which this model does not have")


def _check_shapes(file: SafetensorsFile, spec: TensorSpec, a: TensorEntry, b: TensorEntry) -> None:
    out, width = spec.shape
    rank = a.shape[0] if len(a.shape) == 2 else 0
    if not 0 < rank <= MAX_RANK or a.shape != (rank, width) or b.shape != (out, rank):
        shapes = " and ".join("x".join(map(str, entry.shape)) for entry in (a, b))
        raise CheckpointError(
            f"{file.path}: {_shown(a.name)} and its lora_B are {shapes}, and {spec.name} is {out}x{width}; "
            "the adapter belongs to another model"
        )
    for entry in (a, b):
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{file.path}: {_shown(entry.name)} is {entry.dtype}, not one of {', '.join(FLOATS)}")


def _shown(value: object) -> str:
    return repr(value)[:120]


def changes_of(adapters: Sequence[Adapter], name: str) -> tuple[LowRank, ...]:
    """What adapters add to a weight, in their order."""
    return tuple(adapter.changes[name] for adapter in adapters if name in adapter.changes)


class Beside(NamedTuple):
    """Factors kept beside encoded weights: their values, and those that each token brings to them and takes away."""

    values: int = 0
    passed: int = 0


def values_beside(
    beside: Mapping[str, Sequence[LowRank]], table: Mapping[str, TensorSpec]
) -> dict[tuple[int, Expert], Beside]:
    """What factors take in each (layer, expert).

    Where weights are stacked, A is stacked by ranks and B has a row for every output and a column for every rank.
    """
    stacked = {short: name for name, shorts in FUSED.items() for short in shorts}
    ranks: dict[tuple[int, Expert, str], int] = {}
    sizes: dict[tuple[int, Expert, str], int] = {}
    for spec in table.values():
        if spec.layer is None or spec.expert is None or spec.linear is None:
            continue
        place = spec.layer, spec.expert, stacked[spec.linear]
        out, width = spec.shape
        own = sum(change.rank for change in beside.get(spec.name.removesuffix(".weight"), ()))
        ranks[place] = ranks.get(place, 0) + own
        sizes[place] = (sizes.get(place) or width or 0) + (out or 0)
    found: dict[tuple[int, Expert], Beside] = {}
    for (layer, expert, name), rank in ranks.items():
        if rank:
            (values, passed), size = found.get((layer, expert), Beside()), sizes[layer, expert, name]
            found[layer, expert] = Beside(values + rank * size, passed + size)
    return found

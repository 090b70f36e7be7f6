"""Sets of weights by the names of files: one file, or the shards that an index or their own numbering holds together.

A place is a folder, or one of a repository that nothing was fetched of yet: both are read in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import CheckpointError

NAMES = ("ema", "ema_bf16", "model", "model_bf16")
"""In the order in which they are looked for, before shards by an index and one loose set."""
SUFFIX = ".safetensors"
USUAL = tuple(f"{name}{SUFFIX}" for name in NAMES)
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_FILES = ("model.safetensors.index.json", "ema.safetensors.index.json")
VAE_FILE = "ae.safetensors"
VAE_PLACES = (VAE_FILE, "vae.safetensors", f"vae/{VAE_FILE}", "vae/diffusion_pytorch_model.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADAPTERS = re.compile(r"adapter_model|pytorch_lora_weights|optimizer|scheduler", re.IGNORECASE)
"""Names of files that are never the model, whatever is in them."""

_ROOT = re.compile(r"(^|\.)(language_model|vit_model|connector|vae2llm|llm2vae|time_embedder)\.")
_ADAPTED = re.compile(r"\.lora_|lora_(A|B|up|down)\b|\.hada_|\.oft_")
_SHARD = re.compile(r"(.*?)[-_.](\d{1,6})-of-(\d{1,6})")


class Place(Protocol):
    """Where files lie."""

    @property
    def where(self) -> str:
        """What messages call it."""

    def names(self) -> Collection[str]:
        """Of the files in it."""

    def json(self, name: str) -> Mapping[str, Any]:
        """What a file holds.

        Raises:
            CheckpointError: no JSON object.
        """

    def tensors(self, name: str) -> Sequence[str]:
        """The names of a file's tensors.

        Raises:
            CheckpointError: no safetensors file.
        """


@dataclass(frozen=True)
class NamedSet:
    """Files that hold a model together, by name; `index` is the file that says so, if one does."""

    name: str
    files: tuple[str, ...]
    index: str | None = None

    @property
    def numbered(self) -> bool:
        """Whether each of its files is but a part of it."""
        return self.index is not None or "-of-" in self.name

    @property
    def words(self) -> str:
        """What `--weights` would be told, and how many files it is."""
        return self.name if len(self.files) == 1 else f"{self.name} ({len(self.files)} shards)"


def sets_of(place: Place, more: Sequence[NamedSet] = ()) -> tuple[list[NamedSet], list[str]]:
    """All sets, the preferred one first, and what is to be said of indexes that cannot be believed.

    Args:
        more: sets of files of another kind, which come last.

    Raises:
        CheckpointError: nothing has a usual name, and an index is malformed or names shards some of which are missing;
            or the only files that there are cannot be read.
    """
    usual, notes = usual_sets(place)
    taken = {file for one in usual for file in one.files}
    held = Loose.read(place, [name for name in weight_files(place.names()) if name not in taken])
    numbered = _loose_sets(held.model)
    loose = [one for one in numbered if not _gap(one)]
    if not (usual or loose or more):
        gaps = [gap for one in numbered if (gap := _gap(one))]
        if notes or gaps:
            raise CheckpointError(f"{place.where}: {(notes or gaps)[0]}")
        if held.unreadable:
            raise held.unreadable[0]
        loose = _loose_sets(held.others)
    return [*usual, *loose, *more], notes


def usual_sets(place: Place) -> tuple[list[NamedSet], list[str]]:
    """Those of usual names and by an index, which need no look into any weights; otherwise as `sets_of`.

    Raises:
        CheckpointError: nothing has a usual name, and an index is malformed or names shards some of which are missing.
    """
    plain = plain_sets(place.names())
    indexed, notes = _indexed_sets(place, usable=bool(plain))
    return [*plain, *indexed], notes


def plain_sets(names: Collection[str]) -> list[NamedSet]:
    """Those of one file with a usual name, the preferred one first."""
    return [NamedSet(name, (name,)) for name in USUAL if name in names]


def first(place: Place, sets: Sequence[NamedSet]) -> NamedSet:
    """The set that is read where none is named; there is at least one.

    Raises:
        CheckpointError: none of several has a usual name.
    """
    usual = [one for one in sets if one.index is not None or one.name in USUAL]
    if usual or len(sets) == 1:
        return (usual or sets)[0]
    raise CheckpointError(
        f"{place.where}: {_shared(place, sets)}; {listed(sets)}: choose one with --weights FILE, "
        "or remove what does not belong"
    )


def named(weights: str, sets: Iterable[NamedSet]) -> NamedSet | None:
    """The set that is called so, or that has a shard of this name."""
    return next((one for one in sets if weights == one.name or (one.numbered and weights in one.files)), None)


def listed(sets: Sequence[NamedSet], most: int = 6) -> str:
    """The sets in one line; nothing where there are none."""
    names = ", ".join(one.words for one in sets[:most])
    more = f" and {len(sets) - most} more" if len(sets) > most else ""
    return f"it has {names}{more}" if sets else ""


def weight_files(names: Iterable[str]) -> list[str]:
    """Files that may hold the model, in order. A hidden one is another system's note about a file."""
    found = sorted(name for name in names if name.endswith(SUFFIX) and "/" not in name and not name.startswith("."))
    return [name for name in found if name not in VAE_PLACES and not ADAPTERS.search(name)]


@dataclass(frozen=True)
class Loose:
    """Files that no usual name and no index tells of, by what their headers say; a file with its tensors' names.

    `model` have tensors of BAGEL's, `others` are of something else and no adapters.
    """

    model: Mapping[str, Sequence[str]]
    others: Mapping[str, Sequence[str]]
    unreadable: tuple[CheckpointError, ...] = ()

    @classmethod
    def read(cls, place: Place, files: Iterable[str]) -> Loose:
        model: dict[str, Sequence[str]] = {}
        others: dict[str, Sequence[str]] = {}
        unreadable = []
        for file in files:
            try:
                tensors = place.tensors(file)
            except CheckpointError as error:
                unreadable.append(error)
                continue
            if any(map(_ADAPTED.search, tensors)):
                continue
            (model if any(map(_ROOT.search, tensors)) else others)[file] = tensors
        return cls(model, others, tuple(unreadable))


def index_files(place: Place, index: str) -> list[str]:
    """The files that an index names, all beside it.

    Raises:
        CheckpointError: it is no index, or leads elsewhere.
    """
    weight_map = place.json(index).get("weight_map")
    where = f"{place.where}/{index}"
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{where}: has no weight_map; take the model's own file, or remove it")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not name.isprintable() or re.search(r"[/\\:]", name) or not name.endswith(SUFFIX):
            raise CheckpointError(f"{where}: names the file {name!r}, which is not a shard beside it")
    return names


def _indexed_sets(place: Place, usable: bool) -> tuple[list[NamedSet], list[str]]:
    """Sets by an index whose files are there, and what is wrong with the others.

    `usable`: whether there is a set without them, so that an index that was copied along may be wrong.
    """
    found, notes = [], []
    there = place.names()
    others = sorted(name for name in there if name.endswith(INDEX_SUFFIX) and not name.startswith("."))
    for index in [name for name in dict.fromkeys((*INDEX_FILES, *others)) if name in there]:
        if "/" in index or ADAPTERS.search(index) or index.startswith("diffusion_pytorch_model"):
            continue
        try:
            files = [file for file in index_files(place, index) if file != VAE_FILE]
        except CheckpointError:
            if not usable:
                raise
            notes.append(f"{index} cannot be read, and is not used")
            continue
        missing = [file for file in files if file not in there]
        if missing:
            if len(missing) < len(files) and not usable:
                raise CheckpointError(f"{place.where}: {missing[0]} is missing, which {index} names; fetch it too")
            count = f" and {len(missing) - 1} more of {len(files)} files" if len(missing) > 1 else ""
            notes.append(f"{missing[0]} is missing{count}, which {index} names; fetch it, or remove the index")
        elif files:
            found.append(NamedSet(index, tuple(files), index))
    return found, notes


def _loose_sets(files: Mapping[str, Sequence[str]]) -> list[NamedSet]:
    """Loose files as sets: numbered shards of one name together, and files that share no tensor together."""
    numbered: dict[str, list[str]] = {}
    for file in files:
        shard = _SHARD.fullmatch(file.removesuffix(SUFFIX))
        numbered.setdefault(f"{shard[1]}-*-of-{shard[3]}{SUFFIX}" if shard else file, []).append(file)
    sets = [NamedSet(name, tuple(shards)) for name, shards in numbered.items()]
    tensors = [name for of_file in files.values() for name in of_file]
    if len(sets) < 2 or len(tensors) != len(set(tensors)):
        return sets
    return [NamedSet(f"*{SUFFIX}", tuple(files))]


def _gap(one: NamedSet) -> str:
    """Which shard is missing from a set whose files number themselves; empty where none is."""
    shards = [_SHARD.fullmatch(file.removesuffix(SUFFIX)) for file in one.files]
    there = {int(shard[2]) for shard in shards if shard is not None}
    first = shards[0]
    if first is None or not one.numbered:
        return ""
    missing = next((n for n in range(1, min(int(first[3]), 10_000) + 1) if n not in there), None)
    if missing is None or there == set(range(len(there))):  # counted from 0
        return ""
    digits = len(first[2])
    return f"{one.name.replace('*', f'{missing:0{digits}}')} is missing; fetch it, and the index beside it"


def _shared(place: Place, sets: Sequence[NamedSet]) -> str:
    """A tensor that several sets have, which is why they are several."""
    owner: dict[str, str] = {}
    for file, tensors in Loose.read(place, (file for one in sets for file in one.files)).model.items():
        for name in tensors:
            if name in owner:
                return f"tensor {name} is in {owner[name]} and in {file}"
            owner[name] = file
    return "holds several sets of weights"

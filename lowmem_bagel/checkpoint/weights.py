"""Which files of a folder hold the model: one set of weights, chosen by name, and the VAE beside it.

A set is one file, or the shards that an index or their own numbering holds together. A folder may hold several, and
files of other kinds besides: adapters, states of optimizers, other models. None of them is opened but to say so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import expanded
from .config import read_json
from .first_bytes import said_instead
from .gguf_file import SUFFIX as GGUF
from .gguf_file import open_tensors
from .weight_sets import (
    ADAPTERS,
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    SUFFIX,
    USUAL,
    VAE_PLACES,
    Loose,
    NamedSet,
    first,
    index_files,
    listed,
    named,
    sets_of,
    weight_files,
)
from .weight_sets import VAE_FILE as VAE_FILE

MODEL_FILE = USUAL[0]
OTHER_SUFFIXES = (*PICKLE_SUFFIXES, ".distcp", ".npz", ".h5", ".onnx", ".msgpack")
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp", ".download")
PARTS_FOLDER = ".download"
"""Where `hub.download` collects files."""


@dataclass(frozen=True)
class Folder:
    """A folder as a place where weights lie."""

    path: Path

    @property
    def where(self) -> str:
        return str(self.path)

    def names(self) -> Collection[str]:
        """Of its files, and of what has a usual name of weights without being one."""
        return {
            path.name for path in self.path.iterdir() if path.exists() and (path.name in USUAL or not path.is_dir())
        }

    def json(self, name: str) -> Mapping[str, Any]:
        return read_json(self.path / name)

    def tensors(self, name: str) -> Sequence[str]:
        return tuple(open_tensors(self.path / name).entries)


@dataclass(frozen=True)
class WeightSet:
    """Files that hold a model together. `words` are its name and how many files it is."""

    name: str
    files: tuple[Path, ...]
    words: str

    @classmethod
    def of(cls, folder: Path, one: NamedSet) -> WeightSet:
        return cls(one.name, tuple(folder / file for file in one.files), one.words)


@dataclass(frozen=True)
class Chosen:
    """The set that is read, the others that were left, and what else is to be said of the choice."""

    chosen: WeightSet
    others: tuple[WeightSet, ...] = ()
    notes: tuple[str, ...] = ()


def choose(folder: Path, weights: str | None = None) -> Chosen:
    """The set of weights of a folder: the one that is named, or the first by the order of names.

    Raises:
        CheckpointError: there is none; the one that is named is not there; or none of several has a usual name.
    """
    place = Folder(folder)
    sets, notes = _sets(place)
    if weights is not None:
        chosen = _named(folder, weights, sets)
    elif sets:
        usual = [one for one in sets if not one.name.lower().endswith(GGUF)]
        chosen = WeightSet.of(folder, first(place, usual or sets))
    else:
        raise CheckpointError(f"{folder}: {_nothing(folder)}")
    whole = chosen.name.lower().endswith(GGUF)  # complete in itself: what lies beside it is not its folder's
    others = [] if whole else [WeightSet.of(folder, one) for one in sets]
    return Chosen(chosen, tuple(one for one in others if one != chosen), tuple(notes))


def file_set(path: Path) -> WeightSet:
    """The set that a file belongs to: its own, or the shards that it is one of.

    Raises:
        CheckpointError: it is missing, or no file of weights.
    """
    folder, place = path.parent, Folder(path.parent)
    if path.name.endswith(INDEX_SUFFIX):
        files = index_files(place, path.name)
        missing = [file for file in files if not (folder / file).exists()]
        if missing:
            raise CheckpointError(f"{folder}: {missing[0]} is missing, which {path.name} names; fetch it too")
        return WeightSet.of(folder, NamedSet(path.name, tuple(files), path.name))
    if path.name.lower().endswith(GGUF):
        return WeightSet(path.name, (path,), path.name)
    if not path.name.endswith(SUFFIX):
        raise CheckpointError(f"{path}: {_not_weights(path)}")
    for one in sets_of(place)[0]:
        if one.numbered and path.name in one.files:
            return WeightSet.of(folder, one)
    return WeightSet(path.name, (path,), path.name)


def _sets(place: Folder) -> tuple[list[NamedSet], list[str]]:
    """The sets of a folder, its GGUF files last."""
    names = sorted(name for name in place.names() if name.lower().endswith(GGUF) and not name.startswith("."))
    return sets_of(place, [NamedSet(name, (name,)) for name in names])


def is_weights(path: Path) -> bool:
    """Whether a file's name is that of weights, or of another program's."""
    return path.name.lower().endswith((SUFFIX, INDEX_SUFFIX, GGUF, *OTHER_SUFFIXES))


def vae_file(folder: Path) -> Path | None:
    """The file that holds the autoencoder: by its name, else a loose one with its tensors; None where there is none."""
    usual = [folder / place for place in VAE_PLACES]
    found = next((path for path in (*usual, *sorted((folder / "vae").glob(f"*{SUFFIX}"))) if path.exists()), None)
    if found is not None:
        return found
    place = Folder(folder)
    loose = Loose.read(place, weight_files(place.names())).others
    return next((folder / file for file, names in loose.items() if "decoder.conv_in.weight" in names), None)


def _named(folder: Path, weights: str, sets: Sequence[NamedSet]) -> WeightSet:
    one = named(weights, sets)
    if one is not None:
        return WeightSet.of(folder, one)
    given = expanded(weights)
    for path in (folder / given, given):
        if path.is_file():
            return file_set(path.absolute() if path is given else path)
    raise CheckpointError(f"{folder}: there are no weights {weights}; {listed(sets) or 'it has none at all'}")


def _nothing(folder: Path) -> str:
    """What a folder without weights holds instead, with the remedy."""
    held = [path for path in _files(folder) if path.suffix.lower() in OTHER_SUFFIXES]
    parts = next((path for path in held if path.suffix.lower() == ".distcp"), None)
    if parts is not None:
        return _not_weights(parts)
    unfinished = next((path for path in _files(folder) if path.suffix.lower() in UNFINISHED), None)
    if unfinished is not None or (folder / PARTS_FOLDER).is_dir():
        what = PARTS_FOLDER if unfinished is None else unfinished.name
        return f"holds {what}, what a download left that was broken off; run it again to its end"
    dangling = next((path for path in folder.iterdir() if path.is_symlink() and not path.exists()), None)
    if dangling is not None:
        return (
            f"{dangling.name} is a link to a file that is not there; fetch it, or copy the files instead of the links"
        )
    if held:
        return f"holds {held[0].name}, {PICKLE_REMEDY}"
    if folder.is_dir() and any(ADAPTERS.search(path.name) for path in folder.glob(f"*{SUFFIX}")):
        return f"holds an adapter and no weights of its own; {REMEDY_ADAPTER}"
    return f"{MODEL_FILE} is missing, and so is every other set of weights; is this a BAGEL checkpoint folder?"


PICKLE_REMEDY = (
    "a pickle, which is never loaded (it can run code); use the safetensors files of the published checkpoint"
)
REMEDY_ADAPTER = "give the folder of the model that it adapts, and this one by --lora"
DISTCP_REMEDY = (
    "parts of a distributed checkpoint; gather them with torch.distributed.checkpoint.format_utils, and save the "
    "result as model.safetensors"
)


def _not_weights(path: Path) -> str:
    """What a file of another kind is, with the remedy."""
    suffix = path.suffix.lower()
    if suffix == ".distcp":
        return f"holds {path.name} and others: {DISTCP_REMEDY}"
    if suffix in PICKLE_SUFFIXES:
        return f"holds {path.name}, {PICKLE_REMEDY}"
    return said_instead(path) or "is no file of weights; give a .safetensors file or its folder"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


MAX_LOOKED_AT = 400
MAX_DEPTH = 4


def would_do(folder: Path) -> list[Path]:
    """Folders below this one that hold weights, the shallowest first: where people point at a cache or a run."""
    found, waiting, looked = [], [(folder, 0)], 0
    while waiting and looked < MAX_LOOKED_AT:
        here, depth = waiting.pop(0)
        looked += 1
        if here != folder and _may_be_model(here):
            found.append(here)
        elif depth < MAX_DEPTH:
            waiting += [(below, depth + 1) for below in _folders(here)]
    return found


def _may_be_model(folder: Path) -> bool:
    try:
        if (folder / "variant.json").is_file():
            return True
        weights = any(
            not ADAPTERS.search(path.name)
            for path in (*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{GGUF}"))
            if path.name not in VAE_PLACES
        )
        return weights and folder.name != "vae"
    except OSError:
        return False


def _folders(folder: Path) -> Iterable[Path]:
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return ()
    return [path for path in inside if path.name not in ("blobs", "refs", "vae") and not path.is_symlink()]


def cache_snapshot(folder: Path) -> Path | None:
    """The snapshot that a repository's folder in the hub's cache stands for, by its ref, else the newest."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    try:
        named = snapshots / (folder / "refs" / "main").read_text(encoding="ascii").strip()[:80]
        if named.is_dir() and named != snapshots:
            return named
    except (OSError, ValueError):
        pass  # a cache without a ref to main, such as one of a branch
    return max(_folders(snapshots), key=lambda path: path.stat().st_mtime, default=None)


def pointed_at(folder: Path) -> str:
    """Which folder would do in this one's place, in words with a leading "; "; empty where none is seen."""
    cached = cache_snapshot(folder)
    if cached is not None:
        return f"; this is the hub's cache of it: give {cached}"
    found = would_do(folder)
    if not found:
        return f"; give {folder.parent}" if _may_be_model(folder.parent) else _of_other_kinds(folder)
    with_base = f" with --base {folder}" if (folder / "llm_config.json").exists() else ""
    shown = " or ".join(str(path) for path in found[-3:])
    more = f" or one of {len(found) - 3} more" if len(found) > 3 else ""
    return f"; give a folder inside it: {shown}{more}{with_base}"


def _of_other_kinds(folder: Path) -> str:
    """What the folders inside hold, if that is files of weights that are not read."""
    for below in _folders(folder):
        held = [path for path in _files(below) if path.suffix.lower() in OTHER_SUFFIXES]
        if held:
            return f"; {below.name} {_not_weights(held[0])}"
    return ""

"""Which files of a folder hold the model: one set of weights, chosen by name, and the VAE beside it.

A set is one file, or the shards that an index or their own numbering holds together. A folder may hold several, and
files of other kinds besides: adapters, states of optimizers, other models. None of them is opened but to say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .config import read_json
from .first_bytes import said_instead
from .safetensors_file import SafetensorsFile

NAMES = ("ema", "ema_bf16", "model", "model_bf16")
"""In the order in which they are looked for, before shards by an index and one loose set."""
SUFFIX = ".safetensors"
MODEL_FILE = f"{NAMES[0]}{SUFFIX}"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_FILES = ("model.safetensors.index.json", "ema.safetensors.index.json")
VAE_FILE = "ae.safetensors"
VAE_PLACES = (VAE_FILE, "vae.safetensors", f"vae/{VAE_FILE}", "vae/diffusion_pytorch_model.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_SUFFIXES = (*PICKLE_SUFFIXES, ".gguf", ".distcp", ".npz", ".h5", ".onnx", ".msgpack")
ADAPTERS = re.compile(r"adapter_model|pytorch_lora_weights|optimizer|scheduler", re.IGNORECASE)
"""Names of files that are never the model, whatever is in them."""

_ROOT = re.compile(r"(^|\.)(language_model|vit_model|connector|vae2llm|llm2vae|time_embedder)\.")
_ADAPTED = re.compile(r"\.lora_|lora_(A|B|up|down)\b|\.hada_|\.oft_")
_SHARD = re.compile(r"(.*?)[-_.](\d{1,6})-of-(\d{1,6})")
_SHOWN = 6


@dataclass(frozen=True)
class WeightSet:
    """Files that hold a model together; `index` is the file that says so, if one does."""

    name: str
    files: tuple[Path, ...]
    index: Path | None = None

    @property
    def numbered(self) -> bool:
        """Whether each of its files is but a part of it."""
        return self.index is not None or "-of-" in self.name

    @property
    def words(self) -> str:
        """What `--weights` would be told, and how many files it is."""
        return self.name if len(self.files) == 1 else f"{self.name} ({len(self.files)} shards)"


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
    sets, notes = weight_sets(folder)
    chosen = _first(folder, sets) if weights is None else _named(folder, weights, sets)
    return Chosen(chosen, tuple(one for one in sets if one != chosen), tuple(notes))


def weight_sets(folder: Path) -> tuple[list[WeightSet], list[str]]:
    """All sets, the preferred one first, and what is to be said of indexes that cannot be believed.

    Raises:
        CheckpointError: nothing has a usual name, and an index is malformed or names shards some of which are missing;
            or the only files that there are cannot be read.
    """
    files = _loose_files(folder)
    named = [WeightSet(path.name, (path,)) for name in NAMES if (path := folder / f"{name}{SUFFIX}") in files]
    indexed, notes = _indexed_sets(folder, usable=bool(named))
    taken = {path for one in (*named, *indexed) for path in one.files}
    held = Loose.read([path for path in files if path not in taken])
    loose = [one for one in _loose_sets(held.model) if not _gap(one)]
    if not (named or indexed or loose):
        gaps = [gap for one in _loose_sets(held.model) if (gap := _gap(one))]
        if notes or gaps:
            raise CheckpointError(f"{folder}: {(notes or gaps)[0]}")
        if held.unreadable:
            raise held.unreadable[0]
        loose = _loose_sets(held.others)
    return [*named, *indexed, *loose], notes


def _gap(one: WeightSet) -> str:
    """Which shard is missing from a set whose files number themselves; empty where none is."""
    shards = [_SHARD.fullmatch(path.name.removesuffix(SUFFIX)) for path in one.files]
    there = {int(shard[2]) for shard in shards if shard is not None}
    first = shards[0]
    if first is None or not one.numbered:
        return ""
    missing = next((n for n in range(1, min(int(first[3]), 10_000) + 1) if n not in there), None)
    if missing is None or there == set(range(len(there))):  # counted from 0
        return ""
    digits = len(first[2])
    return f"{one.name.replace('*', f'{missing:0{digits}}')} is missing; fetch it, and the index beside it"


@dataclass(frozen=True)
class Loose:
    """Files that no usual name and no index tells of, by what their headers say; a file with its tensors' names.

    `model` have tensors of BAGEL's, `others` are of something else and no adapters.
    """

    model: Mapping[Path, tuple[str, ...]]
    others: Mapping[Path, tuple[str, ...]]
    unreadable: tuple[CheckpointError, ...] = ()

    @classmethod
    def read(cls, files: Iterable[Path]) -> Loose:
        model: dict[Path, tuple[str, ...]] = {}
        others: dict[Path, tuple[str, ...]] = {}
        unreadable = []
        for path in files:
            try:
                names = tuple(SafetensorsFile(path).entries)
            except CheckpointError as error:
                unreadable.append(error)
                continue
            if any(_ADAPTED.search(name) for name in names):
                continue
            (model if any(_ROOT.search(name) for name in names) else others)[path] = names
        return cls(model, others, tuple(unreadable))


def file_set(path: Path) -> WeightSet:
    """The set that a file belongs to: its own, or the shards that it is one of.

    Raises:
        CheckpointError: it is missing, or no file of weights.
    """
    if path.name.endswith(INDEX_SUFFIX):
        names = _index_names(path)
        missing = [name for name in names if not (path.parent / name).exists()]
        if missing:
            raise CheckpointError(f"{path.parent}: {missing[0]} is missing, which {path.name} names; fetch it too")
        return WeightSet(path.name, tuple(path.parent / name for name in names), path)
    if not path.name.endswith(SUFFIX):
        raise CheckpointError(f"{path}: {_not_weights(path)}")
    for one in weight_sets(path.parent)[0]:
        if one.numbered and path in one.files:
            return one
    return WeightSet(path.name, (path,))


def is_weights(path: Path) -> bool:
    """Whether a file's name is that of weights, or of another program's."""
    return path.name.endswith((SUFFIX, INDEX_SUFFIX, *OTHER_SUFFIXES))


def vae_file(folder: Path) -> Path | None:
    """The file that holds the autoencoder: by its name, else a loose one with its tensors; None where there is none."""
    usual = [folder / place for place in VAE_PLACES]
    found = next((path for path in (*usual, *sorted((folder / "vae").glob(f"*{SUFFIX}"))) if path.exists()), None)
    if found is not None:
        return found
    loose = Loose.read(_loose_files(folder)).others
    return next((path for path, names in loose.items() if "decoder.conv_in.weight" in names), None)


def _named(folder: Path, weights: str, sets: Sequence[WeightSet]) -> WeightSet:
    given = Path(weights).expanduser()
    for one in sets:
        if weights == one.name or (one.numbered and weights in [path.name for path in one.files]):
            return one
    for path in (folder / given, given):
        if path.is_file():
            return file_set(path.absolute() if path is given else path)
    raise CheckpointError(f"{folder}: there are no weights {weights}; {listed(sets) or 'it has none at all'}")


def _first(folder: Path, sets: Sequence[WeightSet]) -> WeightSet:
    if not sets:
        raise CheckpointError(f"{folder}: {_nothing(folder)}")
    usual = [one for one in sets if one.index is not None or one.name in {f"{name}{SUFFIX}" for name in NAMES}]
    if usual:
        return usual[0]
    if len(sets) == 1:
        return sets[0]
    raise CheckpointError(
        f"{folder}: {_shared(sets)}; {listed(sets)}: choose one with --weights FILE, or remove what does not belong"
    )


def listed(sets: Sequence[WeightSet]) -> str:
    """The sets in one line; nothing where there are none."""
    names = ", ".join(one.words for one in sets[:_SHOWN])
    more = f" and {len(sets) - _SHOWN} more" if len(sets) > _SHOWN else ""
    return f"it has {names}{more}" if sets else ""


def _shared(sets: Sequence[WeightSet]) -> str:
    """A tensor that several sets have, which is why they are several."""
    owner: dict[str, str] = {}
    for path, names in Loose.read(path for one in sets for path in one.files).model.items():
        for name in names:
            if name in owner:
                return f"tensor {name} is in {owner[name]} and in {path.name}"
            owner[name] = path.name
    return "holds several sets of weights"


def _loose_files(folder: Path) -> list[Path]:
    """Files that may hold the model, in order of name. A hidden one is another system's note about a file."""
    vae = {folder / place for place in VAE_PLACES}
    found = sorted(path for path in folder.glob(f"*{SUFFIX}") if path not in vae and not path.name.startswith("."))
    usual = {f"{name}{SUFFIX}" for name in NAMES}
    return [path for path in found if path.name in usual or (path.is_file() and not ADAPTERS.search(path.name))]


def _indexed_sets(folder: Path, usable: bool) -> tuple[list[WeightSet], list[str]]:
    """Sets by an index whose files are there, and what is wrong with the others.

    `usable`: whether there is a set without them, so that an index that was copied along may be wrong.
    """
    found, notes = [], []
    others = sorted(path.name for path in folder.glob(f"*{INDEX_SUFFIX}") if not path.name.startswith("."))
    for name in dict.fromkeys((*INDEX_FILES, *others)):
        index = folder / name
        if not index.exists() or ADAPTERS.search(name) or name.startswith("diffusion_pytorch_model"):
            continue
        try:
            names = [file for file in _index_names(index) if file != VAE_FILE]
        except CheckpointError:
            if not usable:
                raise
            notes.append(f"{name} cannot be read, and is not used")
            continue
        missing = [file for file in names if not (folder / file).exists()]
        if missing:
            if len(missing) < len(names) and not usable:
                raise CheckpointError(f"{folder}: {missing[0]} is missing, which {name} names; fetch it too")
            count = f" and {len(missing) - 1} more of {len(names)} files" if len(missing) > 1 else ""
            notes.append(f"{missing[0]} is missing{count}, which {name} names; fetch it, or remove the index")
        elif names:
            found.append(WeightSet(name, tuple(folder / file for file in names), index))
    return found, notes


def _index_names(index: Path) -> list[str]:
    """The files that an index names, all beside it.

    Raises:
        CheckpointError: it is no index, or leads elsewhere.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map; take the model's own file, or remove it")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not name.isprintable() or Path(name).name != name or not name.endswith(SUFFIX):
            raise CheckpointError(f"{index}: names the file {name!r}, which is not a shard beside it")
    return names


def _loose_sets(files: Mapping[Path, tuple[str, ...]]) -> list[WeightSet]:
    """Loose files as sets: numbered shards of one name together, and files that share no tensor together."""
    numbered: dict[str, list[Path]] = {}
    for path in files:
        shard = _SHARD.fullmatch(path.name.removesuffix(SUFFIX))
        numbered.setdefault(f"{shard[1]}-*-of-{shard[3]}{SUFFIX}" if shard else path.name, []).append(path)
    sets = [WeightSet(name, tuple(paths)) for name, paths in numbered.items()]
    names = [name for of_file in files.values() for name in of_file]
    if len(sets) < 2 or len(names) != len(set(names)):
        return sets
    return [WeightSet(f"*{SUFFIX}", tuple(files))]


def _nothing(folder: Path) -> str:
    """What a folder without weights holds instead, with the remedy."""
    held = [path for path in _files(folder) if path.suffix.lower() in OTHER_SUFFIXES]
    for suffix in (".gguf", ".distcp"):
        for path in held:
            if path.suffix.lower() == suffix:
                return _not_weights(path)
    if held:
        return f"holds {held[0].name}, {PICKLE_REMEDY}"
    if folder.is_dir() and any(ADAPTERS.search(path.name) for path in folder.glob(f"*{SUFFIX}")):
        return f"holds an adapter and no weights of its own; {REMEDY_ADAPTER}"
    return f"{MODEL_FILE} is missing, and so is every other set of weights; is this a BAGEL checkpoint folder?"


PICKLE_REMEDY = (
    "a pickle, which is never loaded (it can run code); use the safetensors files of the published checkpoint"
)
REMEDY_ADAPTER = "give the folder of the model that it adapts"
DISTCP_REMEDY = (
    "parts of a distributed checkpoint; gather them with torch.distributed.checkpoint.format_utils, and save the "
    "result as model.safetensors"
)


def _not_weights(path: Path) -> str:
    """What a file of another kind is, with the remedy."""
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return (
            f"holds {path.name}, a GGUF file, which this version does not read; use the model's safetensors files, "
            "made smaller with `lowmem-bagel convert FOLDER OUT --to nf4`"
        )
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
            not ADAPTERS.search(path.name) for path in folder.glob(f"*{SUFFIX}") if path.name not in VAE_PLACES
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

"""Which files of a repository make one checkpoint: one set of weights, and the small files and VAE that go with it.

A repository may hold several sets (a trainer writes averaged and plain weights), states of optimizers, pickles, and the
same again in folders. One set is chosen by the order in which a folder is read; the others are named and left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import DownloadError
from .peek import Remote
from .web import shown

NAMES = ("ema.safetensors", "ema_bf16.safetensors", "model.safetensors", "model_bf16.safetensors")
INDEXES = ("model.safetensors.index.json", "ema.safetensors.index.json")
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
VAE = "ae.safetensors"
VAE_PLACES = (VAE, "vae.safetensors", f"vae/{VAE}", "vae/diffusion_pytorch_model.safetensors")
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp"})
NEVER_MODEL = re.compile(r"adapter_model|pytorch_lora_weights|optimizer|scheduler", re.IGNORECASE)
BAGELS = re.compile(r"moe_gen|vae2llm|llm2vae|time_embedder|latent_pos_embed|vit_pos_embed")
"""What stands in names of tensors of BAGEL's architecture, and of no other."""
CONFIGS = ("llm_config.json", "vit_config.json")
WHOLE_TOKENIZER = "tokenizer.json"
TOKENIZER = (WHOLE_TOKENIZER, "tokenizer_config.json", "vocab.json", "merges.txt")
LARGEST_JSON = 64 * 2**20
"""Bytes: far above every configuration and tokenizer, and below what trainers log."""
_SHARD = re.compile(r"(.*)[-_.](\d{1,6})-of-(\d{1,6})\.safetensors")


@dataclass(frozen=True)
class WeightSet:
    """Files that hold a model together, by the name that `--weights` takes; an index is one of them."""

    name: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """What is fetched of a repository; `files`: the name in the folder that is filled -> the name in the repository."""

    folder: str
    """The folder in the repository, "" for all of it."""
    weights: tuple[str, ...]
    files: Mapping[str, str]
    left: tuple[str, ...]
    """What holds weights too and is not fetched."""
    lacking: tuple[str, ...]
    """What a checkpoint needs and this repository does not have."""


def choose(remote: Remote, folder: str = "", weights: str | None = None) -> Choice:
    """One complete checkpoint of a repository, or of a folder in it.

    Raises:
        DownloadError: it has none, or several and nothing says which; or it is not BAGEL's.
    """
    names = remote.listing.files
    if weights is not None and "/" in weights:
        folder, weights = "/".join(filter(None, (folder, *weights.split("/")[:-1]))), weights.rpartition("/")[2]
    folder = _with_weights(remote, folder)
    here = _inside(names, folder)
    if "variant.json" in here:  # made by `convert`: complete, and all of it belongs together
        whole = [name for name in here if name.endswith((SUFFIX, ".json", ".txt")) and "/" not in name]
        stored = tuple(name for name in whole if name.endswith(SUFFIX))
        return Choice(folder, stored, {name: _join(folder, name) for name in whole}, (), ())
    sets = _sets(remote, folder, here, weights)
    chosen = _named(remote, weights, sets) if weights is not None else sets[0]
    _check_shards(remote, chosen)
    files = {name: place for level in _upwards(folder) for name, place in _small(names, level).items()}
    small = [name for name in here if _belongs(name, names[_join(folder, name)].size)]
    files |= {name: _join(folder, name) for name in (*small, *chosen.files)}
    lacking = tuple(_lacking(remote, files, chosen, folder))
    return Choice(
        folder,
        tuple(name for name in chosen.files if name.endswith(SUFFIX)),
        files,
        tuple(_left(names, set(files.values()))),
        lacking,
    )


def companions(names: Collection[str], lacking: Collection[str], base: str) -> Sequence[str]:
    """Which of a base's files complete a checkpoint.

    Raises:
        DownloadError: the base lacks something too. Of the tokenizer one form is enough.
    """
    found = [name for name in lacking if name != VAE and name in names]
    vae = _vae(names, "") if VAE in lacking else ()
    missing = [name for name in lacking if name in CONFIGS and name not in found]
    if VAE in lacking and not vae:
        missing.append(VAE)
    if WHOLE_TOKENIZER in lacking and WHOLE_TOKENIZER not in found and not {*TOKENIZER[2:]} <= {*found}:
        missing.append(WHOLE_TOKENIZER)
    if missing:
        raise DownloadError(f"{base} has no {', '.join(missing)} either")
    return [*found, *vae]


def _with_weights(remote: Remote, folder: str) -> str:
    """The folder that holds weights: the one that is meant, or the only one below it or named so."""
    holding = sorted({_parent(name) for name in remote.listing.files if _may_be_weights(name)})
    if folder in holding:
        return folder
    inside = [one for one in holding if not folder or one.startswith(f"{folder}/") or f"/{folder}/" in f"/{one}/"]
    below = inside or [one for one in holding if f"/{folder}" in f"/{one}"]
    if len(below) == 1:
        return below[0]
    if below:
        there = ", ".join(below[:8])
        raise DownloadError(f"{remote.repo} holds weights in {there}; choose one: {remote.repo}/{below[0]}")
    raise DownloadError(_nothing(remote, folder, holding))


def _nothing(remote: Remote, folder: str, holding: Sequence[str]) -> str:
    """Why a repository has no weights that could be read."""
    names = [name for name in remote.listing.files if not folder or name.startswith(f"{folder}/")]
    if folder and not names:
        there = f"; weights are in {', '.join(one or 'its root' for one in holding[:8])}" if holding else ""
        return f"{remote.repo} has no folder {shown(folder)}{there}; check the name"
    adapters = [name for name in names if name.endswith(SUFFIX) and NEVER_MODEL.search(_last(name))]
    pickles = [name for name in names if PurePosixPath(name).suffix in PICKLES]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if adapters:
        return f"{remote.repo} holds {adapters[0]} and no model of its own; fetch such files by name, with --file"
    if pickles:
        why = f"its weights are pickles ({pickles[0]}), which can run code when they are read"
    elif ggufs:
        return f"{remote.repo} holds GGUF files ({ggufs[0]}) and no safetensors; fetch one by name, with --file"
    else:
        why = "it lacks safetensors files"
    return f"{remote.repo} is not a BAGEL checkpoint: {why}; give another repository, or name files with --file"


def _sets(remote: Remote, folder: str, here: Collection[str], weights: str | None) -> list[WeightSet]:
    """The sets of a folder, the one that is read first; what indexes say is asked where it may count.

    Raises:
        DownloadError: none of several has a usual name.
    """
    found = [WeightSet(name, (name,)) for name in NAMES if name in here]
    others = sorted(name for name in here if name.endswith(INDEX_SUFFIX) and not NEVER_MODEL.search(name))
    for index in [name for name in dict.fromkeys((*INDEXES, *others)) if name in here]:
        asked = not found or (weights is not None and weights not in NAMES)
        shards = _indexed(remote, folder, index) if asked else ()
        if shards and set(shards) <= set(here):  # an index that was copied along names files that are not there
            found.append(WeightSet(index, (index, *shards)))
    taken = {file for one in found for file in one.files}
    loose = _loose([name for name in here if "/" not in name and _may_be_weights(name) and name not in taken])
    if found or len(loose) == 1:
        return [*found, *loose]
    return _only(remote, folder, loose)


def _only(remote: Remote, folder: str, loose: Sequence[WeightSet]) -> list[WeightSet]:
    """Of loose files the one set that is BAGEL's, by the tensors that their headers name.

    Raises:
        DownloadError: none is, or several that hold the same tensors.
    """
    held = {one: [name for file in one.files for name in remote.tensors(_join(folder, file))] for one in loose}
    ours = [one for one, names in held.items() if any(map(BAGELS.search, names))]
    if not ours:
        raise _not_bagel(remote, loose[0].name, next(iter(held.values())))
    tensors = [name for one in ours for name in held[one]]
    if len(ours) > 1 and len(tensors) == len(set(tensors)):  # parts of one model
        return [WeightSet(f"*{SUFFIX}", tuple(file for one in ours for file in one.files))]
    if len(ours) == 1:
        return [*ours, *(one for one in loose if one not in ours)]
    sets = ", ".join(one.name for one in ours[:8])
    raise DownloadError(f"{remote.repo} holds several sets of weights: {sets}; choose one with --weights FILE")


def _loose(names: Sequence[str]) -> list[WeightSet]:
    """Files that no index names: shards that count themselves together, every other on its own."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        shard = _SHARD.fullmatch(name)
        found.setdefault(f"{shard[1]}-*-of-{shard[3]}{SUFFIX}" if shard else name, []).append(name)
    return [WeightSet(name, tuple(files)) for name, files in found.items()]


def _indexed(remote: Remote, folder: str, index: str) -> tuple[str, ...]:
    """The shards that an index names; none where it is no index."""
    try:
        map_ = json.loads(remote.text(_join(folder, index)))["weight_map"]
        return tuple(sorted({str(name) for name in map_.values()} - {VAE}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()


def _named(remote: Remote, weights: str, sets: Sequence[WeightSet]) -> WeightSet:
    for one in sets:
        if weights == one.name or weights in one.files:
            return one
    there = ", ".join(one.name for one in sets[:8])
    raise DownloadError(f"{remote.repo} has no weights {shown(weights)}; it has {there}")


def _check_shards(remote: Remote, chosen: WeightSet) -> None:
    """Shards that count themselves have to be all there."""
    count = int(chosen.name.removesuffix(SUFFIX).rpartition("-of-")[2]) if "-*-of-" in chosen.name else 0
    if count and len(chosen.files) != count:
        raise DownloadError(
            f"{remote.repo} is not complete: {len(chosen.files)} of the {count} files {chosen.name} are there; "
            "choose others with --weights FILE, or give another repository"
        )


def _lacking(remote: Remote, files: Collection[str], chosen: WeightSet, folder: str) -> Iterable[str]:
    """What a checkpoint needs beside its weights and these files do not have.

    Raises:
        DownloadError: nothing around the weights says that they are BAGEL's, and their tensors are not.
    """
    if CONFIGS[0] not in files:
        first = next(file for file in chosen.files if file.endswith(SUFFIX))
        tensors = remote.tensors(_join(folder, first))
        if not any(map(BAGELS.search, tensors)):
            raise _not_bagel(remote, first, tensors)
    nested = _nested(remote, files, folder) if not {*CONFIGS} <= {*files} else ()
    yield from (name for name in CONFIGS if name not in files and name.removesuffix(".json") not in nested)
    if not {*TOKENIZER[2:], WHOLE_TOKENIZER} & {*files}:
        yield from TOKENIZER
    elif {*TOKENIZER[2:]} <= {*files} and not {*TOKENIZER[:2]} & {*files}:
        yield "tokenizer_config.json"
    if not {*VAE_PLACES} & {*files}:
        yield VAE


def _nested(remote: Remote, files: Collection[str], folder: str) -> Collection[str]:
    """The configurations that `config.json` holds, as `save_pretrained` writes it."""
    if "config.json" not in files or _join(folder, "config.json") not in remote.listing.files:
        return ()
    try:
        config = json.loads(remote.text(_join(folder, "config.json")))
        return {key for key, value in config.items() if isinstance(value, dict) and value}
    except (ValueError, AttributeError, RecursionError):
        return ()


def _not_bagel(remote: Remote, name: str, tensors: Sequence[str]) -> DownloadError:
    such = f"tensors such as {shown(tensors[0])}" if tensors else "no tensors"
    return DownloadError(f"{remote.repo} is not a BAGEL checkpoint: {name} holds {such}; give another repository")


def _left(names: Collection[str], fetched: Collection[str]) -> Iterable[str]:
    """Files of weights and of a training's state that are not fetched."""
    vae = {_join(_parent(name), place) for name in names for place in VAE_PLACES}
    for name in sorted(names):
        state = PurePosixPath(name).suffix in PICKLES or name.endswith((SUFFIX, ".gguf"))
        if state and name not in fetched and name not in vae:
            yield name


def _small(names: Collection[str], folder: str) -> Mapping[str, str]:
    """Configuration, tokenizer and VAE of a folder: the name inside -> the name in the repository."""
    here = [name for name in (*CONFIGS, *TOKENIZER) if _join(folder, name) in names]
    return {name: _join(folder, name) for name in (*here, *_vae(names, folder))}


def _vae(names: Collection[str], folder: str) -> Sequence[str]:
    """The file of a folder that holds the VAE, and its configuration where it has one."""
    place = next((place for place in VAE_PLACES if _join(folder, place) in names), None)
    if place is None:
        return ()
    config = "vae/config.json"
    return (place, config) if place.startswith("vae/") and _join(folder, config) in names else (place,)


def _belongs(name: str, size: int) -> bool:
    """Whether a small file beside the weights is fetched with them."""
    if name == "merges.txt":
        return True
    log = name.endswith(INDEX_SUFFIX) or name == "trainer_state.json" or size > LARGEST_JSON
    return "/" not in name and name.endswith(".json") and not log


def _may_be_weights(name: str) -> bool:
    last, folder = _last(name), _last(_parent(name))
    if last.startswith(".") or folder == "vae" or NEVER_MODEL.search(last):
        return False
    return last.endswith(SUFFIX) and last not in VAE_PLACES


def _inside(names: Iterable[str], folder: str) -> list[str]:
    start = f"{folder}/" if folder else ""
    return [name.removeprefix(start) for name in names if name.startswith(start)]


def _upwards(folder: str) -> list[str]:
    """A folder and those that it lies in, the outermost first."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:count]) for count in range(len(parts) + 1)]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _last(name: str) -> str:
    return name.rpartition("/")[2]

"""Which files of a repository make one checkpoint: one set of weights, and the small files and VAE that go with it.

A repository may hold several sets (a trainer writes averaged and plain weights), states of optimizers, pickles, and the
same again in folders. One set is chosen by the order in which a folder is read; the others are named and left.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..checkpoint.config_files import LLM, NESTED, VIT, WHOLE
from ..checkpoint.tokenizer import TOKENIZER_FILES
from ..checkpoint.weight_sets import (
    ADAPTERS,
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    SUFFIX,
    VAE_FILE,
    VAE_PLACES,
    NamedSet,
    first,
    listed,
    named,
    plain_sets,
    sets_of,
    usual_sets,
    weight_files,
)
from ..errors import CheckpointError, DownloadError
from .peek import Remote
from .web import shown

PICKLES = frozenset({*PICKLE_SUFFIXES, ".pickle", ".distcp"})
BAGELS = re.compile(r"moe_gen|vit_model\.|vae2llm|llm2vae|time_embedder|latent_pos_embed|vit_pos_embed")
"""What stands in names of tensors of BAGEL's architecture, and of no other."""
CONFIGS = (LLM, VIT)
LARGEST_JSON = 64 * 2**20
"""Bytes: far above every configuration and tokenizer, and below what trainers log."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a repository as a place where weights lie."""

    remote: Remote
    folder: str

    @property
    def where(self) -> str:
        return _join(self.remote.repo, self.folder) if self.folder else self.remote.repo

    def names(self) -> Collection[str]:
        return [name for name in _inside(self.remote.listing.files, self.folder) if "/" not in name]

    def json(self, name: str) -> Mapping[str, Any]:
        return self.remote.json(_join(self.folder, name))

    def tensors(self, name: str) -> Sequence[str]:
        return self.remote.tensors(_join(self.folder, name))


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
    if folder.endswith(SUFFIX) and folder in remote.listing.files and weights is None:
        folder, weights = _parent(folder), _last(folder)
    if weights is not None and "/" in weights:
        inside, weights = _parent(weights), _last(weights)
        folder = _join(folder, inside)
    try:
        return _chosen(remote, _with_weights(remote, folder), weights)
    except CheckpointError as error:
        raise DownloadError(str(error)) from error


def _chosen(remote: Remote, folder: str, weights: str | None) -> Choice:
    """As `choose`, of a folder that holds weights.

    Raises:
        DownloadError: it is not BAGEL's.
        CheckpointError: as of `sets_of` and `first`.
    """
    place, names = RemoteFolder(remote, folder), remote.listing.files
    here = place.names()
    if "variant.json" in here:  # made by `convert`: complete, and all of it belongs together
        whole = [name for name in here if name.endswith((SUFFIX, ".gguf", ".json", ".txt"))]
        stored = tuple(name for name in whole if name.endswith((SUFFIX, ".gguf")))
        return Choice(folder, stored, {name: _join(folder, name) for name in whole}, (), ())
    chosen = _set(place, weights)
    index = () if chosen.index is None else (chosen.index,)
    files = {name: inside for level in _upwards(folder) for name, inside in _small(names, level).items()}
    small = [name for name in here if _belongs(name, names[_join(folder, name)].size)]
    files |= {name: _join(folder, name) for name in (*small, *index, *chosen.files)}
    lacking = tuple(_lacking(place, files, chosen))
    return Choice(folder, chosen.files, files, tuple(_left(names, set(files.values()))), lacking)


def _set(place: RemoteFolder, weights: str | None) -> NamedSet:
    """The set that is fetched. Heads of files are looked into only where names do not decide.

    Raises:
        DownloadError: the named one is not there.
        CheckpointError: as of `sets_of` and `first`.
    """
    chosen = _pick(plain_sets(place.names()), weights) or _pick(usual_sets(place)[0], weights)
    if chosen is not None:
        return chosen
    sets, _ = sets_of(place)
    if not sets:
        held = weight_files(place.names())[0]
        raise DownloadError(f"{place.where} holds an adapter ({held}) and no model; fetch it by name, with --file")
    if weights is None:
        return first(place, sets)
    chosen = named(weights, sets)
    if chosen is None and weights in weight_files(place.names()):
        chosen = NamedSet(weights, (weights,))
    if chosen is None:
        raise DownloadError(f"{place.where} has no weights {shown(weights)}; {listed(sets)}")
    return chosen


def _pick(sets: Sequence[NamedSet], weights: str | None) -> NamedSet | None:
    return next(iter(sets), None) if weights is None else named(weights, sets)


def companions(names: Collection[str], lacking: Collection[str], base: str) -> Sequence[str]:
    """Which of a base's files complete a checkpoint.

    Raises:
        DownloadError: the base lacks something too. Of the tokenizer one form is enough.
    """
    found = [name for name in lacking if name != VAE_FILE and name in names]
    vae = _vae(names, "") if VAE_FILE in lacking else ()
    missing = [name for name in lacking if name in CONFIGS and name not in found]
    if VAE_FILE in lacking and not vae:
        missing.append(VAE_FILE)
    whole, _, *parts = TOKENIZER_FILES
    if whole in lacking and whole not in found and not {*parts} <= {*found}:
        missing.append(whole)
    if missing:
        raise DownloadError(f"{base} has no {', '.join(missing)} either")
    return [*found, *vae]


def _with_weights(remote: Remote, folder: str) -> str:
    """The folder that holds weights: the one that is meant, or the only one below it or named so."""
    marks = (name for name in remote.listing.files if _may_be_weights(name) or _last(name) == "variant.json")
    holding = sorted(set(map(_parent, marks)))
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
    adapters = [name for name in names if name.endswith(SUFFIX) and ADAPTERS.search(_last(name))]
    pickles = [name for name in names if PurePosixPath(name).suffix in PICKLES]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if adapters:
        return f"{remote.repo} holds an adapter ({adapters[0]}) and no model; fetch it by name, with --file"
    if pickles:
        why = f"its weights are pickles ({pickles[0]}), which can run code when they are read"
    elif ggufs:
        return f"{remote.repo} holds GGUF files ({ggufs[0]}) and no safetensors; fetch one by name, with --file"
    else:
        why = "it lacks safetensors files"
    return f"{remote.repo} is not a BAGEL checkpoint: {why}; give another repository, or name files with --file"


def _lacking(place: RemoteFolder, files: Collection[str], chosen: NamedSet) -> Iterable[str]:
    """What a checkpoint needs beside its weights and these files do not have.

    Raises:
        DownloadError: nothing around the weights says that they are BAGEL's, and their tensors are not.
        CheckpointError: the weights are no safetensors file.
    """
    if LLM not in files:
        _check_is_bagel(place, chosen)
    nested = _nested(place) if WHOLE in files and not {*CONFIGS} <= {*files} else ()
    yield from (name for name in CONFIGS if name not in files and not {*NESTED[name]} & {*nested})
    whole, _, *parts = TOKENIZER_FILES
    if not {whole, *parts} & {*files}:
        yield from TOKENIZER_FILES
    elif {*parts} <= {*files} and not {*TOKENIZER_FILES[:2]} & {*files}:
        yield TOKENIZER_FILES[1]
    if not {*VAE_PLACES} & {*files}:
        yield VAE_FILE


def _nested(place: RemoteFolder) -> Collection[str]:
    """The configurations that `config.json` holds, as `save_pretrained` writes it."""
    if WHOLE not in place.names():
        return ()
    return {key for key, value in place.json(WHOLE).items() if isinstance(value, dict) and value}


def _check_is_bagel(place: RemoteFolder, chosen: NamedSet) -> None:
    """Refuse weights none of whose tensors is named as BAGEL's are."""
    for file in chosen.files:
        tensors = place.tensors(file)
        if any(map(BAGELS.search, tensors)):
            return
    such = f"tensors such as {shown(tensors[0])}" if tensors else "no tensors"
    raise DownloadError(f"{place.where} is not a BAGEL checkpoint: {file} holds {such}; give another repository")


def _left(names: Collection[str], fetched: Collection[str]) -> Iterable[str]:
    """Files of weights and of a training's state that are not fetched."""
    vae = {_join(_parent(name), place) for name in names for place in VAE_PLACES}
    for name in sorted(names):
        state = PurePosixPath(name).suffix in PICKLES or name.endswith((SUFFIX, ".gguf"))
        if state and name not in fetched and name not in vae:
            yield name


def _small(names: Collection[str], folder: str) -> Mapping[str, str]:
    """Configuration, tokenizer and VAE of a folder: the name inside -> the name in the repository."""
    here = [name for name in (*CONFIGS, *TOKENIZER_FILES) if _join(folder, name) in names]
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
    return _last(_parent(name)) != "vae" and bool(weight_files([_last(name)]))


def _inside(names: Iterable[str], folder: str) -> list[str]:
    start = f"{folder}/" if folder else ""
    return [name.removeprefix(start) for name in names if name.startswith(start)]


def _upwards(folder: str) -> list[str]:
    """A folder and those that it lies in, the outermost first."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:count]) for count in range(len(parts) + 1)]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _last(name: str) -> str:
    return name.rpartition("/")[2]

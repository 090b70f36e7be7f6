"""A model folder, source checkpoint or variant: its configuration, its stored tensors and its manifest.

Everything that reads weights, be it the loader, the planner, a converter or `verify`, reads them through `stored`: the
model's own names, each with where its bytes are and how the tensor is made of them.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, ConfigError
from ..files import expanded, readable
from .adapters import Adapter, LowRank, changes_of, merged, read_adapters
from .config import BagelConfig, ResizeRule
from .config_files import ConfigFiles, gather, read_config
from .gguf_file import SUFFIX as GGUF
from .manifest import Manifest, read_manifest
from .naming import Names
from .reading import Reading
from .routed import line as experts_line
from .safetensors_file import SafetensorsFile, TensorEntry, TensorFile
from .small_files import SmallFiles
from .source_files import Lender, as_built, read_source
from .stored import StoredTensor
from .tensors import LATENT_POSITIONS, VIT_POSITIONS, tensor_table
from .tokenizer import TOKENIZER_FILES, has_tokenizer
from .weights import MODEL_FILE as MODEL_FILE
from .weights import VAE_FILE as VAE_FILE
from .weights import file_set, pointed_at

if TYPE_CHECKING:
    import torch

COMPANIONS = (
    "config.json", "llm_config.json", "vit_config.json", "ae_config.json", "resize_config.json",
    "generation_config.json", "preprocessor_config.json", *TOKENIZER_FILES, "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "LICENSE", "NOTICE",
)  # fmt: skip
"""The small files of a folder that belong to the model."""


class ModelFolder:
    """An opened folder. Reading it touches only JSON files and safetensors headers.

    Attributes:
        path: the folder.
        config: dimensions and limits.
        format: "source", or the variant's format name.
        manifest: the variant's manifest; None for a source checkpoint and for a published DFloat11 folder.
        files: the files that hold its tensors.
        stored: every tensor by the model's own name; in a variant and a DFloat11 folder by its name in the files.
        reading: what was chosen, completed, computed, ignored and rounded.
        special_ids: ids of special tokens that the weights say they were made with.
        adapters: what `adapted` added.
        beside: what adapters add to weights that are stored encoded, by the name of the module.
    """

    def __init__(
        self,
        path: Path,
        config: BagelConfig,
        format: str,
        manifest: Manifest | None,
        files: Iterable[TensorFile],
        stored: Mapping[str, StoredTensor] | None = None,
        reading: Reading = Reading(),
        configs: ConfigFiles | None = None,
        base: ModelFolder | None = None,
    ) -> None:
        self.path = path
        self.format = format
        self.manifest = manifest
        self.files = tuple(files)
        self.stored = _as_they_are(self.files) if stored is None else stored
        self.base = base
        self.adapters: tuple[Adapter, ...] = ()
        self.beside: Mapping[str, tuple[LowRank, ...]] = {}
        self._configs = configs
        self.special_ids: Mapping[str, int] = (configs.special_ids if configs is not None else None) or {}
        vae_resize, of_drawing = self._covered(LATENT_POSITIONS, config.vae_resize, config.token_pixels)
        vit_resize, of_looking = self._covered(VIT_POSITIONS, config.vit_resize, config.vit.patch_size)
        self.config = replace(config, vae_resize=vae_resize, vit_resize=vit_resize)
        self.reading = reading.joined(limits="; ".join(line for line in (of_drawing, of_looking) if line))

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, weights: str | os.PathLike[str] | None = None,
        base: str | os.PathLike[str] | None = None, lora: Sequence[str] = (),
    ) -> ModelFolder:  # fmt: skip
        """Open a source checkpoint, a variant of ours, or a published DFloat11 folder.

        Args:
            path: the folder, or the file of weights in it that is meant.
            weights: the set of weights, by the name of its file or index, or of one of its shards.
            base: another checkpoint's folder, which completes what this one lacks: configuration, tokenizer, tensors.
            lora: adapters to add; see `adapted`.

        Raises:
            CheckpointError, ConfigError: the folder or a file in it is missing, damaged or contradicts another.
        """
        with readable(CheckpointError):
            return cls._opened(expanded(path), weights, base).adapted(lora)

    @classmethod
    def _opened(
        cls, folder: Path, weights: str | os.PathLike[str] | None, base: str | os.PathLike[str] | None
    ) -> ModelFolder:
        if folder.is_file():
            if weights is not None:
                raise CheckpointError(f"{folder} is a file, and {os.fspath(weights)} are the weights; name one of them")
            folder, weights = folder.parent, file_set(folder.absolute()).name
        if not folder.is_dir():
            raise CheckpointError(f"no such folder: {folder}; {_instead_of(folder)}")
        manifest = read_manifest(folder)
        named = None if weights is None else os.fspath(weights)
        if manifest is not None and (named is None or named in manifest.shards or not named.lower().endswith(GGUF)):
            whole = _whole(manifest)
            if base is not None or named not in (None, whole):
                raise CheckpointError(f"{folder}: is a variant, which is complete; use it without weights or base")
            if whole is not None:
                found = read_source(folder, whole, None)
                return cls(
                    folder, found.config, manifest.format, manifest, found.files, found.stored, found.reading,
                    found.configs,
                )  # fmt: skip
            files = [SafetensorsFile(folder / name) for name in manifest.shards]
            configs = gather(folder)
            described = as_built(read_config(configs), Names.of(files))
            reading = Reading().joined(experts=experts_line(described.config.decoder, described.experts))
            return cls(folder, described.config, manifest.format, manifest, files, reading=reading, configs=configs)
        try:
            lent = None if base is None else _base(base)
            lender = None if lent is None else lent.lender
            found = read_source(folder, named, lender)
        except CheckpointError as error:
            if error.args[0].endswith(MISSING):
                raise CheckpointError(f"{error}{pointed_at(folder)}") from None
            raise
        return cls(
            folder, found.config, found.format, None, found.files, found.stored, found.reading, found.configs, lent
        )

    @property
    def names(self) -> list[str]:
        """Its own, and that of the checkpoint that it was converted from."""
        return [self.path.name, *([] if self.manifest is None else [self.manifest.source])]

    @property
    def lender(self) -> Lender:
        """What the folder lends to one that it is the base of."""
        assert self._configs is not None
        return Lender(self.path.resolve().name, self.stored, self._configs, self.config.vit.num_layers)

    def adapted(self, adapters: Sequence[str]) -> ModelFolder:
        """This folder with LoRA adapters added, each said as FOLDER or FOLDER:WEIGHT, in their order.

        Weights that are stored as floats become float32 sums, which are rounded when they are read into the model or
        converted; what is added to encoded weights is kept apart, in `beside`.

        Raises:
            CheckpointError: a folder is no adapter, or one that does not fit this model.
        """
        table = tensor_table(self.config)
        read = read_adapters(adapters, table)
        if not read:
            return self
        folder = copy.copy(self)
        stored, beside = dict(self.stored), dict(self.beside)
        for name in dict.fromkeys(name for adapter in read for name in adapter.changes):
            changes = changes_of(read, name)
            if name in stored and self._is_plain(name):
                stored[name] = merged(name, stored[name], changes)
            elif table[name].routed is not None and self._is_there(name):
                raise CheckpointError(
                    f"{self.path}: {read[0].path} changes {name}, one of many routed experts, and such a change cannot "
                    "be kept beside encoded weights; convert the checkpoint with --lora"
                )
            elif self._is_there(name):
                module = name.removesuffix(".weight")
                beside[module] = beside.get(module, ()) + changes
            else:
                raise CheckpointError(f"{self.path}: lacks {name}, which {read[0].path} changes; convert both experts")
        folder.stored, folder.beside, folder.adapters = stored, beside, self.adapters + read
        added = sum(stored[name] is not self.stored.get(name) for name in stored)
        counts = ((added, "added to {} weights"), (len(beside), "kept beside {} encoded weights"))
        how = ", ".join(words.format(count) for count, words in counts if count)
        folder.reading = self.reading.joined(adapters=f"{', '.join(adapter.said for adapter in read)}: {how}")
        return folder

    def _is_plain(self, name: str) -> bool:
        plain = self.manifest is None or self.manifest.tensors[name].encoding in ("bf16", "fp16", "fp32")
        return plain and not self.stored[name].encoded

    def _is_there(self, name: str) -> bool:
        """Whether the folder has a weight at all, encoded."""
        return self.format != "source" and (self.manifest is None or name in self.manifest.tensors)

    def _covered(self, name: str, rule: ResizeRule, token: int) -> tuple[ResizeRule, str]:
        """The rule within what the table of positions covers, and what is to be said where that is less.

        Raises:
            ConfigError: the table does not cover the smallest picture.
        """
        side = self._side(name)
        if side is None or rule.max_side <= side * token:
            return rule, ""
        longest = side * token // rule.stride * rule.stride
        if not longest:
            covered = f"{name} covers {side * token} pixels, less than the {rule.stride} of the smallest picture"
            raise ConfigError(f"{self.path}: {covered}; the checkpoint does not belong to its configuration")
        lowered = replace(rule, max_side=longest, min_side=min(rule.min_side, longest))
        return lowered, f"{name} covers pictures of {side * token} pixels a side: larger ones are made smaller"

    def _side(self, name: str) -> int | None:
        """Positions a side of a table, None where there is none."""
        if name not in self.stored:
            return None
        shape = self.entry(name).shape
        return math.isqrt(shape[0]) if shape and shape[0] else None

    @property
    def max_side(self) -> int:
        """Longest side in pixels of a picture that its table of latent positions covers; its rule's without one."""
        side = self._side(LATENT_POSITIONS)
        return self.config.vae_resize.max_side if side is None else side * self.config.token_pixels

    @property
    def tokenizer(self) -> SmallFiles:
        """Where its tokenizer is."""
        return self.base.tokenizer if self.base is not None and not has_tokenizer(self._small) else self._small

    @property
    def _small(self) -> SmallFiles:
        return SmallFiles(self.path) if self._configs is None else self._configs.small

    def companions(self) -> dict[str, Path | bytes]:
        """The small files that make a folder of this model complete, each as a file or as what is to be in it.

        What the folder lacks its base lends; what stood in the metadata of the weights becomes a file.
        """
        import json

        lent = {} if self.base is None else self.base.companions()
        own_tokenizer, held = has_tokenizer(self._small), self._small.held
        found: dict[str, Path | bytes] = {}
        for name in COMPANIONS:
            path = self.path / name
            if name in held:
                found[name] = held[name].encode()
            elif path.is_file():
                found[name] = path
            elif name in lent and not (own_tokenizer and name in TOKENIZER_FILES):
                found[name] = lent[name]
        for name, section in (self._configs.sections if self._configs is not None else {}).items():
            if section.path != self.path / name and not isinstance(found.get(name), Path):
                found[name] = json.dumps(dict(section.values), indent=1).encode()
        return found

    def entry(self, name: str) -> TensorEntry:
        """What a stored tensor is.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self.located(name).entry

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor in its stored dtype, read-only where it lies in a file as it is; clone it to keep it."""
        return self.located(name).tensor()

    def raw(self, name: str) -> memoryview:
        """A stored tensor's bytes, not copied where they lie in a file as they are."""
        return self.located(name).raw()

    def located(self, name: str) -> StoredTensor:
        """A stored tensor's entry, and where its bytes are.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self.stored[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; complete it with --base FOLDER") from None


def _instead_of(folder: Path) -> str:
    """What to give where there is no such folder: the name of a repository is none."""
    name = folder.as_posix()
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.exists():
        return f"give a folder, such as the one that `lowmem-bagel download {name}` makes"
    return "give a BAGEL checkpoint or variant folder"


MISSING = "is this a BAGEL checkpoint folder?"
"""How a complaint ends that another folder may answer."""


def _whole(manifest: Manifest) -> str | None:
    """The name of the file that is complete in itself, where a variant is one."""
    return next((name for name in manifest.shards if name.lower().endswith(GGUF)), None)


def _base(path: str | os.PathLike[str]) -> ModelFolder:
    base = ModelFolder.open(path)
    if base.format != "source":
        raise CheckpointError(f"{base.path}: is a {base.format} folder; a base is a checkpoint that was not converted")
    return base


def _as_they_are(files: Iterable[TensorFile]) -> dict[str, StoredTensor]:
    """All tensors of files under their names there."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, entry in file.entries.items():
            if name in stored:
                raise CheckpointError(
                    f"{file.path.parent}: tensor {name} is in {stored[name].file.path.name} and in {file.path.name}; "
                    "remove the file that does not belong"
                )
            stored[name] = StoredTensor.plain(file, entry)
    return stored

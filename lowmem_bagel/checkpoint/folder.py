"""A model folder, source checkpoint or variant: its configuration, its stored tensors and its manifest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, ConfigError
from .config import BagelConfig, ResizeRule, read_json
from .manifest import Manifest, read_manifest
from .safetensors_file import SafetensorsFile, TensorEntry
from .tensors import LATENT_POSITIONS, VIT_POSITIONS

if TYPE_CHECKING:
    import torch

MODEL_FILE = "ema.safetensors"
INDEX_FILES = ("model.safetensors.index.json", "ema.safetensors.index.json")
VAE_FILE = "ae.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    file: SafetensorsFile
    entry: TensorEntry


class ModelFolder:
    """An opened folder. Reading it touches only JSON files and safetensors headers.

    Attributes:
        path: the folder.
        config: dimensions and limits.
        format: "source", or the variant's format name.
        manifest: the variant's manifest; None for a source checkpoint and for a published DFloat11 folder.
        stored: every stored tensor by name.
    """

    def __init__(
        self, path: Path, config: BagelConfig, format: str, manifest: Manifest | None, files: Iterable[SafetensorsFile]
    ) -> None:
        self.path = path
        self.config = config
        self.format = format
        self.manifest = manifest
        self.files = tuple(files)
        self.stored = _by_name(self.files)
        self._check_table(LATENT_POSITIONS, config.vae_resize, config.token_pixels)
        self._check_table(VIT_POSITIONS, config.vit_resize, config.vit.patch_size)

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """Open a source checkpoint, a variant of ours, or a published DFloat11 folder.

        Raises:
            CheckpointError, ConfigError: the folder or a file in it is missing, damaged or contradicts another.
        """
        folder = Path(path).expanduser()
        config = BagelConfig.from_folder(folder)
        manifest = read_manifest(folder)
        if manifest is not None:
            files = [SafetensorsFile(folder / name) for name in manifest.shards]
            return cls(folder, config, manifest.format, manifest, files)
        files = [SafetensorsFile(p) for p in (*_model_files(folder), folder / VAE_FILE)]
        return cls(folder, config, _published_format(folder), None, files)

    def _check_table(self, name: str, rule: ResizeRule, token: int) -> None:
        """The resize rule must not give pictures that reach beyond the table of positions."""
        if name not in self.stored:
            return  # the loader misses it, or a variant does without
        rows = self.entry(name).shape[:1]
        if rows and rule.max_side > math.isqrt(*rows) * token:
            raise ConfigError(
                f"{self.path}: pictures are resized to {rule.max_side} pixels, and {name} covers "
                f"{math.isqrt(*rows) * token}; give lower limits in resize_config.json"
            )

    @property
    def max_side(self) -> int:
        """Longest side in pixels of a picture that its table of latent positions covers."""
        return math.isqrt(self.entry(LATENT_POSITIONS).shape[0]) * self.config.token_pixels

    def entry(self, name: str) -> TensorEntry:
        """The header entry of a stored tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self.located(name).entry

    def tensor(self, name: str) -> torch.Tensor:
        """A read-only view of a stored tensor in its stored dtype; clone it to keep it."""
        return self.located(name).file.tensor(name)

    def raw(self, name: str) -> memoryview:
        """A stored tensor's bytes, not copied."""
        return self.located(name).file.raw(name)

    def located(self, name: str) -> StoredTensor:
        """A stored tensor's file and header entry.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self.stored[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; download the folder again") from None


def _by_name(files: Iterable[SafetensorsFile]) -> Mapping[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, entry in file.entries.items():
            if name in stored:
                raise CheckpointError(
                    f"{file.path.parent}: tensor {name} is in {stored[name].file.path.name} and in {file.path.name}; "
                    "remove the file that does not belong"
                )
            stored[name] = StoredTensor(file, entry)
    return stored


def _published_format(folder: Path) -> str:
    config = folder / "config.json"
    if config.exists() and "dfloat11_config" in read_json(config):
        return "dfloat11"
    return "source"


def _model_files(folder: Path) -> list[Path]:
    """The files that hold all but the VAE: one file, shards with an index, or loose shards."""
    if (folder / MODEL_FILE).exists():
        return [folder / MODEL_FILE]
    for index in INDEX_FILES:
        if (folder / index).exists():
            return _indexed(folder, folder / index)
    loose = sorted(p for p in folder.glob("*.safetensors") if p.name != VAE_FILE)
    if loose:
        return loose
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(
            f"{folder}: holds {pickles[0]}, a pickle, which is never loaded (it can run code); "
            "use the safetensors files of the published checkpoint"
        )
    raise CheckpointError(f"{folder}: {MODEL_FILE} is missing; is this a BAGEL checkpoint folder?")


def _indexed(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map; download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.isprintable() or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names the file {name!r}, which is not a shard beside it")
    return [folder / name for name in names if name != VAE_FILE]

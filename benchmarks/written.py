"""Random weights on disk in a format's own layout, so that they are opened and read as a user's folder is."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from lowmem_bagel import __version__
from lowmem_bagel.checkpoint.config import BagelConfig
from lowmem_bagel.checkpoint.folder import VAE_FILE, ModelFolder
from lowmem_bagel.checkpoint.manifest import EXPERTS, MANIFEST_NAME, Manifest, StoredFile, TensorRecord, source_digest
from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.demo_checkpoint import FOLDER as TOKENIZER_FOLDER

from .demo.layout import write_configs
from .demo.tokens import special_ids
from .shapes import shape_named
from .synthetic import TOKENIZER_FILES, synthetic_folder, write_checkpoint

NO_HASH = "0" * 64
"""Stands for hashes: taking those of random gigabytes would take longer than writing them, and loading reads none."""


def write_folder(format: str, shape: str, out: Path, device: str) -> Path:
    """Write random weights of a shape to `out`, which must not exist; the folder opens and loads, `verify` refuses it.

    Raises:
        SettingError, CheckpointError: as of `synthetic_folder`.
    """
    config = shape_named(shape)
    if format == "source":
        write_checkpoint(config, out, device)
        return out
    made = synthetic_folder(format, shape, device)
    out.mkdir(parents=True)
    _write_companions(config, out)
    shards = {name: _write_shard(made, out / name, names) for name, names in _shards(made)}
    if made.manifest is None:  # published DFloat11 says what it is in its configuration
        told = json.loads((out / "config.json").read_text()) | json.loads((made.path / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(told))
        shutil.rmtree(made.path)
    else:
        (out / MANIFEST_NAME).write_bytes(_manifest(made, shards).to_json())
    return out


def _write_companions(config: BagelConfig, out: Path) -> None:
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER_FOLDER / name, out / name)
    write_configs(config, out, special_ids(Tokenizer.from_file(str(out / "tokenizer.json"))))


def _shards(folder: ModelFolder) -> Iterator[tuple[str, list[str]]]:
    """A shard a layer, and the stored tensors in it."""
    table = tensor_table(folder.config)

    def place(name: str) -> tuple[bool, int]:
        return name in table and table[name].part == "vae", _layer(name)

    for (vae, layer), names in itertools.groupby(sorted(folder.stored, key=place), place):
        yield VAE_FILE if vae else f"model-{layer + 1:05}.safetensors", list(names)


def _layer(name: str) -> int:
    """The decoder layer of a stored tensor, -1 for what is of none."""
    head, _, rest = name.partition("language_model.model.layers.")
    return int(rest.partition(".")[0]) if not head and rest else -1


def _write_shard(folder: ModelFolder, path: Path, names: list[str]) -> StoredFile:
    from safetensors.torch import save_file  # of the extra `benchmarks`

    save_file({name: folder.tensor(name).cpu().clone() for name in names}, path)
    return StoredFile(path.name, path.stat().st_size, NO_HASH)


def _manifest(folder: ModelFolder, shards: dict[str, StoredFile]) -> Manifest:
    assert folder.manifest is not None
    where = {name: shard for shard, names in _shards(folder) for name in names}
    table = tensor_table(folder.config)
    records = [
        TensorRecord(
            name=name,
            encoding=record.encoding,
            dtype="F32" if table[name].part == "vae" else "BF16",
            shape=record.shape,
            file=where[record.stored[0]],
            stored=record.stored,
            bytes=sum(folder.entry(part).nbytes for part in record.stored),
            sha256=NO_HASH,
            source_sha256=NO_HASH,
        )
        for name, record in folder.manifest.tensors.items()
    ]
    return Manifest(
        format=folder.format,
        format_version=1,
        tool_version=__version__,
        experts=EXPERTS,
        options={},
        source="random",
        source_sha256=source_digest(records),
        shards=shards,
        files={},
        tensors={record.name: record for record in records},
    )

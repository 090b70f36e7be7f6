"""The small files beside the shards: configs and tokenizer taken over, the index of the shards written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowmem_bagel.checkpoint.folder import VAE_FILE
from lowmem_bagel.checkpoint.manifest import StoredFile, TensorRecord

from .fsio import write_file
from .source import SourceCheckpoint

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"


def write_companions(
    checkpoint: SourceCheckpoint, folder: Path, config_entries: Mapping[str, Any], records: Iterable[TensorRecord]
) -> dict[str, StoredFile]:
    """Write every file that a complete folder has beside shards and manifest; returns them by name."""
    contents = dict(checkpoint.copied)
    if config_entries:
        # It was read when the checkpoint was opened, so it is JSON.
        contents[CONFIG_NAME] = _json(
            {**json.loads(contents.get(CONFIG_NAME, b"{}").decode("utf-8-sig")), **config_entries}
        )
    contents[INDEX_NAME] = _json(_index(records))
    for name, data in contents.items():
        write_file(folder / name, data)
    return {
        name: StoredFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(contents.items())
    }


def _index(records: Iterable[TensorRecord]) -> dict[str, Any]:
    """The index that Hugging Face's libraries read; `ae.safetensors` is not part of it, as in the source."""
    kept = [record for record in records if record.file != VAE_FILE]
    weight_map = {name: record.file for record in kept for name in record.stored}
    return {"metadata": {"total_size": sum(record.bytes for record in kept)}, "weight_map": weight_map}


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()

"""The small files of a model, configurations and tokenizer: in its folder, or held inside its file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import MAX_JSON_BYTES, parse_json, read_file
from .config import read_json
from .gguf_file import HELD


@dataclass(frozen=True)
class SmallFiles:
    """`held`: the texts inside the weights by the name of the file, which count more than what lies beside them."""

    folder: Path
    held: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, metadata: Mapping[str, str]) -> SmallFiles:
        """Of a folder, and of what the metadata of its weights holds."""
        return cls(folder, {key.removeprefix(HELD): text for key, text in metadata.items() if key.startswith(HELD)})

    def has(self, name: str) -> bool:
        return name in self.held or (self.folder / name).exists()

    def where(self, name: str) -> Path:
        """What messages call a file."""
        return self.folder / (f"{HELD}{name} of the weights" if name in self.held else name)

    def data(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """A file's bytes; OSError as of `read_file`."""
        if name in self.held:
            return self.held[name].encode()
        return read_file(self.folder / name, limit)

    def json(self, name: str) -> dict[str, Any]:
        """A file's JSON object.

        Raises:
            CheckpointError: as `read_json`.
        """
        if not self.has(name):
            raise CheckpointError(
                f"{self.folder}: {name} is missing; is this a BAGEL checkpoint folder? What it lacks is taken from the "
                "checkpoint that it was made from with --base FOLDER"
            )
        if name not in self.held:
            return read_json(self.folder / name)
        try:
            values = parse_json(self.held[name].encode())
        except ValueError as error:
            raise CheckpointError(f"{self.where(name)}: not readable JSON ({error}); get the file anew") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.where(name)}: holds {type(values).__name__}, not a JSON object")
        return values

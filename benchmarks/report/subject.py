"""What a report is of: random weights of a shape, or folders, of which missing variants are converted. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.manifest import MANIFEST_NAME
from lowmem_bagel.demo_checkpoint import FOLDER as DEMO
from lowmem_bagel.errors import SettingError
from lowmem_bagel.files import expanded
from lowmem_bagel.formats.registry import formats as known_variants

from ..shapes import shape_named
from .child import Child
from .matrix import FORMATS, known_formats, names

CONVERSION_SECONDS = 24 * 3600.0
VARIANTS = "variants"
"""The folder beside the record that converted variants go to."""


@dataclass(frozen=True)
class Subject:
    """shape: of random weights, empty of folders. folders: by the name that rows have for them, the source first.
    converted: formats to be made of the source. size: pixels of the largest picture that it draws."""

    shape: str
    formats: tuple[str, ...]
    size: int
    folders: dict[str, Path] = field(default_factory=dict)
    converted: tuple[str, ...] = ()

    @property
    def models(self) -> dict[str, Any]:
        """What tells each model apart from another of its name, for the record."""
        if self.shape:
            return {name: {"random": self.shape} for name in self.formats}
        return {name: _state(path) for name, path in self.folders.items()}

    def convert(self, child: Child, place: Path) -> None:
        """Make the variants that are wanted, in the folder of the record; those that are there stay."""
        for name in self.converted:
            out = place / VARIANTS / name
            if not (out / MANIFEST_NAME).exists():
                out.parent.mkdir(exist_ok=True)
                child.ask("convert", CONVERSION_SECONDS, source=str(self.folders["source"]), out=str(out), format=name)
            self.folders[name] = out


def subject(folders: Sequence[Path], shape: str | None, formats: str | None, size: int) -> Subject:
    """What the options of a report mean.

    Raises:
        SettingError: both a shape and folders, or an unknown variant.
        CheckpointError: a folder is no model.
    """
    if shape is None:
        return _of_folders(folders or (DEMO,), formats, size)
    if folders:
        raise SettingError("give folders or --shape, not both")
    config = shape_named(shape)
    chosen = FORMATS if formats is None else names(formats, known_formats(), "variant")
    return Subject(shape, tuple(chosen), min(size, config.vae_resize.max_side))


def _of_folders(folders: Sequence[Path], formats: str | None, size: int) -> Subject:
    found: dict[str, Path] = {}
    longest = size
    for path in map(expanded, folders):
        folder = ModelFolder.open(path)
        name = folder.format if folder.format not in found else f"{folder.format}@{_word(path)}"
        if name in found:
            raise SettingError(f"{found[name]} and {path} have one name and format; name one of them")
        found[name] = path.absolute()
        longest = min(longest, folder.config.vae_resize.max_side)
    converters = {point.name for point in entry_points(group="lowmem_bagel.converters")}
    convertible = [name for name in known_variants() if "source" in found and name in converters - {*found}]
    chosen = tuple(found) if formats is None else names(formats, (*found, *convertible), "variant")
    converted = tuple(name for name in chosen if name not in found)
    kept = {name: path for name, path in found.items() if name in chosen or name == "source"}
    return Subject("", chosen, longest, kept, converted)


def _word(path: Path) -> str:
    """A folder's name as part of a row's text, which has colons and blanks of its own."""
    return "".join("-" if letter in ": \t\n" else letter for letter in path.absolute().name)


def _state(path: Path) -> dict[str, Any]:
    files = sorted(ModelFolder.open(path).files, key=lambda file: file.path)
    about = [file.path.stat() for file in files]
    return {
        "path": str(path),
        "bytes": sum(info.st_size for info in about),
        "modified": max((info.st_mtime for info in about), default=0.0),
    }

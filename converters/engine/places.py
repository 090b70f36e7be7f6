"""Where a conversion's result is to appear, and what can be known of that place before anything is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lowmem_bagel.checkpoint.manifest import MANIFEST_NAME
from lowmem_bagel.checkpoint.tensors import TensorSpec
from lowmem_bagel.errors import ConversionError

from .base import Converter
from .shards import Shard
from .source import SourceCheckpoint

SPACE_MARGIN = 64 << 20


def partial_of(out: Path) -> Path:
    """The folder in which a conversion works until its result is complete."""
    return out.with_name(out.name + ".partial")


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a place where something is in the way, or that cannot be written to.

    Raises:
        ConversionError
    """
    if not out.exists():
        _check_writable(_standing(out))
        return
    if not overwrite:
        raise ConversionError(f"{out}: exists; choose another folder or replace it with --overwrite")
    # --overwrite must not be able to remove somebody's folder that was never a variant.
    if not (out.is_dir() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))):
        raise ConversionError(f"{out}: is not a variant folder, and --overwrite replaces only such")
    _check_writable(out.parent)


class SpaceCheck:
    """Whether what is to be written has room on the disk."""

    def __init__(self, checkpoint: SourceCheckpoint, converter: Converter, out: Path) -> None:
        self._checkpoint, self._converter, self._out = checkpoint, converter, out

    def check(self, shards: Iterable[Shard]) -> None:
        """Raises ConversionError where the disk is too full for these shards."""
        left = [spec for shard in shards for unit in shard.units for spec in unit.specs]
        copied = sum(map(len, self._checkpoint.copied.values()))
        need = SPACE_MARGIN + sum(map(self._estimate, left)) + copied
        free = shutil.disk_usage(_standing(self._out)).free
        if free < need:
            raise ConversionError(
                f"{self._out.parent}: {free / 1e9:.1f} GB free, and the conversion needs about "
                f"{need / 1e9:.1f} GB more; free some space and run the same command again"
            )

    def _estimate(self, spec: TensorSpec) -> int:
        if self._converter.encodes(spec):
            return self._converter.bytes_estimate(self._checkpoint.shape(spec))
        return self._checkpoint.nbytes(spec)


def _standing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in path.parents if parent.exists())


def _check_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise ConversionError(f"{folder}: is a file, and a folder is needed there; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConversionError(f"{folder}: cannot be written to; choose another folder for the result")

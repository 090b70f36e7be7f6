"""What a power cut leaves: nothing is named, noted or believed before it is on the disk, and nothing from a source that
changed.

A kill alone does not show a forgotten sync, since the system keeps what was written. So the calls are watched as a disk
would have them that forgets whatever was not synced.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lowmem_bagel.converters.engine import convert as engine
from lowmem_bagel.converters.engine.convert import Progress, convert
from lowmem_bagel.converters.engine.journal import JOURNAL_NAME, Journal
from support.conversion_helpers import CONVERTERS, SMALL_SHARDS, contents, copy_checkpoint
from support.paths import CHECKPOINT

from lowmem_bagel.errors import ConversionError

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks descriptors up in /proc")


class ForgetfulDisk:
    """Which files have on the disk what they have, and in which folders names are not there yet."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.synced: dict[str, tuple[int, int]] = {}
        self.names_waiting: set[str] = set()
        self.renamed = self.noted = 0
        self._fsync, self._replace, self._append, self._rmtree = os.fsync, os.replace, Journal.append, shutil.rmtree

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        path, info = os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor)
        if stat.S_ISDIR(info.st_mode):
            self.names_waiting.discard(path)
        else:
            self.synced[path] = info.st_size, info.st_mtime_ns

    def replace(self, old: Path, new: Path) -> None:
        """A name may only lead to what is on the disk whole."""
        if not Path(new).is_relative_to(self.place):  # what is compiled is kept elsewhere, and may be lost
            self._replace(old, new)
            return
        files = [file for file in Path(old).rglob("*") if file.is_file()] if Path(old).is_dir() else [Path(old)]
        for file in files:
            self.assert_synced(file)
        assert str(old) not in self.names_waiting, f"{old}: its own names are not on the disk"
        self._replace(old, new)
        for file in files:
            moved = Path(new) / file.relative_to(old) if file != Path(old) else Path(new)
            self.synced[str(moved)] = self.synced[str(file)]
        self.names_waiting.add(str(Path(new).parent))
        self.renamed += 1

    def rmtree(self, folder: Path) -> None:
        """What explains the rest may only go when the rest is there."""
        assert not self.names_waiting, f"{folder} removed before these names are on the disk: {self.names_waiting}"
        self._rmtree(folder)

    def append(self, journal: Journal, line: dict[str, Any]) -> None:
        """A note may only speak of names that are on the disk, and is there itself before anything else happens."""
        assert not self.names_waiting, f"noted before these names are on the disk: {self.names_waiting}"
        self._append(journal, line)
        self.assert_synced(journal.path)
        self.noted += 1

    def assert_synced(self, file: Path) -> None:
        info = file.stat()
        assert self.synced.get(str(file)) == (info.st_size, info.st_mtime_ns), f"{file} is not on the disk"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ForgetfulDisk:
    watched = ForgetfulDisk(tmp_path)
    monkeypatch.setattr(os, "fsync", watched.fsync)
    monkeypatch.setattr(os, "replace", watched.replace)
    monkeypatch.setattr(shutil, "rmtree", watched.rmtree)
    monkeypatch.setattr(Journal, "append", lambda journal, line: watched.append(journal, line))
    return watched


def run(source: Path, out: Path, **settings: Any) -> None:
    convert(source, out, CONVERTERS["int8"](), shard_bytes=SMALL_SHARDS, **settings)


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_believed_before_it_is_on_the_disk(tmp_path: Path, disk: ForgetfulDisk, overwrite: bool) -> None:
    if overwrite:
        run(CHECKPOINT, tmp_path / "out")
    run(CHECKPOINT, tmp_path / "out", overwrite=overwrite)
    assert not disk.names_waiting
    assert disk.renamed > 20
    assert disk.noted > 10


def test_a_resumed_conversion_too(tmp_path: Path, disk: ForgetfulDisk) -> None:
    def stop(progress: Progress) -> None:
        if progress.now.startswith("model-00004"):
            raise ConversionError("stopped")

    with pytest.raises(ConversionError, match="stopped"):
        run(CHECKPOINT, tmp_path / "out", report=stop)
    run(CHECKPOINT, tmp_path / "out")
    assert not disk.names_waiting


# --- the source


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    return copy_checkpoint(tmp_path / "source")


def changes_once(path: Path, data: bytes, when: str) -> Callable[[Progress], None]:
    """Replaces a file of the source while something is worked on."""

    def report(progress: Progress) -> None:
        if when in progress.now and path.read_bytes() != data:
            path.write_bytes(data)

    return report


def test_no_shard_of_a_changed_source_is_ever_noted(tmp_path: Path, source: Path) -> None:
    """Not even where the source becomes again what it was: then the unfinished work would be believed."""
    path = source / "ema.safetensors"
    original, times = path.read_bytes(), path.stat()
    changed = original[: len(original) // 2] + bytes(len(original) - len(original) // 2)
    # While it is being replaced it is shorter, which the thread that reads ahead may meet first.
    with pytest.raises(ConversionError, match=r"changed while it was converted|became shorter"):
        run(source, tmp_path / "out", report=changes_once(path, changed, "layers.0."))
    path.write_bytes(original)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    run(source, tmp_path / "out")
    run(source, tmp_path / "reference")
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_small_files_that_change_are_seen_too(tmp_path: Path, source: Path) -> None:
    """They are taken over at the end, after the last shard."""
    path = source / "tokenizer_config.json"
    path.write_text("{}")
    with pytest.raises(ConversionError, match=r"tokenizer_config.json: changed while it was converted"):
        run(source, tmp_path / "out", report=changes_once(path, b'{"a": 1}', "finishing"))
    assert not (tmp_path / "out").exists()


def test_work_of_another_version_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version may write other bytes for the same settings."""

    def stop(progress: Progress) -> None:
        if progress.now.startswith("model-00003"):
            raise ConversionError("stopped")

    with pytest.raises(ConversionError, match="stopped"):
        run(CHECKPOINT, tmp_path / "out", report=stop)
    monkeypatch.setattr(engine, "version", lambda name: "0.0.1")
    with pytest.raises(ConversionError, match=r"another conversion .*different tool_version"):
        run(CHECKPOINT, tmp_path / "out")
    run(CHECKPOINT, tmp_path / "out", restart=True)
    assert json.loads((tmp_path / "out" / "variant.json").read_text())["tool_version"] == "0.0.1"
    assert not (tmp_path / "out.partial" / JOURNAL_NAME).exists()

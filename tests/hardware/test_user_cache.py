"""What is kept in the user's cache folder is whole or not there, and nothing fails without it."""

from __future__ import annotations

import json
import os
from multiprocessing import get_context
from pathlib import Path

import pytest

from lowmem_bagel.hardware import user_cache
from lowmem_bagel.hardware.user_cache import cache_folder, keep, kept

HOME = str(Path.home())


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({}, "linux", f"{HOME}/.cache/lowmem-bagel"),
        ({"XDG_CACHE_HOME": "/elsewhere"}, "linux", "/elsewhere/lowmem-bagel"),
        ({"XDG_CACHE_HOME": "relative"}, "linux", f"{HOME}/.cache/lowmem-bagel"),
        ({"LOCALAPPDATA": "/app data"}, "linux", f"{HOME}/.cache/lowmem-bagel"),
        ({"LOCALAPPDATA": "/app data", "XDG_CACHE_HOME": "/elsewhere"}, "win32", "/app data/lowmem-bagel"),
        ({}, "win32", f"{HOME}/AppData/Local/lowmem-bagel"),
    ],
)
def test_the_folder_of_each_system(environment: dict[str, str], platform: str, expected: str) -> None:
    assert cache_folder(environment, platform) == Path(expected)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="Could not determine home directory"):
        cache_folder({}, "linux")


def test_what_is_kept_is_found_again_and_nothing_else_lies_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "name.json"
    assert kept(path) is None
    for value in ({"a": [1, 2.5]}, {"b": "ü"}):
        keep(path, value)
        assert kept(path) == value
    assert [entry.name for entry in path.parent.iterdir()] == ["name.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1}}', b"\x00" * 100])
def test_a_damaged_file_is_none_and_is_made_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "name.json"
    path.write_bytes(content)
    assert kept(path) is None
    keep(path, 1)
    assert kept(path) == 1


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "name.json"
    keep(path, "old")

    def fails(*_: object) -> None:
        raise OSError("no space left")

    with pytest.raises(TypeError):
        keep(path, object())
    monkeypatch.setattr(user_cache.os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        keep(path, "new")
    assert kept(path) == "old"
    assert os.listdir(tmp_path) == ["name.json"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        keep(tmp_path / "file" / "name.json", 1)


def write_many(path: Path, who: int) -> None:
    for _ in range(100):
        keep(path, [who] * 1000)


def test_two_processes_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    path, context = tmp_path / "name.json", get_context("spawn")
    keep(path, [0] * 1000)
    writers = [context.Process(target=write_many, args=(path, who)) for who in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        value = json.loads(path.read_text())
        assert len(value) == 1000
        assert len(set(value)) == 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["name.json"]

"""The folder of a batch: nothing half-written, whatever ends the writing; and one run at a time."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.batch import leftovers, results
from support.pictures import file_size_limit

from lowmem_bagel.batch.folder import PARTIAL, BatchFolder, opened_folder
from lowmem_bagel.batch.results import Result
from lowmem_bagel.errors import OutputError


def result(id: str, **about: Any) -> Result:
    return Result(
        **{"id": id, "line": 1, "state": "done", "digest": "d", "model": "m", "files": (f"{id}.png",), **about}
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """With one result."""
    with opened_folder(tmp_path / "out") as folder:
        folder.keep(result("a"), b"picture a")
    return tmp_path / "out"


def test_what_is_kept_is_there_again(out: Path) -> None:
    with opened_folder(out) as folder:
        assert folder.results == {"a": result("a")}
        folder.keep(result("b", state="failed", why="no", files=(), notes=("n",), traceback="t", settings={"seed": 1}))
    with opened_folder(out) as folder:
        assert [*folder.results] == ["a", "b"]
        assert folder.results["b"].why == "no" and folder.results["b"].settings == {"seed": 1}
    assert (out / "a.png").read_bytes() == b"picture a"
    assert not leftovers(out)


def test_forgotten_results_are_gone_and_the_others_stay(out: Path) -> None:
    with opened_folder(out) as folder:
        folder.keep(result("b"), b"b")
        folder.forget({"a"})
        folder.keep(result("c"), b"c")
        folder.keep(result("a"), b"new")
    assert [*results(out)] == ["b", "c", "a"]
    assert (out / "a.png").read_bytes() == b"new"


def test_a_torn_line_is_cut_wherever_it_is_torn(out: Path) -> None:
    whole = (out / "results.jsonl").read_bytes()
    line = result("b").to_json()
    for length in range(1, len(line)):
        (out / "results.jsonl").write_bytes(whole + line[:length])
        with opened_folder(out) as folder:
            assert [*folder.results] == ["a"]
        assert (out / "results.jsonl").read_bytes() == whole
    (out / "results.jsonl").write_bytes(whole + bytes(99))  # after a power failure
    with opened_folder(out) as folder:
        folder.keep(result("b"), b"b")
    assert [*results(out)] == ["a", "b"]


@pytest.mark.parametrize(
    "foreign",
    [b"{}", b"{}\n", b"id,name", b'{"id": "a", "state": "done"}\n', b"\xff\n", b'{"id": 1, "state": "done"}\n'],
)
def test_results_of_others_are_refused_and_stay(out: Path, foreign: bytes) -> None:
    for content in (foreign, (out / "results.jsonl").read_bytes() + foreign):
        (out / "results.jsonl").write_bytes(content)
        with pytest.raises(OutputError, match="is no result of a batch"), opened_folder(out):
            pass
        assert (out / "results.jsonl").read_bytes() == content


def test_two_lines_of_one_job_are_refused(out: Path) -> None:
    (out / "results.jsonl").write_bytes(2 * result("a").to_json())
    with pytest.raises(OutputError, match="another line is of the same job"), opened_folder(out):
        pass


def test_what_a_kill_left_is_removed_and_nothing_else(out: Path) -> None:
    (out / PARTIAL.format("ab")).write_bytes(b"half")
    (out / "mine.txt").write_text("mine")
    with opened_folder(out):
        pass
    assert leftovers(out) == {"mine.txt"}


def test_one_run_at_a_time(out: Path) -> None:
    with opened_folder(out), pytest.raises(OutputError, match="another run writes there"), opened_folder(out):
        pass
    with opened_folder(out):
        pass


def test_a_folder_that_nothing_was_written_to_is_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), opened_folder(tmp_path / "new" / "out"):
        raise RuntimeError
    assert not [*tmp_path.iterdir()]
    (tmp_path / "there").mkdir()
    with opened_folder(tmp_path / "there"):
        pass
    assert not [*(tmp_path / "there").iterdir()]


def test_a_place_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match="choose another folder"), opened_folder(path):
            pass


class Disk:
    """Full from the given call of a function of `os` on; `partly`, that write takes half, and the next refuses."""

    def __init__(self, real: Callable[..., Any], full_from: int, partly: bool) -> None:
        self.real, self.full_from, self.partly = real, full_from, partly

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.full_from -= 1
        if self.full_from == -1 and self.partly:
            return self.real(args[0], args[1][: len(args[1]) // 2])
        if self.full_from < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "partly", "calls"),
    [("write", False, 1), ("write", True, 1), ("fsync", False, 3), ("replace", False, 1), ("open", False, 2)],
)
def test_a_full_disk_at_every_step(
    out: Path, monkeypatch: pytest.MonkeyPatch, name: str, partly: bool, calls: int
) -> None:
    """At each in turn: one line, the results as they were before, and the same run goes on once there is room."""
    before, real = (out / "results.jsonl").read_bytes(), getattr(os, name)
    for step in range(calls):
        with opened_folder(out) as folder, monkeypatch.context() as patch:
            patch.setattr(os, name, Disk(real, step, partly))
            with pytest.raises(OutputError, match="is full; free some space, and the same command goes on from here"):
                folder.keep(result("b"), b"picture b")
        assert (out / "results.jsonl").read_bytes() == before
        assert leftovers(out) <= {"b.png"}
        assert not (out / "b.png").exists() or (out / "b.png").read_bytes() == b"picture b"
    with opened_folder(out) as folder, monkeypatch.context() as patch:
        patch.setattr(os, name, Disk(real, calls + partly, False))
        folder.keep(result("b"), b"picture b")
    assert [*results(out)] == ["a", "b"]


def killed_before(step: int, change: Callable[[], None]) -> bool:
    """Make a change in a process of its own, which kills itself before the given write, sync, rename or truncation.

    False where there are fewer of them.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    left = step

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args)

        return counting

    for name in ("write", "fsync", "replace", "ftruncate", "truncate"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        change()
    finally:
        os._exit(0)


@pytest.mark.parametrize("first", [True, False])
def test_a_kill_before_every_step_leaves_the_results_of_before_or_after(tmp_path: Path, first: bool) -> None:
    """Of a job that is kept, the first in its folder or not."""
    for step in range(20):
        out = tmp_path / str(step)
        with opened_folder(out) as folder:
            if not first:
                folder.keep(result("a"), b"a")

            def change(folder: BatchFolder = folder) -> None:
                folder.keep(result("b"), b"picture b")

            killed = killed_before(step, change)
        with opened_folder(out) as folder:
            assert [*folder.results] in ([*"ab"[first:]], [*"a"[first:]])
            assert leftovers(out) <= {"b.png"}
            if "b" not in folder.results:
                folder.keep(result("b"), b"picture b")
        assert [*results(out)] == [*"ab"[first:]] and (out / "b.png").read_bytes() == b"picture b"
        if not killed:
            assert (
                step == 5 + first
            )  # picture: sync, rename, sync of the folder; line: write, sync, and once the folder's
            return
    raise AssertionError


def test_a_kill_before_every_step_of_forgetting(tmp_path: Path) -> None:
    for step in range(20):
        out = tmp_path / str(step)
        with opened_folder(out) as folder:
            for id in "abc":
                folder.keep(result(id), id.encode())

            def change(folder: BatchFolder = folder) -> None:
                folder.forget({"b"})

            killed = killed_before(step, change)
        with opened_folder(out) as folder:
            assert [*folder.results] in (["a", "b", "c"], ["a", "c"])
        assert not leftovers(out) - {"b.png"}
        if not killed:
            assert step == 3
            return
    raise AssertionError


def test_a_disk_that_takes_half_a_line(out: Path) -> None:
    """By the system's own limit."""
    before = (out / "results.jsonl").read_bytes()
    with opened_folder(out) as folder:
        with file_size_limit(len(before) + 20), pytest.raises(OutputError, match="the disk is full"):
            folder.keep(result("b"), b"b")
        assert (out / "results.jsonl").read_bytes() == before
        folder.keep(result("b"), b"b")
    assert [*results(out)] == ["a", "b"]


def test_a_picture_that_does_not_fit_leaves_nothing(out: Path) -> None:
    with opened_folder(out) as folder:
        with file_size_limit(1000), pytest.raises(OutputError, match="the disk is full"):
            folder.keep(result("b"), bytes(2000))
        assert not leftovers(out) and [*results(out)] == ["a"]


def test_an_unreadable_folder_is_said(out: Path) -> None:
    (out / "results.jsonl").unlink()
    (out / "results.jsonl").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        BatchFolder(out)

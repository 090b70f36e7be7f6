"""Conversions that are killed, run out of disk, or lose their source: nothing is lost, and the same command ends with
the bytes of an uninterrupted run."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lowmem_bagel.converters.engine.convert import Progress
from support.conversion_helpers import contents, copy_checkpoint
from support.killed_conversions import Children, run
from support.paths import CHECKPOINT

from lowmem_bagel.checkpoint.manifest import MANIFEST_NAME, read_manifest
from lowmem_bagel.errors import CheckpointError, ConversionError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")

KILLS = 20
UNDERSTANDING: dict[str, Any] = {"experts": ("und",), "shard_bytes": 128 << 10}
"""As many shards as of the whole checkpoint, of a quarter of its tensors: each has its steps on disk all the same."""


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory, where there is a disk in memory: a process that is killed leaves the same there, and thousands of
    syncs need not wait for a disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 1 << 30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def children() -> Children:
    return Children()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of an uninterrupted conversion."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(CHECKPOINT, out)
    return dict(contents(out))


@pytest.fixture(scope="module")
def understanding(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same of UNDERSTANDING."""
    out = tmp_path_factory.mktemp("understanding") / "out"
    run(CHECKPOINT, out, **UNDERSTANDING)
    return dict(contents(out))


def assert_whole(out: Path, reference: dict[str, bytes]) -> None:
    assert contents(out) == reference
    assert {p.name for p in out.parent.iterdir()} == {out.name}, "nothing may be left over"


def test_killed_at_random_moments(tmp_path: Path, children: Children, understanding: dict[str, bytes]) -> None:
    children.whole(CHECKPOINT, tmp_path / "warm" / "out", **UNDERSTANDING)
    seconds, _ = children.whole(CHECKPOINT, tmp_path / "timed" / "out", **UNDERSTANDING)
    killed = resumed = tried = 0
    while killed < KILLS:
        # Later ones more often: only then is there something that must not be done again.
        out, moment = tmp_path / str(tried) / "out", seconds * random.random() ** 0.5
        in_time = children.killed_after(moment, CHECKPOINT, out, **UNDERSTANDING)
        killed += in_time
        tried += 1
        assert tried < 5 * KILLS, "they end too soon to be killed"
        seconds *= 1.05 if in_time else 0.7  # other tests keep the processor busy at times
        if out.exists():
            assert contents(out) == understanding, f"OUT existed before it was whole, killed after {moment:.4f} s"
            continue
        journal = out.parent / "out.partial" / "journal.jsonl"
        lines = journal.read_bytes().count(b'"shard"') if journal.exists() else 0
        seen: list[Progress] = []
        run(CHECKPOINT, out, report=seen.append, **UNDERSTANDING)
        resumed += seen[0].done > 0
        assert lines <= 1 or seen[0].done > 0, "what was done must not be done again"
        assert_whole(out, understanding)
    assert resumed


def test_killed_again_and_again(tmp_path: Path, children: Children, reference: dict[str, bytes]) -> None:
    """One conversion that is killed every few steps still ends."""
    out = tmp_path / "out"
    for _ in range(4):
        children.killed_at(20, CHECKPOINT, out)
        assert not out.exists()
    run(CHECKPOINT, out)
    assert_whole(out, reference)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_before_every_durable_step(tmp_path: Path, children: Children, overwrite: bool) -> None:
    """With shards so large that there are few steps: every one of them, publication and cleaning included. Where no old
    folder is replaced, only the last ones differ."""
    settings: dict[str, Any] = {"shard_bytes": 1 << 30, "experts": ("und",), "overwrite": overwrite}
    new = tmp_path / "new" / "out"
    run(CHECKPOINT, new, **{**settings, "overwrite": False})
    reference = dict(contents(new))

    def fresh(name: str) -> tuple[Path, dict[str, bytes]]:
        out = tmp_path / name / "out"
        if not overwrite:
            return out, {}
        out.mkdir(parents=True)
        (out / MANIFEST_NAME).write_text("an old variant")
        return out, dict(contents(out))

    _, steps = children.whole(CHECKPOINT, fresh("count")[0], **settings)
    assert steps > 30
    for step in range(0 if overwrite else steps - 12, steps):
        out, old = fresh(str(step))
        children.killed_at(step, CHECKPOINT, out, **settings)
        if out.exists():
            assert contents(out) in (old, reference), step
        elif overwrite:
            assert contents(out.parent / "out.partial" / "replaced") == old, step
        if not out.exists() or contents(out) == old or (out.parent / "out.partial" / "journal.jsonl").exists():
            run(CHECKPOINT, out, **settings)
        elif (out.parent / "out.partial").exists():  # killed while the last empty folder was being removed
            with pytest.raises(ConversionError, match="exists"):
                run(CHECKPOINT, out, **{**settings, "overwrite": False})
        assert_whole(out, reference)


def test_one_file_killed_before_durable_steps(tmp_path: Path, children: Children) -> None:
    """Where shards are ranges of one file: at first, in the middle, and before every one of the last steps."""
    settings: dict[str, Any] = {"name": "gguf-q8_0", **UNDERSTANDING}
    run(CHECKPOINT, tmp_path / "new" / "out", **settings)
    reference = dict(contents(tmp_path / "new" / "out"))
    _, steps = children.whole(CHECKPOINT, tmp_path / "count" / "out", **settings)
    for step in (0, 3, 4, 5, steps // 2, *range(steps - 10, steps)):
        out = tmp_path / str(step) / "out"
        children.killed_at(step, CHECKPOINT, out, **settings)
        if not out.exists() or (out.parent / "out.partial" / "journal.jsonl").exists():
            seen: list[Progress] = []
            run(CHECKPOINT, out, report=seen.append, **settings)
            assert seen == [] or seen[0].done > 0 or step < steps // 2, "what was done must not be done again"
        elif (out.parent / "out.partial").exists():
            (out.parent / "out.partial").rmdir()
        assert_whole(out, reference)


def test_a_damaged_range_of_one_file_is_made_again(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    run(CHECKPOINT, other, "gguf-q8_0", **UNDERSTANDING)
    shards: set[str] = set()

    def stop(progress: Progress) -> None:
        shards.add(progress.now)
        if progress.done > progress.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(CHECKPOINT, out, "gguf-q8_0", report=stop, **UNDERSTANDING)
    (file,) = (tmp_path / "out.partial" / "variant").glob("*.gguf")
    assert file.read_bytes()[:4] == bytes(4), "what is not whole must not look it"
    with file.open("r+b") as damaged:
        damaged.seek(file.stat().st_size // 4)
        damaged.write(b"\xff" * 100)
    run(CHECKPOINT, out, "gguf-q8_0", **UNDERSTANDING)
    assert contents(out) == contents(other)


# Work that is no longer valid --------------------------------------------------------------------------------------


def interrupted(source: Path, out: Path, after: int = 5, **settings: Any) -> None:
    """A conversion stopped after some shards."""
    shards: set[str] = set()

    def stop(progress: Progress) -> None:
        if progress.now.endswith(".safetensors"):
            shards.add(progress.now)
        if len(shards) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, report=stop, **settings)
    assert not out.exists()


def refused(source: Path, out: Path, **settings: Any) -> str:
    with pytest.raises((ConversionError, CheckpointError)) as caught:
        run(source, out, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    return copy_checkpoint(tmp_path / "source" / "checkpoint")


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors", "tokenizer.json"])
def test_source_changed_between(
    tmp_path: Path, source: Path, file: str, reference: dict[str, bytes], understanding: dict[str, bytes]
) -> None:
    out, settings = tmp_path / "result" / "out", {} if file == "ae.safetensors" else UNDERSTANDING
    interrupted(source, out, **settings)
    data = bytearray((source / file).read_bytes())
    data[-2] ^= 1
    (source / file).write_bytes(data)
    assert "source that changed" in refused(source, out, **settings)
    assert "source" in refused(source, out, overwrite=True, **settings)
    run(source, out, restart=True, **settings)
    made, unchanged = contents(out), understanding if settings else reference
    assert made.keys() == unchanged.keys()
    assert made != unchanged
    assert not (tmp_path / "result" / "out.partial").exists()


@pytest.mark.parametrize(
    "other", [{"name": "fp16"}, {"name": "int8 rotated"}, {"experts": ("und", "gen")}, {"shard_bytes": 1 << 20}]
)
def test_other_settings_do_not_take_over_the_work(tmp_path: Path, other: dict[str, Any]) -> None:
    interrupted(CHECKPOINT, tmp_path / "out", **UNDERSTANDING)
    settings = {**UNDERSTANDING, **other}
    assert "another conversion" in refused(CHECKPOINT, tmp_path / "out", **settings)
    assert run(CHECKPOINT, tmp_path / "out", restart=True, **settings)


def test_source_replaced_while_it_is_read(tmp_path: Path, source: Path) -> None:
    def replace(progress: Progress) -> None:
        if "layers.1." in progress.now:
            other = source / "other"
            shutil.copyfile(source / "ema.safetensors", other)
            os.replace(other, source / "ema.safetensors")

    assert "changed while it was converted" in refused(source, tmp_path / "out", report=replace)
    assert not (tmp_path / "out").exists()


def test_source_shrinks_while_it_is_read(tmp_path: Path, source: Path) -> None:
    def shrink(progress: Progress) -> None:
        if "layers.1." in progress.now:
            os.truncate(source / "ema.safetensors", 1 << 20)

    message = refused(source, tmp_path / "out", report=shrink)
    assert "became shorter while tensor language_model" in message
    assert "truncated" in refused(source, tmp_path / "out")


def test_source_removed_while_it_is_read(tmp_path: Path, source: Path) -> None:
    def remove(progress: Progress) -> None:
        if "layers.1." in progress.now and (source / "ema.safetensors").exists():
            (source / "ema.safetensors").unlink()

    assert "gone while it was converted" in refused(source, tmp_path / "out", report=remove)


def test_damaged_work_is_done_again(tmp_path: Path, understanding: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    interrupted(CHECKPOINT, out, **UNDERSTANDING)
    variant = tmp_path / "out.partial" / "variant"
    first, second = sorted(variant.glob("model-*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    second.unlink()
    interrupted(CHECKPOINT, out, after=1, **UNDERSTANDING)
    run(CHECKPOINT, out, **UNDERSTANDING)
    assert_whole(out, understanding)


@pytest.mark.parametrize("tail", [b'{"shard": {"na', b"\0" * 100, b"[1]\n", b'{"shard": {}}\n', b"x\n"])
def test_damaged_journal(tmp_path: Path, tail: bytes, understanding: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    interrupted(CHECKPOINT, out, **UNDERSTANDING)
    with (tmp_path / "out.partial" / "journal.jsonl").open("ab") as journal:
        journal.write(tail)
    if tail.endswith(b"\n"):  # a line torn by a crash has no end; a whole one that is wrong is damage
        assert "--restart" in refused(CHECKPOINT, out, **UNDERSTANDING)
        run(CHECKPOINT, out, restart=True, **UNDERSTANDING)
    else:
        run(CHECKPOINT, out, **UNDERSTANDING)
    assert_whole(out, understanding)


def test_two_converters_at_once(tmp_path: Path, understanding: dict[str, bytes]) -> None:
    messages = []

    def second(progress: Progress) -> None:
        if progress.now.startswith("model-00003") and not messages:
            messages.append(refused(CHECKPOINT, tmp_path / "out", **UNDERSTANDING))
            messages.append(refused(CHECKPOINT, tmp_path / "out", restart=True, **UNDERSTANDING))

    run(CHECKPOINT, tmp_path / "out", report=second, **UNDERSTANDING)
    assert all("another conversion is working" in m for m in messages)
    assert len(messages) == 2
    assert_whole(tmp_path / "out", understanding)


# Disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_disk_full_at_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, understanding: dict[str, bytes]
) -> None:
    out, write = tmp_path / "out", os.write
    most = sum(map(len, understanding.values())) * 4 // 5
    room = random.randrange(1 << 18, most)

    def full(descriptor: int, data: Any) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(code, os.strerror(code))
        count = write(descriptor, data[:room])
        room -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        message = refused(CHECKPOINT, out, **UNDERSTANDING)
    assert ("the disk is full" if code != errno.EIO else os.strerror(code)) in message
    assert "same command" in message
    assert not out.exists()
    run(CHECKPOINT, out, **UNDERSTANDING)
    assert_whole(out, understanding)


def test_file_size_limit(tmp_path: Path, reference: dict[str, bytes]) -> None:
    """A limit that the kernel itself enforces: the first file that is too large (the VAE's) ends the conversion."""
    import resource

    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
    try:
        message = refused(CHECKPOINT, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the disk is full" in message
    done = (tmp_path / "out.partial" / "journal.jsonl").read_bytes().count(b'"shard"')
    assert done > 10
    run(CHECKPOINT, out)
    assert_whole(out, reference)


def test_a_disk_that_returns_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def flipped(descriptor: int, data: Any) -> int:
        return write(descriptor, bytes([data[0] ^ 1]) + bytes(data[1:]))

    monkeypatch.setattr(os, "write", flipped)
    assert "other bytes than were written" in refused(CHECKPOINT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_with_nan_loses_no_work(tmp_path: Path) -> None:
    name = "language_model.model.layers.2.mlp.down_proj.weight"
    source = copy_checkpoint(tmp_path / "source", lambda t: t[name].view(-1).__setitem__(3, float("nan")))
    assert name in refused(source, tmp_path / "out")
    lines = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    done = [json.loads(line)["shard"]["name"] for line in lines[1:]]
    assert len(done) > 5
    assert all((tmp_path / "out.partial" / "variant" / shard).exists() for shard in done)
    assert read_manifest(tmp_path / "out.partial" / "variant") is None

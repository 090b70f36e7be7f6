"""Files past the page cache: any place and length, where the system refuses, and what the disk gives back."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem_bagel.converters.engine.disk import PAGE_BYTES, DirectFile, page_aligned
from lowmem_bagel.converters.engine.finishing import MAX_UNFINISHED, PIECE_BYTES, Finishing, Pending
from lowmem_bagel.converters.engine.phases import untimed
from lowmem_bagel.converters.engine.room import SMALLEST_BYTES, Room
from safetensors.torch import load_file
from torch import Tensor

from lowmem_bagel.checkpoint.manifest import StoredFile, TensorRecord
from lowmem_bagel.errors import ConversionError

CONTENT = bytes(range(251)) * 300


@pytest.fixture(params=["direct", "refused when opened", "refused when used"])
def access(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a system makes of O_DIRECT."""
    direct = getattr(os, "O_DIRECT", 0)
    opened, reading, writing = os.open, getattr(os, "preadv", None), os.write
    if not direct or request.param == "direct":
        return

    def refused() -> OSError:
        return OSError(errno.EINVAL, "Invalid argument")

    def is_direct(descriptor: int) -> bool:
        import fcntl

        return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct)

    def open_(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & direct and request.param == "refused when opened":
            raise refused()
        return opened(path, flags, mode)

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        if is_direct(descriptor):
            raise refused()
        assert reading is not None
        return reading(descriptor, buffers, offset)

    def write(descriptor: int, data: Any) -> int:
        if is_direct(descriptor):
            raise refused()
        return writing(descriptor, data)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "write", write)


@pytest.mark.usefixtures("access")
@pytest.mark.parametrize("offset", [0, 1, PAGE_BYTES, 3 * PAGE_BYTES + 7, len(CONTENT) - 5, len(CONTENT), 10**9])
@pytest.mark.parametrize("length", [1, 100, PAGE_BYTES, 5 * PAGE_BYTES, len(CONTENT)])
def test_any_place_is_read(tmp_path: Path, offset: int, length: int) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    room = page_aligned(length).data
    with DirectFile(tmp_path / "file") as file:
        count = file.read_into(room, offset)
    assert bytes(room[:count]) == CONTENT[offset : offset + length]


@pytest.mark.usefixtures("access")
def test_any_length_is_written(tmp_path: Path) -> None:
    with DirectFile(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
        for length in (2 * PAGE_BYTES, PAGE_BYTES, 77, PAGE_BYTES, 1):
            room = page_aligned(length).data
            room[:] = CONTENT[:length]
            file.write(room)
        file.write(memoryview(CONTENT))
        file.sync()
    lengths = (2 * PAGE_BYTES, PAGE_BYTES, 77, PAGE_BYTES, 1, len(CONTENT))
    assert (tmp_path / "file").read_bytes() == b"".join(CONTENT[:length] for length in lengths)


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        DirectFile(tmp_path / "file", os.O_RDWR | os.O_CREAT) as file,
        pytest.raises(OSError, match="No space"),
    ):
        file.write(memoryview(b"x"))
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "nowhere")


def test_memory_serves_again_once_nobody_has_it() -> None:
    room = Room()
    first = room.empty((SMALLEST_BYTES, 2), torch.int8)
    place, kept = first.data_ptr(), first.view(torch.int16)[5:].numpy()
    assert place % PAGE_BYTES == 0
    del first
    other = room.empty((SMALLEST_BYTES, 2), torch.int8)
    assert other.data_ptr() != place, "a view still has it"
    del kept
    gc.collect()
    again = room.empty((SMALLEST_BYTES,), torch.bfloat16)
    assert (again.data_ptr(), again.dtype, again.shape) == (place, torch.bfloat16, (SMALLEST_BYTES,))
    assert room.empty((3, 0), torch.float32).shape == (3, 0)


def pending(**tensors: Tensor) -> list[Pending]:
    def record(name: str, tensor: Tensor) -> TensorRecord:
        return TensorRecord(name, "bf16", "BF16", tuple(tensor.shape), "shard", (name,), tensor.nbytes, "", "0" * 64)

    return [Pending(record(name, tensor), {name: tensor}) for name, tensor in tensors.items()]


def random_bytes(count: int) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def test_what_is_settled_is_on_the_disk(tmp_path: Path) -> None:
    settled: list[tuple[StoredFile, list[TensorRecord]]] = []
    tensors = {"a": random_bytes(PIECE_BYTES + 5), "b": random_bytes(3).view(torch.int8), "c": torch.ones(7)}
    with Finishing(tmp_path, lambda *shard: settled.append(shard), untimed) as finishing:
        finishing.add("one.safetensors", pending(**tensors))
        finishing.add("two.safetensors", pending(d=random_bytes(0)))
    assert [stored.name for stored, _ in settled] == ["one.safetensors", "two.safetensors"]
    for stored, records in settled:
        data = (tmp_path / stored.name).read_bytes()
        assert (stored.bytes, stored.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        loaded = load_file(tmp_path / stored.name)
        assert {r.name: r.sha256 for r in records} == {
            name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in loaded.items()
        }
    assert all(torch.equal(load_file(tmp_path / "one.safetensors")[name], tensor) for name, tensor in tensors.items())
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_added_before_a_failure_is_settled(tmp_path: Path) -> None:
    settled: list[str] = []

    def stopped() -> None:
        with Finishing(tmp_path, lambda stored, _: settled.append(stored.name), untimed) as finishing:
            finishing.add("one.safetensors", pending(a=random_bytes(100)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert settled == ["one.safetensors"]


@pytest.mark.parametrize("place", [0, 5000, PIECE_BYTES - 1, PIECE_BYTES + 4100])
@pytest.mark.parametrize("how", ["flipped", "lost page", "pages mixed up", "shorter"])
def test_a_disk_that_returns_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, how: str
) -> None:
    read_into = DirectFile.read_into

    def returned(file: DirectFile, view: memoryview, offset: int) -> int:
        count = read_into(file, view, offset)
        at = place - offset
        page = at // PAGE_BYTES * PAGE_BYTES
        if 0 <= at < count:
            if how == "flipped":
                view[at] ^= 1
            elif how == "lost page":
                view[page : min(page + PAGE_BYTES, count)] = bytes(min(page + PAGE_BYTES, count) - page)
            elif how == "shorter":
                return count - 1
            elif page + 2 * PAGE_BYTES <= count:
                first, second = bytes(view[page:][:PAGE_BYTES]), bytes(view[page + PAGE_BYTES :][:PAGE_BYTES])
                view[page : page + 2 * PAGE_BYTES] = second + first
            else:
                view[at] ^= 128
        return count

    monkeypatch.setattr(DirectFile, "read_into", returned)
    with (
        pytest.raises(ConversionError, match="other bytes than were written"),
        Finishing(tmp_path, lambda *_: pytest.fail("it must not be settled"), untimed) as finishing,
    ):
        finishing.add("one.safetensors", pending(a=random_bytes(PIECE_BYTES + 9000)))
    assert not (tmp_path / "one.safetensors").exists()


def test_a_later_shard_tells_of_an_earlier_one_s_failure(tmp_path: Path) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    taken = []

    def ten() -> None:
        with Finishing(tmp_path, fails, untimed) as finishing:
            for number in range(10):
                finishing.add(f"{number}.safetensors", pending(a=random_bytes(100)))
                taken.append(number)

    with pytest.raises(OSError, match="Input/output"):
        ten()
    assert len(taken) <= MAX_UNFINISHED

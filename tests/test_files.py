"""Reading what others wrote: an answer at once, whatever a name leads to and whatever bytes are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.files import NOT_ORDINARY, in_place

from lowmem_bagel.files import MAX_DEPTH, MAX_JSON_BYTES, open_file, parse_json, read_file


@pytest.mark.parametrize("kind", NOT_ORDINARY)
def test_only_ordinary_files_are_opened(tmp_path: Path, kind: str) -> None:
    with pytest.raises(OSError, match="it is") as error:
        open_file(in_place(kind, tmp_path / "a"))
    assert error.value.strerror


def test_a_fifo_that_takes_the_place_of_a_file_is_seen_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between asking what it is and opening it: without O_NONBLOCK this would wait for a writer."""
    ordinary = os.stat(__file__)
    fifo = in_place("fifo", tmp_path / "a")
    monkeypatch.setattr(os, "stat", lambda path: ordinary)
    with pytest.raises(OSError, match="not an ordinary file"):
        open_file(fifo)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "x" * 300, "missing", "file/below"])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"."):
        open_file(tmp_path / name)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a")
    assert read_file(tmp_path / "b") == b"x"


def test_size_limit(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than 16 MiB"):
        read_file(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"12345")
    assert read_file(tmp_path / "b", 5) == b"12345"
    with pytest.raises(OSError, match="larger"):
        read_file(tmp_path / "b", 4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{}", {}),
        (b'\xef\xbb\xbf{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00"]}', {"a": [1, -2500.0, True, None, "😀"]}),
        ('"é"'.encode(), "é"),
    ],
)
def test_json_that_is_read(text: bytes, value: object) -> None:
    assert parse_json(text) == value


def test_depth_that_is_read() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b"\xff", "codec can't decode"),
        (b'{"a": 1, "a": 1}', "a key appears twice"),
        (b'[{"a": {"b": 1, "b": 2}}]', "a key appears twice"),
        (b"[NaN]", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"[1e999]", "1e999 is not a number"),
        (b"[-1" + b"0" * 5000 + b".0]", "is not a number"),
        (b"1" * 5000, "4300 digits"),
        (b'["\\ud800"]', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested too deep"),
        (b'{"a":[' * 40 + b"]}" * 40, "nested too deep"),
        (b" " * (MAX_JSON_BYTES + 1), "larger than 16 MiB"),
    ],
)
def test_json_that_is_not(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_json(text)
    assert len(str(error.value)) < 300

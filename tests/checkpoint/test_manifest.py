"""The manifest: what is written reads back, and whatever else is read is refused with the project's own error."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_bagel.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    StoredFile,
    TensorRecord,
    read_manifest,
    source_digest,
)
from lowmem_bagel.errors import CheckpointError

SHA = "0" * 64


def record(name: str, **changes: Any) -> TensorRecord:
    values: dict[str, Any] = {
        "name": name,
        "encoding": "int8",
        "dtype": "BF16",
        "shape": (3, 4),
        "file": "model-1.safetensors",
        "stored": (name, f"{name}_scale"),
        "bytes": 24,
        "sha256": SHA,
        "source_sha256": "1" * 64,
        "errors": {"weight_rel_l2": 0.00712345678901234},
        "options": {"rotation_group": 128},
    }
    return TensorRecord(**{**values, **changes})


def manifest(*records: TensorRecord, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "format": "int8",
        "format_version": 1,
        "tool_version": "0.1.0",
        "experts": ("und", "gen"),
        "options": {"rotate": True},
        "source": "BAGEL-7B-MoT",
        "source_sha256": source_digest(records),
        "shards": {"model-1.safetensors": StoredFile("model-1.safetensors", 1000, SHA)},
        "files": {"llm_config.json": StoredFile("llm_config.json", 12, SHA)},
        "tensors": {r.name: r for r in records},
    }
    return Manifest(**{**values, **changes})


GOOD = manifest(record("a.weight"), record("b.weight", shape=(7,), errors={}, options={}))


def plain() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(GOOD.to_json())
    return values


def refused(values: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        Manifest.from_json(json.dumps(values).encode())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_round_trip_and_same_bytes() -> None:
    data = GOOD.to_json()
    assert Manifest.from_json(data) == GOOD
    assert Manifest.from_json(data).to_json() == data


def test_no_manifest_is_none_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / MANIFEST_NAME).write_bytes(GOOD.to_json()[:-5])
    with pytest.raises(CheckpointError, match=r"variant\.json"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)


def test_source_digest_ignores_order_and_sees_every_part() -> None:
    a, b = record("a"), record("b")
    assert source_digest([a, b]) == source_digest([b, a])
    for change in ({"dtype": "F32"}, {"shape": (4, 3)}, {"source_sha256": "2" * 64}, {"name": "c"}):
        assert source_digest([a, dataclasses.replace(b, **change)]) != source_digest([a, b])


BAD_NAMES = [
    "../model.safetensors", "..", ".", "", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "C:model", "a\0b",
    "model.safetensors ", "model.", ".hidden", "x" * 300, MANIFEST_NAME, "a\nb", "é", 7, None, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("table", ["shards", "files"])
@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_file_names_stay_in_the_folder(table: str, name: object) -> None:
    values = plain()
    values[table][0]["name"] = name
    if table == "shards":
        for row in values["tensors"]:
            row["file"] = name
    refused(values)


def test_duplicates() -> None:
    for table in ("shards", "files", "tensors"):
        values = plain()
        values[table].append(copy.deepcopy(values[table][0]))
        assert "twice" in refused(values)
    values = plain()
    values["files"][0]["name"] = "MODEL-1.safetensors"  # one file where the file system ignores case
    assert "duplicates" in refused(values)
    values = plain()
    values["tensors"][1]["stored"] = ["a.weight"]
    assert "duplicates" in refused(values)
    text = GOOD.to_json().replace(b'"format": "int8"', b'"format": "int8", "format": "nf4"')
    with pytest.raises(CheckpointError, match="twice"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "INT 8"),
        (("format_version",), True),
        (("format_version",), 1.0),
        (("manifest_version",), 2),
        (("experts",), ["gen", "und"]),
        (("experts",), []),
        (("options",), {"Rotate": 1}),
        (("options",), {"rotate": [1]}),
        (("options",), []),
        (("source",), ""),
        (("source_sha256",), "2" * 64),
        (("source_sha256",), SHA.upper()[:63]),
        (("surprise",), 1),
        (("tensors",), {}),
        (("shards", 0, "bytes"), -1),
        (("shards", 0, "bytes"), 2**60),
        (("shards", 0, "bytes"), 47),
        (("shards", 0, "sha256"), "g" * 64),
        (("tensors", 0, "shape"), [0, 4]),
        (("tensors", 0, "shape"), [2**40, 2**40]),
        (("tensors", 0, "shape"), [1] * 9),
        (("tensors", 0, "shape"), [True, 4]),
        (("tensors", 0, "file"), "llm_config.json"),
        (("tensors", 0, "stored"), []),
        (("tensors", 0, "stored"), [""]),
        (("tensors", 0, "name"), "a\ud800"),
        (("tensors", 0, "errors"), {"weight_rel_l2": -0.1}),
        (("tensors", 0, "errors"), {"weight_rel_l2": "0"}),
        (("tensors", 0, "extra"), 0),
    ],
)
def test_wrong_values(path: tuple[Any, ...], value: object) -> None:
    values = plain()
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    refused(values)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": NaN}', b"9" * 10_000])
def test_not_a_manifest_at_all(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        Manifest.from_json(data)


def test_every_missing_field_is_noticed() -> None:
    for key in plain():
        values = plain()
        del values[key]
        refused(values)
    for table in ("shards", "tensors"):
        for key in plain()[table][0]:
            values = plain()
            del values[table][0][key]
            refused(values)


def _parsed(data: bytes) -> Manifest | None:
    """The manifest, or None where it was refused; any other exception is the failure these tests look for."""
    try:
        return Manifest.from_json(data)
    except CheckpointError:
        return None


def _assert_safe(parsed: Manifest) -> None:
    for name in (*parsed.shards, *parsed.files):
        assert Path(name).name == name
        assert name not in ("", ".", "..")
    assert {r.file for r in parsed.tensors.values()} <= set(parsed.shards)
    assert Manifest.from_json(parsed.to_json()) == parsed


@given(st.binary(max_size=300))
def test_fuzz_bytes(data: bytes) -> None:
    assert _parsed(data) is None


@given(st.integers(0, len(GOOD.to_json()) * 8 - 1), st.integers(0, len(GOOD.to_json())))
@settings(max_examples=150)
def test_fuzz_flips_and_truncation(bit: int, length: int) -> None:
    data = bytearray(GOOD.to_json())
    data[bit // 8] ^= 1 << bit % 8
    for candidate in (bytes(data), bytes(data[:length])):
        parsed = _parsed(candidate)
        if parsed is not None:
            _assert_safe(parsed)
    assert length >= len(data) - 1 or _parsed(GOOD.to_json()[:length]) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(BAD_NAMES[:10]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in items] + [p for key, inner in items for p in _places(inner, (*path, key))]


@given(st.data())
@settings(max_examples=150)
def test_fuzz_values(data: st.DataObject) -> None:
    values = plain()
    for path in data.draw(st.lists(st.sampled_from(_places(values)), min_size=1, max_size=3)):
        place: Any = values
        for key in path[:-1]:
            if not isinstance(place, dict | list) or (isinstance(place, dict) and key not in place):
                break
            if isinstance(place, list) and not (isinstance(key, int) and key < len(place)):
                break
            place = place[key]
        else:
            if isinstance(place, dict) or (isinstance(place, list) and type(path[-1]) is int and path[-1] < len(place)):
                place[path[-1]] = data.draw(JSON)
    parsed = _parsed(json.dumps(values).encode())
    if parsed is not None:
        _assert_safe(parsed)


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)
IDENTIFIERS = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,20}", fullmatch=True)
HASHES = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)


@given(
    names=st.lists(NAMES, unique=True, max_size=4),
    encoding=IDENTIFIERS,
    sha=HASHES,
    error=st.floats(0, 1e20),
    option=st.booleans() | st.integers(-(10**9), 10**9) | NAMES,
    source=NAMES,
)
def test_any_valid_manifest_round_trips(
    names: list[str], encoding: str, sha: str, error: float, option: Any, source: str
) -> None:
    rows = [
        record(n, encoding=encoding, sha256=sha, stored=(n,), errors={"x": error}, options={"o": option}) for n in names
    ]
    made = manifest(*rows, source=source, options={"o": option})
    assert Manifest.from_json(made.to_json()) == made

"""What a jobs file says, line by line."""

from __future__ import annotations

import codecs
import io
from pathlib import Path

import pytest

from lowmem_bagel.batch.lines import Line, read_lines
from lowmem_bagel.errors import SettingError


def lines_of(tmp_path: Path, content: bytes) -> list[Line]:
    (tmp_path / "jobs.jsonl").write_bytes(content)
    return read_lines(tmp_path / "jobs.jsonl")


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    found = lines_of(tmp_path, b'{"prompt": "a"}\n\n  \r\n{"prompt": "b", "id": "x"}\r\n{"prompt": "c"}')
    assert [(line.number, line.id, line.said["prompt"]) for line in found] == [
        (1, "00001", "a"), (4, "x", "b"), (5, "00005", "c"),
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_editors_and_shells(tmp_path: Path, encoding: str) -> None:
    (line,) = lines_of(tmp_path, '{"prompt": "ein Bär \u2028 im Schnee"}\n'.encode(encoding))
    assert line.said == {"prompt": "ein Bär \u2028 im Schnee"}


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n')))
    assert [line.id for line in read_lines(Path("-"))] == ["00001"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"prompt": "a"', "not a line of JSON"),
        ("a red circle", "not a line of JSON"),
        ('["a"]', "not a JSON object"),
        ("{}", "not a JSON object"),
        ('{"prompt": "a", "prompt": "b"}', "a key appears twice"),
        ('{"prompt": "a", "seed": NaN}', "NaN is not a number"),
        ('{"prompt": "a", "seed": ' + "9" * 9999 + "}", "not a line of JSON"),
        ("[" * 99_999, "nested too deep"),
        ('{"prompt": "a", "id": "a/b"}', "id must be a plain name"),
        ('{"prompt": "a", "id": ".."}', "id must be a plain name"),
        ('{"prompt": "a", "id": ""}', "id must be a plain name"),
        ('{"prompt": "a", "id": "' + "x" * 200 + '"}', "id must be a plain name"),
        ('{"prompt": "a", "id": "a\\u001b"}', "id must be a plain name"),
        ('{"prompt": "a", "id": [1]}', "id must be a text"),
        ('{"prompt": "a", "id": true}', "id must be a text"),
        ('{"prompt": "a", "id": "FOX"}', "the id 'FOX' is that of line 1"),
    ],
)
def test_what_is_wrong_with_a_line_stays_with_it(tmp_path: Path, text: str, why: str) -> None:
    before, wrong, after = lines_of(tmp_path, f'{{"prompt": "a", "id": "fox"}}\n{text}\n{{"prompt": "b"}}'.encode())
    assert (before.why, after.why) == ("", "")
    assert why in wrong.why
    assert wrong.id == "00002"


def test_bytes_that_are_no_text_are_wrong_in_their_line_alone(tmp_path: Path) -> None:
    wrong, right = lines_of(tmp_path, b'{"prompt": "\xff\xfe"}\n{"prompt": "b"}\n')
    assert "not a line of JSON" in wrong.why and not right.why


def test_a_line_without_an_id_never_takes_anothers(tmp_path: Path) -> None:
    found = lines_of(tmp_path, b'{"prompt": "a"}\n{"prompt": "b", "id": "00001"}\n{"prompt": "c", "id": 7}\n')
    assert [line.id for line in found] == ["00001+", "00001", "7"]


def test_a_digest_is_of_what_is_said_and_not_how(tmp_path: Path) -> None:
    one, two, three = lines_of(
        tmp_path,
        b'{"prompt": "a", "seed": 1}\n{"id": "x",   "seed":1,"prompt":"\\u0061"}\n{"prompt": "a", "seed": 2}\n',
    )
    assert one.digest == two.digest != three.digest


@pytest.mark.parametrize("content", [b"", b"\n\n", b"a red circle\na blue one\n", b"[]\n", codecs.BOM_UTF16_LE + b"a"])
def test_a_file_without_jobs_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SettingError, match=r"holds no jobs|is none"):
        lines_of(tmp_path, content)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(SettingError, match="cannot read the jobs in"):
            read_lines(path)

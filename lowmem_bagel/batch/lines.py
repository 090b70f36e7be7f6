"""The jobs file: one JSON object a line. What is wrong with a line is kept with it, and the others are read."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import SettingError
from ..files import MAX_JSON_BYTES, UTF_16, expanded, open_file, parse_json
from ..values import shown

STDIN = "-"
MAX_BYTES = 1 << 30
"""Of a jobs file."""
MAX_ID_BYTES = 120
"""Of an id, which a picture's file is called after."""
_UNFIT = re.compile(r'^[.\s]|[\x00-\x1f\x7f/\\:*?"<>|]|[.\s]$')
"""What no file on any system may be called."""


@dataclass(frozen=True)
class Line:
    """One line of a jobs file.

    Attributes:
        number: in the file, from 1.
        id: what its result is known by.
        digest: of all that it says but the id.
        said: the object; empty where it is none.
        why: what is wrong with it; empty where nothing is.
    """

    number: int
    id: str
    digest: str
    said: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


def read_lines(path: Path) -> list[Line]:
    """Every line of a file, or of stdin for "-", that is not blank.

    Raises:
        SettingError: it cannot be read, or holds not one JSON object.
    """
    found = [_line(number, text) for number, text in enumerate(_content(path).split(b"\n"), 1) if text.strip()]
    if not any(line.said for line in found):
        first = f": {found[0].why}" if found else ""
        raise SettingError(
            f'{path} holds no jobs{first}; give one JSON object a line, such as {{"prompt": "a red circle"}}'
        )
    return _with_ids(found)


def check_name(name: str, what: str) -> str:
    """A name that a file may have on any system.

    Raises:
        SettingError: it is none.
    """
    if _UNFIT.search(name) or not name.isprintable() or not 0 < len(name.encode()) <= MAX_ID_BYTES:
        raise SettingError(
            f"{what} must be a plain name of up to {MAX_ID_BYTES} bytes, as files may be called, not {shown(name)}"
        )
    return name


def _content(path: Path) -> bytes:
    """In UTF-8, without a mark."""
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if str(path) == STDIN else _read(expanded(path))
    except OSError as error:
        reason = error.strerror or error
        raise SettingError(f"cannot read the jobs in {path} ({reason}); name a file, or - for stdin") from error
    if len(data) > MAX_BYTES:
        raise SettingError(f"{path} is larger than {MAX_BYTES >> 30} GiB; divide it")
    if data[:2] not in UTF_16:
        return data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-16").encode()
    except UnicodeError as error:
        raise SettingError(f"{path} begins as UTF-16 and is none; save it as UTF-8") from error


def _read(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read(MAX_BYTES + 1)


def _line(number: int, text: bytes) -> Line:
    try:
        value = parse_json(text.strip(), MAX_JSON_BYTES)
    except ValueError as error:
        return Line(number, "", _digest(text.strip()), why=f"not a line of JSON ({' '.join(str(error).split())[:200]})")
    if not isinstance(value, dict) or not value:
        return Line(number, "", _digest(text.strip()), why=f"not a JSON object with a prompt, but {shown(value)}")
    said = {name: value[name] for name in value if name != "id"}
    line = Line(number, "", _digest(json.dumps(said, sort_keys=True).encode()), said)
    try:
        return replace(line, id=_id(value["id"]) if value.get("id") is not None else "")
    except SettingError as error:
        return replace(line, why=str(error))


def _id(said: object) -> str:
    if isinstance(said, int) and not isinstance(said, bool):
        said = str(said)
    if not isinstance(said, str):
        raise SettingError(f"id must be a text, not {shown(said)}")
    return check_name(said, "id")


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:32]


def _with_ids(found: Iterable[Line]) -> list[Line]:
    """Each with an id of its own: its own, or its number. Of several with the same, the first has it."""
    lines = list(found)
    owners: dict[str, int] = {}
    for place, line in enumerate(lines):
        if line.id and owners.setdefault(line.id.casefold(), line.number) != line.number:
            why = f"the id {shown(line.id)} is that of line {owners[line.id.casefold()]}; give every job another"
            lines[place] = replace(line, id="", why=why)
    for place, line in enumerate(lines):
        if not line.id:
            id = f"{line.number:05d}"
            while id.casefold() in owners:
                id += "+"
            owners[id] = line.number
            lines[place] = replace(line, id=id)
    return lines

"""The journal of an unfinished conversion: what a killed process leaves of its last line is in nobody's way."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from lowmem_bagel.converters.engine.journal import JOURNAL_NAME, Journal

from lowmem_bagel.errors import ConversionError

FIRST, SECOND = {"shard": {"name": "ä"}}, {"shard": {"name": "b"}}


@pytest.mark.parametrize("kept", range(len('{"shard": {"name": "\\u00e4"}}')))
def test_what_follows_a_torn_line_is_read(tmp_path: Path, kept: int) -> None:
    with closing(Journal(tmp_path)) as journal:
        journal.append(FIRST)
        journal.append(FIRST)
    path = tmp_path / JOURNAL_NAME
    line = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(line + line[:kept])
    with closing(Journal(tmp_path)) as journal:
        assert journal.lines == [FIRST]
        journal.append(SECOND)
    with closing(Journal(tmp_path)) as journal:
        assert journal.lines == [FIRST, SECOND]


def test_what_is_damaged_before_the_last_line_is_refused_and_forgotten_when_asked(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    for damaged in (b'{"shard"\n{}\n', b"[]\n"):
        path.write_bytes(damaged)
        with pytest.raises(ConversionError, match=r"damaged.*--restart"):
            Journal(tmp_path)
        assert path.read_bytes() == damaged
    with closing(Journal(tmp_path, fresh=True)) as journal:
        assert not journal.lines
    assert not path.read_bytes()

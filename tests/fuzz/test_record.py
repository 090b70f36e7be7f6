"""What was run by hand, once and at length: the record that is committed."""

from __future__ import annotations

import json

from support.fuzz import MAX_BYTES, MAX_SECONDS
from support.paths import DATA

RECORD = json.loads((DATA / "fuzz.json").read_text())


def test_a_hundred_thousand_inputs_were_answered_rightly() -> None:
    assert sum(tally["inputs"] for tally in RECORD.values()) >= 100_000
    assert RECORD.keys() >= {"pictures", "hubs' answers", "command lines"}
    for kind, tally in RECORD.items():
        assert tally["failures"] == {}, kind
        assert tally["worst_seconds"] <= MAX_SECONDS, kind
        assert tally["peak_bytes"] <= MAX_BYTES, kind
        assert 0 < tally["refused"] < tally["inputs"], f"{kind}: damage that is always or never seen shows little"

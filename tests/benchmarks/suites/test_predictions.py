"""What the planner predicts of older cards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lowmem_bagel.benchmarks.suites.predictions import FORMATS, OLDER, predictions
from support.command import Ran
from support.paths import RESULTS

from lowmem_bagel.settings import TASKS


def test_older_cards_get_fp16_with_what_surrounds_it_in_float32() -> None:
    for row in predictions():
        assert row["fits"], row
        assert (row["dtype"], row["residual_dtype"], row["vae_dtype"]) == ("float16", "float32", "float32")
        assert row["attention"] == "efficient"
        assert row["seconds"] > 0


def test_a_record_is_written_as_the_committed_one(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    assert cli("bench", "predictions", "--out", tmp_path / "new.json").code == 0
    new, old = (
        json.loads(path.read_text()) for path in (tmp_path / "new.json", RESULTS / "predictions_older_cards.json")
    )
    assert len(new["results"]) == len(OLDER) * len(FORMATS) * len(TASKS)
    for row, before in zip(new["results"], old["results"], strict=True):
        assert row.keys() == before.keys()
        assert (row["card"], row["format"], row["task"]) == (before["card"], before["format"], before["task"])
    assert new["settings"].keys() == old["settings"].keys()

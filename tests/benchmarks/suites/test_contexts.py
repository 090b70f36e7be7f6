"""`bench contexts`, on a small model without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Ran

from lowmem_bagel import BagelPipeline


@pytest.mark.parametrize("place", ["auto", "host"])
def test_a_run_records_what_a_repeated_picture_saves(
    small_pictures: BagelPipeline, tmp_path: Path, cli: Callable[..., Ran], place: str
) -> None:
    out = tmp_path / "contexts.json"
    folder = small_pictures.model.folder.path
    small = ("--size", 128, "--tokens", 3, "--repeat", 1, "--device", "cpu", "--place", place, "--out", out)
    assert cli("bench", "contexts", folder, *small).code == 0
    (found,) = json.loads(out.read_text())["results"]
    assert found["same_bits"] is True
    assert found["room"]["place"] == ("device" if place == "auto" else "pinned")
    assert 0 < found["kept_bytes"] <= found["room"]["nbytes"]
    assert found["seconds"].keys() == {
        "first", "second", "second_alone", "first_prefill", "second_prefill", "edit", "edit_again"
    }  # fmt: skip
    assert found["passes"] == {"first": 2, "second": 1}, "of a picture, and of a question with the start of its answer"
    assert {"hash", "preprocess", "restore", "ask", "choose"} <= found["pieces"].keys()
    assert min([*found["seconds"].values(), *found["pieces"].values()]) > 0


def test_a_store_that_is_off_has_nothing_to_measure(small_pictures: BagelPipeline, cli: Callable[..., Ran]) -> None:
    ran = cli("bench", "contexts", small_pictures.model.folder.path, "--device", "cpu", "--store", "off")
    assert "no contexts are kept: the store is off" in ran.error
    assert "choose one of auto, device, host" in cli("bench", "contexts", "source", "--place", "moon").error

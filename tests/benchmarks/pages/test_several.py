"""Rows of two cards beside the same on one, and what is unusual of them in words."""

from __future__ import annotations

from typing import Any

from lowmem_bagel.benchmarks.pages.several import TOGETHER, several
from lowmem_bagel.benchmarks.rows import PRESETS, Row


def figures(row: str, seconds: float) -> dict[str, Any]:
    return {"row": row, "seconds": {"median": seconds}, "predicted": {"seconds": 2.0}, "tokens_per_second": 3.0}


def test_every_row_of_the_preset_is_shown_beside_the_same_on_one_card() -> None:
    rows = PRESETS["devices"]
    head = {"hardware": {"gpu": "NVIDIA H200"}, "commit": "abc", "settings": {"size": 1024, "num_timesteps": 50}}
    run = {**head, "results": [figures(row, 4.0 if "devices" in row else 8.0) for row in rows]}
    failed = {"row": "nf4:devices=0,1", "error": "RuntimeError: no"}
    run["results"].append(failed)
    shown = several({TOGETHER: run}).splitlines()
    table = [line for line in shown if line.startswith("| ") and "8.00" in line]
    assert len(table) == sum(bool(Row.parse(row).devices) for row in rows)
    assert all("| 8.00 | 4.00 | 0.50 | 2.00 | abc |" in line for line in table)
    assert len({line.split("|")[1] for line in table}) == len(table), "each says what it is"
    said = "\n".join(table)
    for words in ("layers divided,", "layers divided by accelerate", "through the host", "a thread a card", "answer"):
        assert words in said

"""docs/choosing.md and the README's table: what `choose` says for well-known cards, by predictions alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowmem_bagel.cli.console import duration
from lowmem_bagel.hardware.profile import CONTEXT_BYTES
from lowmem_bagel.sampling.step_caches.speeds import flag

from .fidelity import FIDELITY
from .measured import FORMATS, WORDS, Measured, card, measured
from .page import Column, Page, Records, again, prose, table

RECORD = "predictions_choices"
NAMES = {**FORMATS, "fp16": "fp16"}
SAID = {
    "source": ("29.21 GB", "about 30 GB", "A100 40 GB"),
    "dfloat11": ("19.89 GB", "about 22 GB", "RTX 4090"),
    "int8": ("about 15 GB", "16 to 18 GB", "RTX 3090, RTX 4080 Super"),
    "nf4": ("", "", ""),
}
"""What is said of a format elsewhere: on disk, at the peak of drawing, and the card that it is for."""


def rule(records: Records) -> str:
    about = records[RECORD]["settings"]["rule"]
    return prose(
        "The rule begins with the fastest choice that loses nothing. One with a loss takes its place where it is "
        f"{about['a_loss_brings']:g} times faster, one with two losses where it is so much faster again. A loss counts "
        f"only where it was measured and is within bounds: {about['largest_error']:.0%} of a linear's output (the "
        f"median of the embedded model's), and {about['most_points']:g} points of 100 in each task. Beyond these a "
        f"choice must be {about['beyond_bounds_brings']:g} times faster. What is nearer than bfloat16 rounds "
        f"({about['rounding']:.1%}) is no loss, which is how fp16 comes out. Choices no more than a factor of "
        f"{about['as_fast']:g} behind the fastest are as fast, and of these the one that loses least is taken, then "
        "the one that needs least memory. --lossless leaves all out that loses."
    )


def cards(records: Records) -> str:
    """One line a card, and the first one's commands."""

    def shown(name: str) -> Column:
        return lambda row: f"{row['recommended'][name] / 1e9:.1f} GB"

    columns: dict[str, Column] = {
        "card": lambda row: str(row["card"]),
        "recommended": lambda row: _name(row["recommended"]),
        "picture": lambda row: duration(row["recommended"]["seconds"]),
        "on the card": shown("peak_bytes"),
        "RAM": shown("ram_bytes"),
        "disk": shown("stored_bytes"),
        "convert": lambda row: f"`--to {row['recommended']['format']}`",
        "draw": lambda row: f"`{flag(row['recommended']['step_cache'], row['task'] == 'edit')}`",
        "with no loss": lambda row: f"{_name(row['lossless'])}, {duration(row['lossless']['seconds'])}",
    }
    first, *_ = rows = _rows(records)
    typed = "\n".join(f"    {line}" for line in first["commands"])
    return f"{table(columns, rows)}\n\nThe commands, of the first:\n\n{typed}"


def others(records: Records) -> str:
    asked = {
        "picture of 512x512": ("generate", "512x512"), "edit": ("edit", "1024x1024"), "answer": ("ask", "1024x1024"),
    }  # fmt: skip

    def cell(task: str, size: str) -> Column:
        rows = {row["card"]: row["recommended"] for row in _rows(records, task, size)}
        return lambda row: f"{_name(rows[row['card']])}, {duration(rows[row['card']]['seconds'])}"

    columns: dict[str, Column] = {"card": lambda row: str(row["card"])}
    return table(columns | {name: cell(*which) for name, which in asked.items()}, _rows(records))


def losses(records: Records) -> str:
    known = json.loads(FIDELITY.text(records, ""))
    rows = [(NAMES[name], found) for name, found in known["formats"].items() if name in NAMES]
    rows += [(f"attention {name}", found) for name, found in known["attention"].items()]
    rows += [(WORDS[name], found) for name, found in known["step_caches"].items()]

    def points(task: str) -> Column:
        return lambda row: f"{row[1]['points'][task]:+g}" if task in row[1].get("points", {}) else ""

    columns: dict[str, Column] = {
        "": lambda row: str(row[0]),
        "a linear's output": lambda row: f"{row[1]['output_error']:.2%}" if "output_error" in row[1] else "",
        "first guided velocity": lambda row: f"{row[1]['velocity_error']:.2%}" if "velocity_error" in row[1] else "",
        **{task: points(task) for task in ("answers", "drawings", "edits")},
    }
    return table(columns, rows)


def conditions(records: Records) -> str:
    record = records["engine_h200"]
    return prose(
        f"Memory was measured on one {card(record)} at commit {record['commit']}, with random weights at the 7B shape "
        f"and no limit: what is in use at most while a {record['settings']['size']}x{record['settings']['size']} "
        "picture is drawn, and while a question about one is answered by a model of both experts that loads und alone. "
        "Sizes on disk are computed from shapes, DFloat11's by the bits that real weights take; *answers alone* is "
        "what `convert --experts und` makes."
    )


def said(records: Records) -> str:
    """What is said of formats, beside what was measured."""
    found, stored = measured(records), records[RECORD]["settings"]["stored_bytes"]
    columns: dict[str, Column] = {
        "": lambda name: FORMATS[name],
        "said: disk": lambda name: SAID[name][0],
        "peak": lambda name: SAID[name][1],
        "card": lambda name: SAID[name][2],
        "disk": lambda name: f"{stored[name]['all'] / 1e9:.1f} GB",
        "picture": lambda name: _in_use(found[name]),
        "answers alone: disk": lambda name: f"{stored[name]['und'] / 1e9:.1f} GB",
        "answer": lambda name: _in_use(found[f"{name}::ask"]),
    }
    return table(columns, SAID)


def made_by(records: Records) -> str:
    return again(records, {RECORD: "choices --out RECORD"})


def summary(records: Records) -> str:
    """One line a card, for the README."""
    columns: dict[str, Column] = {
        "card": lambda row: str(row["card"]),
        "take": lambda row: _name(row["recommended"]),
        "a picture": lambda row: duration(row["recommended"]["seconds"]),
        "and with no loss": lambda row: f"{_name(row['lossless'])}, {duration(row['lossless']['seconds'])}",
    }
    return table(columns, _rows(records))


def _rows(records: Records, task: str = "generate", size: str = "1024x1024") -> list[dict[str, Any]]:
    return [row for row in records[RECORD]["results"] if (row["task"], row["size"]) == (task, size)]


def _name(row: Mapping[str, Any]) -> str:
    cache = "" if row["step_cache"] == "none" else f", {WORDS[row['step_cache']]}"
    return f"{NAMES[row['format']]}{cache}"


def _in_use(row: Measured) -> str:
    """At most: read after the request, when PyTorch may have given some back, or what it had reserved and a context."""
    used, reserved = (int(row.figures[name]) for name in ("device_used_bytes", "reserved_bytes"))
    return f"{max(used, reserved + CONTEXT_BYTES) / 1e9:.1f} GB"


CHOOSING = Page("docs/choosing.md", {
    "rule": rule,
    "cards": cards,
    "others": others,
    "losses": losses,
    "conditions": conditions,
    "said": said,
    "again": made_by,
})  # fmt: skip

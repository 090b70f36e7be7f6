"""What the planner expects of older cards: a record, and the table of docs/older-gpus.md made from it.

    python -m lowmem_bagel.benchmarks.suites.predictions RECORD.json docs/older-gpus.md

Nothing here was measured on these cards. Every prediction rests on the card's nominal rates
(`lowmem_bagel.hardware.gpu_specs`) and on the shares of such rates that were
measured or assumed (`lowmem_bagel.planner.calibration`); the record holds both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_bagel.errors import DoesNotFitError
from lowmem_bagel.hardware.gpu_specs import CARDS, Card
from lowmem_bagel.hardware.profile import HardwareProfile
from lowmem_bagel.ops.attention.registry import attention_backends
from lowmem_bagel.planner.calibration import MEASURED
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.plan import Plan
from lowmem_bagel.planner.solve import Limits, Request, make_plan
from lowmem_bagel.settings import TASKS, Task

from ..pages import markdown
from ..record import write_record
from ..rows import Row

OLDER = ("T4", "V100", "RTX 2080 Ti", "GTX 1080 Ti")
FORMATS = ("dfloat11", "fp16", "int8", "nf4")
RAM_GB = 32.0
NEW_TOKENS = 128
BEGIN, END = "<!-- predictions -->", "<!-- end of predictions -->"
STAND_IN_BEGIN, STAND_IN_END = "<!-- stand-in -->", "<!-- end of stand-in -->"
TRITON_BEGIN, TRITON_END = "<!-- without Triton -->", "<!-- end of without Triton -->"

app = typer.Typer()


@app.command()
def main(
    record: Annotated[Path, typer.Argument(help="The JSON record to write.")],
    document: Annotated[Path | None, typer.Argument(help="A page whose table is written anew from the record.")] = None,
) -> None:
    """Predict every format and task on every older card."""
    rows = list(predictions())
    shares = {spec.name: spec.cost.share for spec in attention_backends().values() if spec.cost.of == "dense"}
    settings = {
        "model": "bagel-7b",
        "request": asdict(Request(new_tokens=NEW_TOKENS)),
        "ram_gb": RAM_GB,
        "cards": {card.name: asdict(card) for card in CARDS if card.name in OLDER},
        "calibration": asdict(MEASURED) | {"attention_share": shares},
    }
    write_record(record, "predictions of the planner, nothing measured", settings, rows)
    if document is not None:
        page = filled(document.read_text(encoding="utf-8"), rows, Measured.read(record.parent))
        document.write_text(page, encoding="utf-8")


Rows = Mapping[str, Mapping[str, Any]]
"""Measured rows by their text."""


@dataclass(frozen=True)
class Measured:
    """What `bench engine` measured with abilities of its card switched off, and with none."""

    whole: Rows
    stand_in: Rows
    """As Turing computes."""
    stand_in_plain: Rows
    """The same without the kernels that NVRTC compiles."""
    without_triton: Rows
    without_triton_plain: Rows

    @classmethod
    def read(cls, folder: Path) -> Measured:
        names = (
            "engine_h200", "engine_h200_as_turing", "engine_h200_as_turing_plain", "engine_h200_without_triton",
            "engine_h200_without_triton_plain",
        )  # fmt: skip
        return cls(*({row["row"]: row for row in read(folder / f"{name}.json")} for name in names))


def predictions() -> Iterator[dict[str, Any]]:
    """One row a card, format and task: what the plan chose, and the seconds and peak that it expects."""
    for name in OLDER:
        card = next(card for card in CARDS if card.name == name)
        for format in FORMATS:
            facts = ModelFacts.of_shape(format)
            for task in TASKS:
                yield {"card": name, "format": format, "task": task, **_predicted(card, facts, task)}


def _predicted(card: Card, facts: ModelFacts, task: Task) -> dict[str, Any]:
    pcie = card.pcie_gbps * MEASURED.pcie_share
    profile = HardwareProfile.hypothetical(card.memory_gb, card.capability, RAM_GB, pcie, name=card.name)
    try:
        plan = make_plan(facts, profile, Limits(), Request(tasks=(task,), new_tokens=NEW_TOKENS))
    except DoesNotFitError as refusal:
        return {"fits": False, "why": str(refusal)}
    assert plan.prediction is not None
    assert plan.prediction.seconds is not None
    return {
        "fits": True,
        "seconds": round(plan.prediction.seconds, 1),
        "peak_bytes": plan.prediction.peak_bytes,
        "streamed_units": len(plan.residency.streamed),
        "waiting": {place: len(units) for place, units in plan.residency.waiting().items()},
        **_choices(plan),
    }


def _choices(plan: Plan) -> dict[str, Any]:
    return {
        "dtype": plan.dtype,
        "residual_dtype": plan.residual_dtype,
        "vae_dtype": plan.vae_dtype,
        "attention": plan.attention,
        "guidance_batch": plan.guidance_batch,
        "reasons": plan.reasons,
    }


def filled(page: str, predicted: Sequence[Mapping[str, Any]], measured: Measured) -> str:
    """The page with what is between its markers replaced by the tables of what is predicted and measured."""
    parts = (
        (BEGIN, END, table(predicted)),
        (STAND_IN_BEGIN, STAND_IN_END, stand_in_table(measured)),
        (TRITON_BEGIN, TRITON_END, triton_table(measured)),
    )
    for begin, end, lines in parts:
        page = markdown.replaced(page, begin, end, lines)
    return page


def stand_in_table(measured: Measured) -> str:
    """A Markdown table of the stand-in for Turing, and beside it what PyTorch's operations would take."""

    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        what = Row.parse(row["row"])
        limit = f" under {what.limit_gb:g} GB" if what.limit_gb else ""
        yield f"{what.format}{limit}, {'answer' if what.task == 'ask' else 'picture'}"
        yield _figure(row)
        plain = measured.stand_in_plain.get(row["row"])
        yield _figure(plain) if plain else ""
        yield from (f"{row[size] / 1e9:.1f} GB" for size in ("peak_bytes", "device_used_bytes"))
        yield str(row["streamed_units"] or "none")

    names = ("", "our kernels", "PyTorch's operations", "allocated", "in use on the card", "streamed of 56")
    return markdown.table(names, map(cells, measured.stand_in.values()))


def triton_table(measured: Measured) -> str:
    """A Markdown table of a modern card with Triton, without, and without NVRTC too."""

    def cells(name: str) -> Iterator[str]:
        what = Row.parse(name)
        yield f"{what.format}, {'answer' if what.task == 'ask' else 'picture'}"
        for rows in (measured.whole, measured.without_triton, measured.without_triton_plain):
            yield _figure(rows[name]) if name in rows else ""

    names = ("", "Triton", "NVRTC alone", "neither")
    return markdown.table(names, map(cells, measured.without_triton))


def _figure(row: Mapping[str, Any]) -> str:
    """Tokens a second of an answer, the seconds of a picture."""
    if Row.parse(row["row"]).task == "ask":
        return f"{row['tokens_per_second']:.0f} tokens/s"
    return f"{markdown.digits(row['seconds']['median'])} s"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, one line a card and format: seconds of each task and peak memory of drawing."""
    by_key = {(row["card"], row["format"], row["task"]): row for row in rows}

    def cells(card: str, format: str) -> Iterator[str]:
        drawing, *others = (by_key[card, format, task] for task in TASKS)
        fits = drawing["fits"]
        yield from (card, format, drawing["reasons"]["linears"].split(":")[0] if fits else "does not fit")
        yield from map(_duration, (drawing, *others))
        yield f"{drawing['peak_bytes'] / 1e9:.1f} GB" if fits else ""
        waiting = drawing["waiting"].items() if fits else ()
        yield " + ".join(f"{count} {place}" for place, count in waiting) or ("none" if fits else "")

    return markdown.table(
        ("card", "format", "linears", "picture", "edit", "answer", "peak", "streamed of 56"),
        (cells(*key) for key in dict.fromkeys((row["card"], row["format"]) for row in rows)),
    )


def _duration(row: Mapping[str, Any]) -> str:
    if not row["fits"]:
        return "does not fit"
    seconds = row["seconds"]
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def read(record: Path) -> list[dict[str, Any]]:
    """The rows of a record."""
    rows: list[dict[str, Any]] = json.loads(record.read_text(encoding="utf-8"))["results"]
    return rows


if __name__ == "__main__":
    app()

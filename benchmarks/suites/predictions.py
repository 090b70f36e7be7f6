"""`lowmem-bagel bench predictions`: what the planner expects of cards that are not here; nothing here is measured.

Every prediction rests on the card's nominal rates (`lowmem_bagel.hardware.gpu_specs`) and on the shares of such rates
that were measured or assumed (`lowmem_bagel.planner.calibration`); the record holds both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_bagel.cli.machine import known_machine
from lowmem_bagel.errors import DoesNotFitError
from lowmem_bagel.hardware.gpu_specs import CARDS, Card
from lowmem_bagel.ops.attention.registry import attention_backends
from lowmem_bagel.planner.calibration import MEASURED
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.plan import Plan
from lowmem_bagel.planner.solve import Limits, Request, make_plan
from lowmem_bagel.settings import TASKS, Task

from ..options import Out
from ..record import write_record

OLDER = ("T4", "V100", "RTX 2080 Ti", "GTX 1080 Ti")
COMMON = ("RTX 4090", "RTX 4080", "RTX 3090", "RTX 3060", "RTX 4060", "RTX 2080 Ti", "T4", "V100", "GTX 1080 Ti")
FORMATS = ("dfloat11", "fp16", "int8", "nf4")
COMMON_FORMATS = ("source", "dfloat11", "int8", "nf4")
RAM_GB = 32.0
NEW_TOKENS = 128


def predictions_command(
    common: Annotated[bool, typer.Option("--common", help="Of common cards of every age.")] = False,
    out: Out = Path("predictions.json"),
) -> None:
    """Predict every format and task on every older card, and write a JSON record."""
    names, formats = (COMMON, COMMON_FORMATS) if common else (OLDER, FORMATS)
    shares = {spec.name: spec.cost.share for spec in attention_backends().values() if spec.cost.of == "dense"}
    settings = {
        "model": "bagel-7b",
        "request": asdict(Request(new_tokens=NEW_TOKENS)),
        "ram_gb": RAM_GB,
        "cards": {card.name: asdict(card) for card in CARDS if card.name in names},
        "calibration": asdict(MEASURED) | {"attention_share": shares},
    }
    write_record(out, "predictions of the planner, nothing measured", settings, list(predictions(names, formats)))


def predictions(
    names: Sequence[str] = OLDER, formats: Sequence[str] = FORMATS, tasks: Sequence[Task] = TASKS
) -> Iterator[dict[str, Any]]:
    """One row a card, format and task: what the plan chose, and the seconds and peak that it expects."""
    models = {format: ModelFacts.of_shape(format) for format in formats}
    for name in names:
        card = next(card for card in CARDS if card.name == name)
        for format, facts in models.items():
            for task in tasks:
                yield {"card": name, "format": format, "task": task, **_predicted(card, facts, task)}


def _predicted(card: Card, facts: ModelFacts, task: Task) -> dict[str, Any]:
    try:
        plan = make_plan(facts, known_machine(card, RAM_GB), Limits(), Request(tasks=(task,), new_tokens=NEW_TOKENS))
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

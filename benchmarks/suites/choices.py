"""`lowmem-bagel bench choices`: what `choose` says for common cards, by predictions; nothing is measured.

What the predictions rest on is in the record of `bench predictions --common`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem_bagel.cli.choose import commands, published, row
from lowmem_bagel.cli.machine import known_machine
from lowmem_bagel.formats.registry import formats
from lowmem_bagel.hardware.gpu_specs import called
from lowmem_bagel.planner import choice as rule
from lowmem_bagel.planner import fidelity
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.settings import Task

from ..options import Out
from ..record import write_record
from .predictions import COMMON, RAM_GB

REQUESTS: tuple[tuple[Task, int], ...] = (("generate", 1024), ("generate", 512), ("edit", 1024), ("ask", 1024))


def choices_command(out: Out = Path("choices.json")) -> None:
    """Choose for every common card, and write a JSON record."""
    settings = {"model": "bagel-7b", "ram_gb": RAM_GB, "rule": _rule(), "stored_bytes": _stored()}
    write_record(out, "choices by the planner's predictions, nothing measured", settings, list(choices()))


def choices() -> Iterator[dict[str, Any]]:
    """One row a card and request: the choice with its commands, and the first that loses nothing."""
    for name in COMMON:
        card = called(name)
        assert card is not None, name
        profile = known_machine(card, RAM_GB)
        for task, side in REQUESTS:
            wanted = rule.Wanted(task, side, side)
            ranked = rule.choose(published(profile), profile, wanted)
            best, lossless = ranked[0], next(choice for choice in ranked if not choice.losses)
            yield {
                "card": name,
                "task": task,
                "size": f"{side}x{side}",
                "recommended": row(best, best),
                "commands": commands(best, wanted),
                "lossless": row(lossless, best),
            }


def _rule() -> dict[str, float]:
    return {
        "a_loss_brings": rule.A_LOSS_BRINGS,
        "beyond_bounds_brings": rule.BEYOND_BOUNDS_BRINGS,
        "as_fast": rule.AS_FAST,
        "largest_error": fidelity.LARGEST_ERROR,
        "most_points": fidelity.MOST_POINTS,
        "rounding": fidelity.ROUNDING,
    }


def _stored() -> dict[str, dict[str, int]]:
    """Size on disk by format, whole and of what answers alone."""
    every = {name: ModelFacts.of_shape(name) for name in formats()}
    return {name: {"all": rule.stored_bytes(of), "und": rule.stored_bytes(of, "ask")} for name, of in every.items()}

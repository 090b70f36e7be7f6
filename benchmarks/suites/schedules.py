"""`lowmem-bagel bench schedules`: quality against evaluations for thousands of schedules, on the demo checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Out

SHOWN = ("evaluations", "chosen_on", "reported_on", "schedule")


def schedules_command(
    scenes: Annotated[int, typer.Option(help="Of each task; one half chooses, the other reports.")] = 48,
    most: Annotated[int, typer.Option(help="Schedules of each task, evenly taken from all; 0 for all.")] = 0,
    lot: Annotated[int, typer.Option(help="Schedules in one batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Of scenes and noise.")] = 2026,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    out: Out = Path("schedules.json"),
) -> None:
    """Draw and edit by every schedule, print the frontier and write a record after each task."""
    import torch
    from tokenizers import Tokenizer

    from lowmem_bagel.demo_checkpoint import FOLDER

    from ..demo.draw import Canvas
    from ..demo.export import load_checkpoint
    from ..demo.sampler import Sampler
    from ..demo.scenes import CANVASES
    from ..demo.schedules import Drawings, Edits, all_schedules, frontier, searched
    from ..demo.tokens import special_ids
    from ..record import write_record

    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    bagel, vae, config = load_checkpoint(FOLDER, where)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    factors = config.vae.scale_factor, config.vae.shift_factor
    sampler = Sampler(bagel, vae, *factors, tokenizer, special_ids(tokenizer), Canvas(*CANVASES[0]))
    results: dict[str, Any] = {}
    for task in (Drawings, Edits):
        schedules = list(all_schedules(task.editing))
        schedules = schedules[:: max(1, len(schedules) // most)] if most else schedules
        with torch.no_grad():
            found = list(searched(task(sampler, scenes, seed), schedules, lot))
        name = task.__name__.lower()
        results[name] = {"schedules": len(found), "frontier": frontier(found), "all": [_brief(row) for row in found]}
        write_record(out, "schedules", {"scenes": scenes, "most": most, "seed": seed, "device": where.type}, results)
        for row in results[name]["frontier"]:
            print(name, *(row[part] for part in SHOWN), flush=True)


def _brief(row: dict[str, Any]) -> list[Any]:
    """A row of the record: the schedule's values in the order of its fields, evaluations, distances."""
    numbers = [*row["chosen_on"], *row["reported_on"]]
    return [[*row["schedule"].values()], row["evaluations"], *(round(number, 4) for number in numbers)]

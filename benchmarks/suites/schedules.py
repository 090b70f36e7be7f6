"""`lowmem-bagel bench schedules`: quality against evaluations for thousands of schedules, on the demo checkpoint."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Out


def schedules_command(
    scenes: Annotated[int, typer.Option(help="Of each task; one half chooses, the other reports.")] = 48,
    minutes: Annotated[float, typer.Option(help="For each task; then the rest is left out.")] = 20,
    lot: Annotated[int, typer.Option(help="Schedules in one batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Of scenes, noise and order.")] = 2026,
    tasks: Annotated[str, typer.Option(help="drawings, edits, commas between.")] = "drawings,edits",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    out: Out = Path("schedules.json"),
) -> None:
    """Draw and edit by schedules of every family in turn, until all are through or the time is over; write a record
    after each lot, and print what a person would choose."""
    import torch
    from tokenizers import Tokenizer

    from lowmem_bagel.demo_checkpoint import FOLDER

    from ..demo.draw import Canvas
    from ..demo.export import load_checkpoint
    from ..demo.sampler import Sampler
    from ..demo.scenes import CANVASES
    from ..demo.schedules import ordered
    from ..demo.search import searched
    from ..demo.tasks import Drawings, Edits, Task
    from ..demo.tokens import special_ids
    from ..record import write_record

    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    bagel, vae, config = load_checkpoint(FOLDER, where)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    factors = config.vae.scale_factor, config.vae.shift_factor
    sampler = Sampler(bagel, vae, *factors, tokenizer, special_ids(tokenizer), Canvas(*CANVASES[0]))
    settings = {"scenes": scenes, "minutes": minutes, "lot": lot, "seed": seed, "device": where.type}
    kinds: dict[str, type[Task]] = {"drawings": Drawings, "edits": Edits}
    results: dict[str, Any] = {}
    for name in tasks.split(","):
        with torch.no_grad():
            task = kinds[name](sampler, scenes, seed)
            families: dict[str, list[Any]] = defaultdict(list)
            results[name] = families
            for found in searched(task, ordered(task.editing, seed), lot, minutes * 60):
                families[found.family].append(found.row())
                if sum(map(len, families.values())) % lot == 0:
                    write_record(out, "schedules", settings, results)
        write_record(out, "schedules", settings, results)
        print(name, {family: len(rows) for family, rows in families.items()}, flush=True)

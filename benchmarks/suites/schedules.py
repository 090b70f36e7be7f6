"""`lowmem-bagel bench schedules`: quality against evaluations for thousands of schedules, on the demo checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Out

SAME = ("scenes", "seed", "device")
"""Settings that the parts of one search have in common."""


def schedules_command(
    scenes: Annotated[int, typer.Option(help="Of each task; one half chooses, the other reports.")] = 48,
    minutes: Annotated[float, typer.Option(help="For each task; then the rest is left out.")] = 20,
    lot: Annotated[int, typer.Option(help="Schedules in one batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Of scenes, noise and order.")] = 2026,
    tasks: Annotated[str, typer.Option(help="drawings, edits, commas between.")] = "drawings,edits",
    part: Annotated[str, typer.Option(help="K/N: every Nth schedule from the Kth on; others have the rest.")] = "1/1",
    merge: Annotated[list[Path] | None, typer.Option(help="Put records of parts together instead.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    out: Out = Path("schedules.json"),
) -> None:
    """Draw and edit by schedules of every family in turn, until all are through or the time is over; write a record
    after each lot, and print what a person would choose."""
    if merge:
        _merge(merge, out)
        return
    first, every = _part(part)
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
    settings = {"scenes": scenes, "minutes": minutes, "lot": lot, "seed": seed, "part": part, "device": where.type}
    kinds: dict[str, type[Task]] = {"drawings": Drawings, "edits": Edits}
    results: dict[str, Any] = {}
    for name in tasks.split(","):
        with torch.no_grad():
            task = kinds[name](sampler, scenes, seed)
            families: dict[str, list[Any]] = defaultdict(list)
            results[name] = families
            for found in searched(task, ordered(task.editing, seed)[first - 1 :: every], lot, minutes * 60):
                families[found.family].append(found.row())
                if sum(map(len, families.values())) % lot == 0:
                    write_record(out, "schedules", settings, results)
        write_record(out, "schedules", settings, results)
        print(name, {family: len(rows) for family, rows in families.items()}, flush=True)


def _part(text: str) -> tuple[int, int]:
    """Raises SettingError unless it is two numbers, the first no greater than the second."""
    from lowmem_bagel.errors import SettingError

    numbers = text.split("/")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers) or not 0 < int(numbers[0]) <= int(numbers[1]):
        raise SettingError(f"part must be two numbers such as 2/6, not {text!r}")
    return int(numbers[0]), int(numbers[1])


def _merge(paths: Sequence[Path], out: Path) -> None:
    """Parts of one search, of one commit and kind of machine, as one record.

    Raises:
        SettingError: a record cannot be read, is no search, or is of other scenes or another machine than the first.
    """
    from ..merging import records_alike, save_merged

    records = records_alike(paths, "schedules", _same)
    results: dict[str, dict[str, list[Any]]] = {}
    for record in records:
        for task, families in record["results"].items():
            for family, rows in families.items():
                results.setdefault(task, {}).setdefault(family, []).extend(rows)
    settings = {name: value for name, value in records[0]["settings"].items() if name in SAME}
    save_merged(out, records, settings, results)


def _same(record: dict[str, Any]) -> dict[str, Any]:
    """What records must have in common."""
    machine = {name: record[name] for name in ("commit", "versions", "hardware")}
    return machine | {name: record["settings"][name] for name in SAME}

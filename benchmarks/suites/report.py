"""`lowmem-bagel bench report`: what each variant costs in memory, time and fidelity on this machine, in one run.

Rows are measured in processes of their own, so that memory that runs out or a crash is a row; a run that was stopped
goes on with the same command. `benchmarks/report/` has the parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import Size, Timesteps

if TYPE_CHECKING:
    from ..report.child import Child
    from ..report.matrix import Wanted
    from ..report.store import Record, Store
    from ..report.subject import Subject


def report_command(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="A checkpoint and variants of it; the demo checkpoint without. With --merge: reports."),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of bagel-7b, ..., in place of folders.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows and timesteps; seconds are extrapolated.")] = False,
    formats: Annotated[
        str | None, typer.Option(help="Commas between; of a checkpoint, those not among the folders are converted.")
    ] = None,
    limits: Annotated[
        str | None, typer.Option(help="GB of GPU memory, 0 for none; default: those of cards below this one.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Of generate, edit, ask; default: all.")] = None,
    rows: Annotated[
        str | None, typer.Option(help="These alone, blanks between: format:limit:task[:name=value...].")
    ] = None,
    size: Size = 1024,
    num_timesteps: Timesteps = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    repeat: Annotated[int, typer.Option(help="Measured runs of each row, after one warm-up.")] = 2,
    row_seconds: Annotated[float, typer.Option(help="No run of a row begins, and none goes on, after so long.")] = 150,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    material: Annotated[
        Path | None, typer.Option(help="Folder of your own prompts and pictures, for fidelity.")
    ] = None,
    no_fidelity: Annotated[bool, typer.Option("--no-fidelity", help="Nothing is compared with the source.")] = False,
    no_startup: Annotated[bool, typer.Option("--no-startup", help="Start-up is not measured.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Put reports together that this made elsewhere.")] = False,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the record and its pages.")] = Path("report"),
) -> None:
    """Measure rows in processes of their own, and write a JSON record after each, pages at the end."""
    from ..report.child import Child
    from ..report.matrix import Wanted, formats_of
    from ..report.parts import add_part, fidelity_options, startup_options
    from ..report.store import folder_for, merged, recorded
    from ..report.subject import subject

    if merge:
        _pages(merged(folders or (), out_dir))
        return
    of = subject(folders or (), shape, formats or formats_of(rows), size)
    wanted = Wanted.asked(of.formats, limits, tasks, rows, quick)
    conditions = {
        "shape": of.shape, "size": of.size, "num_timesteps": num_timesteps, "max_new_tokens": max_new_tokens,
        "repeat": 1 if quick else repeat, "row_seconds": row_seconds,
    }  # fmt: skip
    place = folder_for(out_dir)
    before = recorded(place)  # refused before anything is started
    child = Child({"device": device, "conditions": conditions})
    try:
        store = _measured(of, wanted, conditions, child, place, before)
    finally:
        child.close()
    if not no_fidelity:
        add_part("fidelity", fidelity_options(of, conditions, device, quick, material), store, of)
    if not no_startup:
        add_part("startup", startup_options(of, conditions), store, of)
    _pages(store.path)


def _measured(
    of: Subject, wanted: Wanted, conditions: dict[str, Any], child: Child, place: Path, before: Record | None
) -> Store:
    """All rows, in a record that is on disk."""
    from dataclasses import asdict, replace

    from ..report.matrix import text_of, without_idle_limits
    from ..report.running import Run, about_seconds, jobs
    from ..report.store import Store

    about = child.hello()
    machine = about["machine"]
    of.convert(child, place)
    head = {**about["environment"], "settings": {**conditions, "quick": wanted.quick}}
    store = Store(place, head, machine, of.models, before)
    rows = wanted.rows(machine["vram_total"] if machine["device"] == "cuda" else 0)
    owned = [asdict(replace(row, format=str(of.folders.get(row.format, row.format)))) for row in rows]
    found = list(zip(rows, child.ask("expect", rows=owned)["rows"], strict=True))
    kept = found if wanted.alone else without_idle_limits(found)
    all_jobs = jobs(kept, of.folders, conditions["num_timesteps"], conditions["row_seconds"], wanted.quick)
    todo = [job for job in all_jobs if not store.has(job.text)]
    for note in store.notes:
        print(f"note: {note}")
    minutes = about_seconds(todo, conditions["num_timesteps"], conditions["repeat"]) / 60
    print(
        f"{len(todo)} rows to measure, about {minutes:.0f} minutes; {len(all_jobs) - len(todo)} are there, "
        f"{len(found) - len(kept)} left out, whose limit limits nothing",
        flush=True,
    )
    try:
        Run(child, store, conditions["row_seconds"], lambda text: print(text, flush=True)).all(
            todo, [text_of(row) for row, _ in kept]
        )
    except KeyboardInterrupt:
        print(f"{len(store.results['rows'])} rows are in {store.path}; the same command goes on from there", flush=True)
        raise
    store.write()
    return store


def _pages(record: Path) -> None:
    """The record as pages and plots beside it."""
    from lowmem_bagel.errors import MissingExtraError

    from ..report.write import write_report

    try:
        write_report(record, record.parent)
    except MissingExtraError as missing:  # the record is there, and makes them later
        print(f"no pages: {missing}")
    print(f"wrote {record.parent}")

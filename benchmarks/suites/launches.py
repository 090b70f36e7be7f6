"""`lowmem-bagel bench launches`: what the host takes to launch an evaluation, and how two threads hinder each other.

Where that is more than the device takes, the device waits: for small pictures, on slow hosts, and where a process has
several cards to launch on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Out, Shape
from ..rows import Row


def launches_command(
    rows: Annotated[list[str], typer.Argument(help="format[:name=value...] of random weights; a folder for a format.")],
    shape: Shape = "bagel-7b",
    sizes: Annotated[str, typer.Option(help="Heights and widths in pixels, with commas between.")] = "1024,512,256",
    repeat: Annotated[int, typer.Option(help="Measured evaluations, after one warm-up.")] = 7,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    out: Out = Path("launches.json"),
) -> None:
    """Measure an evaluation of one branch, resident, at each size and write a JSON record after each row."""
    import torch

    from lowmem_bagel.errors import SettingError
    from lowmem_bagel.pipeline import BagelPipeline

    from ..launching import launches
    from ..measuring import Conditions, folder_of, free, load_settings
    from ..record import write_record

    sides = [int(part) for part in sizes.split(",") if part.strip().isdecimal()]
    if len(sides) != len(sizes.split(",")):
        raise SettingError(f"sizes must be numbers of pixels with commas between, such as 1024,512, not {sizes!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"shape": shape, "repeat": repeat}
    results: list[dict[str, Any]] = []
    for text in rows:
        row, conditions = Row.parse(text), Conditions(shape, device, max(sides), 2, 1, repeat, 0, None)
        torch.manual_seed(0)
        pipe = BagelPipeline.from_folder(folder_of(row, conditions), **load_settings(row, conditions))
        try:
            for side in sides:
                found = {"row": text, "size": side, "linears": pipe.model.plan.reasons.get("linears")}
                results.append(found | launches(pipe, side, repeat))
                print(_line(results[-1]), flush=True)
        finally:
            pipe.close()
        free()
        write_record(out, "launches", settings, results)


def _line(found: dict[str, Any]) -> str:
    def spoken(seconds: dict[str, float]) -> str:
        return f"{seconds['host'] * 1e3:.1f} ms (done {seconds['done'] * 1e3:.1f})"

    each = [f"{name} {spoken(seconds)}" for name, seconds in found["seconds"].items()]
    each += [f"a guided step, {name} {seconds * 1e3:.1f} ms" for name, seconds in found["step_seconds"].items()]
    graph = found["graph"]
    each.append(
        f"no graph: {found['graph_refused']}"
        if graph is None
        else f"by a graph {spoken(graph)}, {graph['bytes'] / 1e6:.0f} MB, same bits {graph['same_bits']}"
    )
    return f"{found['row']} {found['size']}: {found['launches']} launches, launched {'; '.join(each)}"

"""`lowmem-bagel bench engine`: seconds and peak memory of every variant under every limit, in one run.

A row is a format, a limit and a task. The limit is enforced on torch's allocator, with room left for the context.
Beside each limited row stands what could be reached at best: the resident run's time, or that of the bytes it streams
at the copy speed measured here.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Out, Shape, Size, Timesteps
from ..rows import PRESETS, Row


def engine_command(
    rows: Annotated[
        list[str] | None, typer.Argument(help="format[:limit GB[:task]][:name=value...]; a folder for a format.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"Rows of a table: {', '.join(PRESETS)}.")] = None,
    shape: Shape = "bagel-7b",
    size: Size = 1024,
    num_timesteps: Timesteps = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    repeat: Annotated[int, typer.Option(help="Measured runs of each row, after one warm-up.")] = 2,
    row_seconds: Annotated[float, typer.Option(help="No run of a row begins, and none goes on, after so long.")] = 150,
    both_batches: Annotated[
        bool,
        typer.Option("--both-batches", help="References with branches batched and one by one, for all to compare."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    out: Out = Path("engine.json"),
) -> None:
    """Measure rows one after the other and write a JSON record after each."""
    import torch

    from lowmem_bagel.diagnostics.probe import copy_speed
    from lowmem_bagel.errors import SettingError

    from ..measuring import Conditions, free, measure
    from ..record import write_record

    if preset is not None and preset not in PRESETS:
        raise SettingError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    texts = [*(PRESETS[preset] if preset else ()), *(rows or ())]
    if not texts:
        raise SettingError("nothing to measure; name rows or a preset")
    chosen = [Row.parse(text) for text in texts]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    copy_gbps = copy_speed(True, torch.cuda.mem_get_info()[0]) if device != "cpu" else None
    conditions = Conditions(shape, device, size, num_timesteps, max_new_tokens, repeat, row_seconds, copy_gbps)
    settings = {
        "shape": shape, "size": size, "num_timesteps": num_timesteps, "max_new_tokens": max_new_tokens,
        "repeat": repeat, "pinned_copy_gbps": copy_gbps,
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    for text, row in zip(texts, chosen, strict=True):
        both = both_batches and any(r.compared and r.drawing == row.drawing for r in chosen)
        start = time.perf_counter()
        try:
            found = measure(row, conditions, both)
        except Exception as error:  # a row that fails is a result, and the others still count
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(found["traceback"], flush=True)
        results.append({"row": text, "wall_seconds": time.perf_counter() - start, **found})
        free()
        write_record(out, "engine", settings, results)
        print(f"{text:34s}", _line(found), f"wall {results[-1]['wall_seconds']:.0f}", flush=True)


SHOWN = (
    "tokens_per_second", "extrapolated_seconds", "streamed_units", "guidance_batch", "equals_reference",
    "relative_l2_to_reference", "times_the_bound", "evaluations_computed", "preview_seconds",
    "previews_share", "finite", "linears",
)  # fmt: skip


def _line(found: dict[str, Any]) -> str:
    """A row in one line; GB are of tensors, of PyTorch, of the card, and as predicted for the card."""
    if "error" in found:
        return str(found["error"])[:200]
    seconds, predicted = found["seconds"], found["predicted"] or {}
    each = (*(found.get(f"{name}_bytes") for name in ("peak", "reserved", "device_used")), predicted.get("peak_bytes"))
    memory = ", ".join(f"{(nbytes or 0) / 1e9:.2f}" for nbytes in each)
    others = (f"{name} {found[name]:.4g}" if isinstance(found[name], float) else f"{name} {found[name]}"
              for name in SHOWN if found.get(name) is not None)  # fmt: skip
    return " ".join((f"{seconds['median']:.2f} s [{seconds['min']:.2f}, {seconds['max']:.2f}] {memory} GB", *others))

"""`lowmem-bagel bench accuracy`: task accuracy of variants of the demo checkpoint against it, prompt by prompt.

Each variant is made by the converter, loaded by the pipeline, and judged as `benchmarks.demo.evaluate` judges the
source; so are the source in other arithmetic (--ways, of which attention int8 takes every block, however small) and
with a step cache (--step-caches). Shares of so few results are coarse, so the record also counts the single results
that were lost and gained against the source, and how far the pictures are from its pictures.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..conversions import chosen, convert
from ..options import Out, Timesteps

if TYPE_CHECKING:
    import torch

    from lowmem_bagel import BagelPipeline
    from lowmem_bagel.ops.attention.base import AttentionBackend

    from ..demo.evaluate import Tally

    Tallies = dict[str, Tally]


@dataclass(frozen=True)
class Case:
    """What is judged: a folder, and how it is computed."""

    name: str
    folder: Path
    dtype: str | None = None
    attention: str = "auto"
    step_cache: str = "none"


def accuracy_command(
    folder: Annotated[Path | None, typer.Argument(help="Instead of the embedded checkpoint.")] = None,
    formats: Annotated[str, typer.Option(help="Variants of it, commas between.")] = "int8,nf4,dfloat11",
    ways: Annotated[str, typer.Option(help="It computed otherwise: DTYPE:ATTENTION, commas between.")] = "",
    step_caches: Annotated[str, typer.Option(help="It with a step cache, commas between.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Arithmetic.")] = "auto",
    answers: Annotated[int, typer.Option(help="How many.")] = 300,
    drawings: Annotated[int, typer.Option(help="How many.")] = 50,
    edits: Annotated[int, typer.Option(help="How many.")] = 50,
    clips: Annotated[str, typer.Option(help="future, future-unguided, future-light, clip, view, views=HOW MANY.")] = "",
    num_timesteps: Timesteps = 25,
    seed: Annotated[int, typer.Option(help="Of the scenes and the pictures.")] = 2026,
    processes: Annotated[int, typer.Option(help="Parts of the tasks judged at a time, a core each.")] = 1,
    out: Out = Path("accuracy.json"),
) -> None:
    """Judge answers, drawings, edits and clips of every variant, and write a JSON record after each."""
    from lowmem_bagel.demo_checkpoint import FOLDER

    from ..record import write_record

    found = chosen(formats)
    settings: dict[str, Any] = {
        "formats": found, "ways": _listed(ways), "step_caches": _listed(step_caches), "device": device, "dtype": dtype,
        "answers": answers, "drawings": drawings, "edits": edits, **_counts(clips), "num_timesteps": num_timesteps,
        "seed": seed,
    }  # fmt: skip
    model = folder or FOLDER
    results: dict[str, Any] = {}
    source: Tallies = {}
    with tempfile.TemporaryDirectory() as work:
        cases = [Case("source", model)]
        for name in found:
            settings["source_sha256"] = convert(model, Path(work) / name, name).source_sha256
            cases.append(Case(name, Path(work) / name))
        cases += [Case(way, model, *way.split(":")) for way in settings["ways"]]
        cases += [Case(cache, model, step_cache=cache) for cache in settings["step_caches"]]
        for case, tallies, run in _judged(cases, settings, processes):
            source = source or tallies
            results[case.name] = {**run, "tasks": compare(tallies, source)}
            write_record(out, "accuracy", settings, results)
            for task, row in results[case.name]["tasks"].items():
                print(f"{case.name}: {task} {row['right']} of {row['total']}, {row['points_above_source']:+} points")


def _judged(
    cases: Sequence[Case], settings: dict[str, Any], processes: int
) -> Iterator[tuple[Case, Tallies, dict[str, Any]]]:
    """The cases in their order: here, or every task in so many parts, which add up to the same."""
    if processes <= 1:
        for case in cases:
            yield case, *judged(case, settings, _asked(settings))
        return
    parts = [{task: some} for task, numbers in _asked(settings).items() for some in _split(numbers, processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_alone) as pool:
        begun = [[pool.submit(judged, case, settings, part) for part in parts] for case in cases]
        for case, waiting in zip(cases, begun, strict=True):
            done = [part.result() for part in waiting]
            seconds = round(sum(run["seconds"] for _, run in done), 1)
            yield case, _joined([tallies for tallies, _ in done]), {**done[0][1], "seconds": seconds}


def _split(numbers: range, parts: int) -> list[range]:
    """In so many parts, as long as each other within one; none is empty."""
    limits = [len(numbers) * part // parts for part in range(parts + 1)]
    return [numbers[start:stop] for start, stop in pairwise(limits) if stop > start]


def _joined(parts: Sequence[Tallies]) -> Tallies:
    whole: Tallies = {}
    for part in parts:
        for task, tally in part.items():
            if task in whole:
                whole[task].join(tally)
            else:
                whole[task] = tally
    return whole


def _alone() -> None:
    """A process of several keeps to one core."""
    import torch

    torch.set_num_threads(1)


def judged(case: Case, settings: dict[str, Any], asked: Mapping[str, range]) -> tuple[Tallies, dict[str, Any]]:
    """The tasks' requests of these numbers, in the order and with the prompts that the settings alone tell; and how
    they were computed."""
    from lowmem_bagel import BagelPipeline

    started = time.monotonic()
    loaded = "auto" if case.attention == "int8" else case.attention
    pipe = BagelPipeline.from_pretrained(
        case.folder, device=settings["device"], dtype=case.dtype or settings["dtype"], attention=loaded
    )
    if case.attention == "int8":
        pipe.model = replace(pipe.model, attention=by_integers(pipe.model.attention, pipe.model.device))
    tallies = _tallied(pipe, settings, asked, case.step_cache)
    plan = {
        "dtype": pipe.model.plan.dtype,
        "linears": pipe.model.plan.reasons["linears"],
        "attention": pipe.model.attention.name,
    }
    pipe.close()
    return tallies, {**plan, "seconds": round(time.monotonic() - started, 1)}


def by_integers(companion: AttentionBackend, device: torch.device) -> AttentionBackend:
    """Attention `int8` of every block of two queries or more that sees all keys: the embedded model's pictures have
    fewer tokens than the backend takes. By the kernel on a card, by its reference elsewhere."""
    import torch

    from lowmem_bagel.kernels import attention_int8
    from lowmem_bagel.ops.attention.int8 import Int8

    if device.type == "cuda":
        launch = attention_int8.launch_for(torch.cuda.get_device_capability(device))
        return Int8(partial(attention_int8.attention_int8, launch=launch), companion, least=2)
    return Int8(attention_int8.attention_int8_reference, companion, least=2)


def tallied(pipe: BagelPipeline, settings: dict[str, Any], step_cache: str = "none") -> Tallies:
    """The tasks of a loaded model that the settings ask for, by name and number."""
    return _tallied(pipe, settings, _asked(settings), step_cache)


def _tallied(pipe: BagelPipeline, settings: dict[str, Any], asked: Mapping[str, range], step_cache: str) -> Tallies:
    from ..demo.evaluate import TASKS

    sampling = {"num_timesteps": settings["num_timesteps"], "step_cache": step_cache}
    return {name: TASKS[name](pipe, numbers, settings["seed"], sampling) for name, numbers in asked.items()}


def _asked(settings: dict[str, Any]) -> dict[str, range]:
    """The numbers of the requests of each task that is asked for."""
    from ..demo.evaluate import TASKS

    return {name: range(settings[name]) for name in TASKS if settings.get(name)}


def _counts(text: str) -> dict[str, int]:
    from ..demo.evaluate import CLIPS

    counts = {}
    for part in _listed(text):
        name, _, count = part.partition("=")
        if name not in CLIPS or not count.isdecimal():
            raise typer.BadParameter(f"{part!r} is not one of {', '.join(CLIPS)} with how many of it: future=200")
        counts[name] = int(count)
    return counts


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def compare(found: Tallies, source: Tallies) -> dict[str, Any]:
    """Per task: right of total, points (hundredths) above the source, single results lost and gained; of its pictures,
    how many are equal, and the median picture's mean distance from the source's in levels of 255."""
    import numpy as np

    rows = {}
    for task, tally in found.items():
        if not tally.total:
            continue
        wrong, wrong_before = ({fault["text"] for fault in t.faults} for t in (tally, source[task]))
        rows[task] = {
            "right": tally.right,
            "total": tally.total,
            "points_above_source": round(100 * (tally.right - source[task].right) / tally.total, 2),
            "lost": sorted(wrong - wrong_before),
            "gained": sorted(wrong_before - wrong),
            "by_kind": tally.by_kind,
            **tally.marks,
        }
        if tally.pictures:
            distances = [
                float(np.abs(a.astype(np.int16) - b).mean())
                for a, b in zip(tally.pictures, source[task].pictures, strict=True)
            ]
            rows[task] |= {"equal_pictures": distances.count(0.0), "median_distance": statistics.median(distances)}
    return rows

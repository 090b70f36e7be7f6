"""Task accuracy of variants of the demo checkpoint against the checkpoint itself, on the same prompts and seeds.

    python -m lowmem_bagel.benchmarks.suites.accuracy [FOLDER] [--formats int8 nf4 ...] [--answers 300] [--out FILE]

Each variant is made by the converter, loaded by the pipeline, and judged as `benchmarks.demo.evaluate` judges the
source; so are the source in other arithmetic (--ways) and with a step cache (--step-caches). Shares of so few results
are coarse, so the record also counts the single results that were lost and gained against the source, and how far the
pictures are from its pictures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowmem_bagel.sampling.step_caches.registry import step_caches

from ..demo.evaluate import Tally, evaluate_answers, evaluate_drawings, evaluate_edits
from ..record import write_record

if TYPE_CHECKING:
    from lowmem_bagel import BagelPipeline

RESULTS = Path(__file__).parent.parent / "results"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dfloat11": ("dfloat11", {}),
    "int8": ("int8", {}),
    "int8 with embeddings": ("int8", {"embeddings": True}),
    "int8 rotated": ("int8", {"rotate": True}),
    "fp16": ("fp16", {}),
    "nf4": ("nf4", {}),
}
Tallies = dict[str, Tally]


def evaluate(pipe: BagelPipeline, options: argparse.Namespace, step_cache: str = "none") -> Tallies:
    """The three tasks, in the order and with the prompts that depend on the options alone."""
    sampling = {"num_timesteps": options.num_timesteps, "step_cache": step_cache}
    return {
        "answers": evaluate_answers(pipe, options.answers, options.seed),
        "drawings": evaluate_drawings(pipe, options.drawings, options.seed, sampling),
        "edits": evaluate_edits(pipe, options.edits, options.seed, sampling),
    }


def compare(found: Tallies, source: Tallies) -> dict[str, Any]:
    """Per task: right of total, points (hundredths) above the source, single results lost and gained; of its pictures,
    how many are equal, and the median picture's mean distance from the source's in levels of 255."""
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
        }
        if tally.pictures:
            distances = [
                float(np.abs(a.astype(np.int16) - b).mean())
                for a, b in zip(tally.pictures, source[task].pictures, strict=True)
            ]
            rows[task] |= {"equal_pictures": distances.count(0.0), "median_distance": statistics.median(distances)}
    return rows


def main() -> None:
    from lowmem_bagel import BagelPipeline
    from lowmem_bagel.demo_checkpoint import FOLDER

    parser = argparse.ArgumentParser(description="Task accuracy of variants against their source.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--formats", nargs="*", choices=CASES, default=["int8", "nf4", "dfloat11"])
    parser.add_argument("--ways", nargs="*", default=[], help="the source computed otherwise: DTYPE:ATTENTION")
    parser.add_argument("--step-caches", nargs="*", default=[], choices=[*step_caches()])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--answers", type=int, default=300)
    parser.add_argument("--drawings", type=int, default=50)
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--num-timesteps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy_demo.json")
    options = parser.parse_args()

    def tallied(
        folder: Path, dtype: str = options.dtype, attention: str = "auto", step_cache: str = "none"
    ) -> tuple[Tallies, dict[str, Any]]:
        started = time.monotonic()
        pipe = BagelPipeline.from_pretrained(folder, device=options.device, dtype=dtype, attention=attention)
        tallies = evaluate(pipe, options, step_cache)
        plan = {
            "dtype": pipe.model.plan.dtype,
            "linears": pipe.model.plan.reasons["linears"],
            "attention": pipe.model.attention.name,
        }
        pipe.close()
        return tallies, {**plan, "seconds": round(time.monotonic() - started, 1)}

    source, run = tallied(options.folder)
    (converter,) = entry_points(group="lowmem_bagel.tools", name="convert")
    results: dict[str, Any] = {"source": {**run, "tasks": compare(source, source)}}
    settings = {name: value for name, value in vars(options).items() if name not in ("folder", "out")}

    def add(case: str, tallies: Tallies, run: dict[str, Any]) -> None:
        results[case] = {**run, "tasks": compare(tallies, source)}
        write_record(options.out, "accuracy", settings, results)
        for task, row in results[case]["tasks"].items():
            print(f"{case}: {task} {row['right']} of {row['total']}, {row['points_above_source']:+} points", flush=True)

    for case in options.formats:
        name, conversion = CASES[case]
        with tempfile.TemporaryDirectory() as work:
            manifest = converter.load()(options.folder, Path(work) / "variant", name, conversion)
            settings["source_sha256"] = manifest.source_sha256
            print(case, flush=True)
            add(case, *tallied(Path(work) / "variant"))
    for way in options.ways:
        print(way, flush=True)
        add(way, *tallied(options.folder, *way.split(":")))
    for cache in options.step_caches:
        print(cache, flush=True)
        add(cache, *tallied(options.folder, step_cache=cache))


if __name__ == "__main__":
    main()

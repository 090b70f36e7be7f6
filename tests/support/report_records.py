"""Records of `bench report` for tests: rows of the committed engine records, and made-up fidelity and start-up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from lowmem_bagel.benchmarks.record import read_records
from lowmem_bagel.benchmarks.rows import Row
from PIL import Image

from support.engine_report import report_of_engine

from .paths import RESULTS

SIZES = {"source": 29_210_000_000, "dfloat11": 19_890_000_000, "int8": 15_600_000_000, "nf4": 9_000_000_000}
SIDE = 48


def engine_rows() -> list[dict[str, Any]]:
    """Of the H200's records, in the report's shape, with sizes that are about right."""
    rows = report_of_engine(read_records(RESULTS))["results"]["rows"]
    return [{**row, "stored_bytes": SIZES[row["format"]], "energy_why": "no driver"} for row in rows]


def failed_row(row: str, state: str, why: str) -> dict[str, Any]:
    parsed = Row.parse(row)
    return {
        "row": row,
        "format": parsed.format,
        "limit_gb": parsed.limit_gb,
        "task": parsed.task,
        "state": state,
        "why": why,
    }


def _variant(name: str, kind: str, noise: float, files: list[str]) -> dict[str, Any]:
    exact = not noise
    psnr = None if exact else {"median": 48 - 10 * noise, "worst": 44 - 10 * noise}
    return {
        "name": name, "kind": kind, "state": "measured", "why": None, "exact": exact,
        "text": {
            "kl_nats": {"mean": noise**2 / 500, "max": noise**2 / 50}, "greedy_agreement": 1 - noise / 50,
            "tokens": 800,
        },
        "pictures": {
            "count": 2, "psnr_db": psnr, "ssim": {"median": 1 - noise / 40, "worst": 1 - noise / 30},
            "perceptual": {"missing": "no weights in a registry package"}, "files": files,
        },
        "velocity": {"per_step": [noise / 100] * 4, "first_plain": noise / 100, "first_guided": noise / 40},
        "layers": [noise / 100] * 28,
        "accuracy": None,
    }  # fmt: skip


VARIANTS = (
    ("dfloat11", "format", 0.0), ("int8", "format", 0.8), ("nf4", "format", 2.2), ("taylorseer", "step cache", 1.4),
    ("float16", "arithmetic", 0.1),
)  # fmt: skip


def report_record() -> dict[str, Any]:
    """As it is on an H200, its pictures' files not written."""
    engine = json.loads((RESULTS / "engine_limits_h200.json").read_text(encoding="utf-8"))
    lost = [
        failed_row("source:4", "out of memory", "the plan needs 4.9 GB; a limit of 4 GB is too small"),
        failed_row("gguf-q4_k:4:edit", "failed", "RuntimeError: something broke"),
        failed_row("int8::ask:backend=quanto", "not here", "optimum-quanto is not installed"),
    ]
    names = ("dfloat11", "int8", "nf4", "source")
    phases = {"imports": 3.1, "open": 0.4, "kernels": 2.0, "weights": 6.0}
    return {
        "benchmark": "report",
        "command": "lowmem-bagel bench report --shape bagel-7b",
        **{name: engine[name] for name in ("hardware", "versions", "commit", "settings")},
        "results": {
            "rows": engine_rows() + lost,
            "fidelity": {
                "material": {"prompts": 2, "texts": 4},
                "source": {"name": "source", "files": ["pictures/source-0.png", "pictures/source-1.png"]},
                "variants": [
                    _variant(name, kind, noise, [f"pictures/{name}-{seed}.png" for seed in range(2)])
                    for name, kind, noise in VARIANTS
                ],
            },
            "startup": {
                "rows": [
                    {
                        "format": name, "limit_gb": 0, "cold": {**phases, "weights": 20.0 - 2 * n},
                        "warm": {**phases, "whole": sum(phases.values())},
                        "cold_first_step": 22.5, "warm_first_step": 3.5,
                    }
                    for n, name in enumerate(names)
                ]
            },
            "machine": {"name": "NVIDIA H200"},
        },
    }  # fmt: skip


def written(folder: Path, record: dict[str, Any] | None = None) -> Path:
    """The record in a folder, with its pictures beside it."""
    path = folder / "report.json"
    path.write_text(json.dumps(record or report_record()), encoding="utf-8")
    (folder / "pictures").mkdir(exist_ok=True)
    for seed in range(2):
        source = _scene(seed)
        _save(source, folder / "pictures" / f"source-{seed}.png")
        for name, _, noise in VARIANTS:
            changed = source + np.random.default_rng(seed).normal(0, 4 * noise, source.shape)
            _save(changed, folder / "pictures" / f"{name}-{seed}.png")
    return path


def _scene(seed: int) -> Any:
    """A disc on a gradient."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    scene = np.stack([x, y, 1 - x], axis=-1) * 200
    scene[(x - 0.5) ** 2 + (y - 0.4 - 0.2 * seed) ** 2 < 0.06] = (220, 60, 40)
    return scene


def _save(values: Any, path: Path) -> None:
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(path)

"""The page of the kernels: what each reaches of the machine's ceiling, and what else does the same.

From the records of `benchmarks.suites.kernels`, `benchmarks.kernels_lossless`, `benchmarks.kernels_steps` and
`benchmarks.codec_errors`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .markdown import digits, prose, section, table

Figures = Mapping[str, Any]
FP8 = "_scaled_mm fp8"
FORMATS = ("int8", "int8 rotated", "fp8")
OUTLIERS = "inputs with outlier channels"
PICTURE_TOKENS = ("4096", "8192")
"""Of a 1024x1024 picture: one branch of guidance, or two in a batch."""


@dataclass(frozen=True)
class KernelRecords:
    """The records that the page is made from, as they were written."""

    kernels: dict[str, Any]
    lossless: dict[str, Any]
    steps: dict[str, Any]
    random_errors: list[dict[str, Any]]
    """Of the formats, fp8 among them, on made-up matrices and activations."""
    demo_errors: list[dict[str, Any]]
    """Of the same, on the embedded model and its own activations."""
    sanitizer: str
    """What compute-sanitizer printed last of each run."""

    @classmethod
    def read(cls, folder: Path) -> KernelRecords:
        def record(name: str) -> dict[str, Any]:
            found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            return found

        sanitizer = (folder / "sanitizer_h200.txt").read_text(encoding="utf-8")
        made_up, demo = (record(f"codec_errors_{name}")["results"] for name in ("random", "demo_checkpoint"))
        kernels, lossless, steps = (record(f"kernels_{name}h200") for name in ("", "lossless_", "steps_"))
        return cls(kernels, lossless, steps, made_up, demo, sanitizer)


def kernel_page(records: KernelRecords) -> str:
    """The whole page as Markdown."""
    parts = [
        _conditions(records), _decoding(records), _triton(records), _steps(records),
        _fp8(records), _memory(records), _again(),
    ]  # fmt: skip
    return "\n\n".join(["# Kernels", *parts]) + "\n"


def _conditions(records: KernelRecords) -> str:
    k, lossless = records.kernels, records.lossless["results"]
    limits, card = k["results"]["ceilings"], k["hardware"]["gpu"].removeprefix("NVIDIA ")
    return prose(
        "Made by `python -m lowmem_bagel.benchmarks.pages.performance` from the records in `benchmarks/results`.",
        f"Measured on one {card} with PyTorch {k['versions']['torch']} and Triton {k['versions']['triton']}, commit "
        f"{k['commit']}, at BAGEL-7B's shapes. Its ceilings, measured by the same program: "
        f"{limits['copy_bytes_s'] / 1e9:.0f} GB/s copied (read and written), {limits['read_bytes_s'] / 1e9:.0f} GB/s "
        f"read alone, {limits['half_matmul_ops_s'] / 1e12:.0f} TFLOP/s in a bf16 matmul of 8192x8192x8192; an int8 "
        "ceiling is twice that. The lossless kernels' run measured "
        f"{lossless['copy_gb_s']:.0f} and {lossless['read_gb_s']:.0f} GB/s. "
        "Inputs are fresh and beyond the cache; every result was compared with the kernel's reference on poisoned "
        "memory before it was timed.",
    )


def _decoding(records: KernelRecords) -> str:
    found = records.lossless["results"]["dfloat11"]
    rows = (
        (
            "a whole layer" if name == "layer" else name, f"{f['gb_s']:.0f}", f"{f['of_ceiling']:.0%}",
            f"{f['published_gb_s']:.0f}", f"{f['gb_s'] / f['published_gb_s']:.2f}",
        )
        for name, f in found.items()
        if isinstance(f, Mapping) and "gb_s" in f
    )  # fmt: skip
    return section(
        "DFloat11: codes to bf16",
        prose(
            f"{found['bits_per_weight']:.2f} bits a weight. GB/s of bf16 written; the share of the ceiling counts the "
            "compressed bytes read as well. Beside it the dfloat11 package's own kernel on the same bytes."
        ),
        table(("", "GB/s", "of ceiling", "the package's, GB/s", "times faster"), rows),
    )


def _cases(found: Iterable[Figures]) -> str:
    """A table of timed kernels."""

    def cells(f: Figures) -> Iterator[str]:
        scale, unit = (1e9, "GB/s") if f["unit"] == "B/s" else (1e12, "TOP/s")
        yield from (f["kernel"], f["shape"].replace(" x ", "x"), _us(f["seconds"]), f"{f['rate'] / scale:.0f} {unit}")
        yield from (f"{f['of_ceiling']:.0%}", f"{f['error']:.0e}")
        yield ", ".join(f"{name} {_us(taken)}" for name, taken in f["rivals"].items())

    return table(("kernel", "shape", "us", "rate", "of ceiling", "error", "others"), map(cells, found))


def _triton(records: KernelRecords) -> str:
    return section(
        "Triton's kernels",
        prose(
            "Microseconds in a CUDA graph of many calls; the error is relative L2 against the reference. A kernel of a "
            "few microseconds is bound by its launch, not by bytes. `gemv` serves one token; rows of more tokens show "
            "where the matmuls take over. The last column has what else does the same, in microseconds."
        ),
        _cases(records.kernels["results"]["kernels"]),
    )


def _steps(records: KernelRecords) -> str:
    limits = records.steps["results"]["ceilings"]
    return section(
        "The kernels that need no Triton",
        prose(
            "What surrounds the matmuls on cards without bfloat16 or without Triton (`kernels/token_steps.py`): "
            '"halve" scales a token and makes it fp16, "widen", "add" and "activate" take a matmul\'s product. Commit '
            f"{records.steps['commit']}; ceilings of that run: {limits['copy_bytes_s'] / 1e9:.0f} GB/s copied, "
            f"{limits['read_bytes_s'] / 1e9:.0f} GB/s read. The last column has PyTorch's operations, in microseconds. "
            "NF4 for one token is bound by looking codes up."
        ),
        _cases(records.steps["results"]["kernels"]),
    )


def _fp8(records: KernelRecords) -> str:
    shares = [
        f["rivals"][FP8] / f["seconds"]
        for f in records.kernels["results"]["kernels"]
        if f["kernel"] == "int8_matmul" and FP8 in f["rivals"] and f["shape"].split()[1] in PICTURE_TOKENS
    ]
    errors = median_errors(records)
    rows = ((name, *(f"{found[format]:.3f}" for format in FORMATS)) for name, found in errors.items())
    return section(
        "Why there is no fp8 variant",
        prose(
            f"With {' or '.join(PICTURE_TOKENS)} tokens, PyTorch's fp8 matmul with row and token scales takes "
            f"{min(shares):.2f} to {max(shares):.2f} of the time of ours in int8, and as many bytes. Its results are "
            "off by more, as three bits of mantissa are (relative L2 of a linear's output, medians):"
        ),
        table(("", *FORMATS), rows),
        prose(
            "Only inputs with outlier channels are worse for plain INT8, and `--rotate` is there for those. The time "
            "was not thought worth that, so fp8 is not built; the benchmark goes on timing it."
        ),
    )


def median_errors(records: KernelRecords) -> dict[str, dict[str, float]]:
    """Of each of FORMATS, the relative L2 of a linear's output, the median over the matrices of each kind of data."""
    data = {
        "normal weights and inputs": [f for f in records.random_errors if "normal weight, normal" in f["tensor"]],
        "heavy-tailed weights": [f for f in records.random_errors if "heavy" in f["tensor"]],
        OUTLIERS: [f for f in records.random_errors if "outlier" in f["tensor"]],
        "the embedded model on its own activations": records.demo_errors,
    }
    return {
        name: {format: median(f["arithmetic"] for f in found if f["format"] == format) for format in FORMATS}
        for name, found in data.items()
    }


def _memory(records: KernelRecords) -> str:
    lines = "\n".join(f"    {line}" if line else "" for line in records.sanitizer.splitlines())
    return section("compute-sanitizer", prose("Its memcheck over the kernels' tests on the same kind of card:"), lines)


def _again() -> str:
    folder = "benchmarks/results"
    commands = [
        f"    python -m lowmem_bagel.benchmarks.suites.kernels {folder}/kernels_h200.json",
        f"    python -m lowmem_bagel.benchmarks.suites.kernels_lossless {folder}/kernels_lossless_h200.json --tune",
        f"    python -m lowmem_bagel.benchmarks.suites.kernels_steps {folder}/kernels_steps_h200.json",
        "    python -m lowmem_bagel.benchmarks.suites.codec_errors",
        "    python -m lowmem_bagel.benchmarks.suites.codec_errors --model lowmem_bagel/demo_checkpoint --timesteps 12",
    ]
    return section("Measuring again", "\n".join(commands))


def _us(seconds: float) -> str:
    return digits(seconds * 1e6)

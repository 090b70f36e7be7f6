"""Seconds, peak memory and sizes of conversions of a checkpoint at a true shape, each in a process of its own.

    python -m lowmem_bagel.benchmarks.suites.conversion WORK_FOLDER [--layers 28] [--formats int8 ...]

Random weights are N(0, 0.02), so sizes are those of the published checkpoint's shape; DFloat11 takes 10.80 bits a
weight of these and 10.87 of trained ones. `load_before` is the machine's load average as each conversion began: above
0, seconds include waiting for others' work, and `processor_seconds` are what the conversion itself took.

Memory is anonymous resident memory (file-mapped pages aside), sampled from /proc every 20 ms. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lowmem_bagel.checkpoint.config import BagelConfig
from lowmem_bagel.checkpoint.manifest import read_manifest
from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.checkpoint.variant_summary import encoded_bits_per_weight, summarise

from ..record import write_record
from ..synthetic import SHAPES, write_checkpoint

RESULTS = Path(__file__).parent.parent / "results"
SAMPLE_SECONDS = 0.02
CONVERT = """
import json, sys
from pathlib import Path
from lowmem_bagel.converters.registry import convert_folder
source, out, name, options = sys.argv[1:]
convert_folder(Path(source), Path(out), name, json.loads(options))
"""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dfloat11": ("dfloat11", {}),
    "int8": ("int8", {}),
    "int8 with embeddings": ("int8", {"embeddings": True}),
    "int8 rotated": ("int8", {"rotate": True}),
    "fp16": ("fp16", {}),
    "nf4": ("nf4", {}),
}


def measure(source: Path, out: Path, case: str) -> dict[str, Any]:
    """Convert once; the result's folder stays."""
    name, options = CASES[case]
    busy = os.getloadavg()[0]
    start, used = time.perf_counter(), _child_seconds()
    process = subprocess.Popen([sys.executable, "-c", CONVERT, str(source), str(out), name, json.dumps(options)])
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{case}: the conversion failed with {process.returncode}")
    manifest = read_manifest(out)
    assert manifest is not None
    read = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    return {
        "case": case,
        "seconds": round(seconds, 1),
        "processor_seconds": round(_child_seconds() - used, 1),
        "load_before": round(busy, 1),
        "source_megabytes_per_second": round(read / seconds / 1e6),
        "peak_anonymous_bytes": peak,
        "bytes": sum(shard.bytes for shard in manifest.shards.values()),
        "encoded_bits_per_weight": round(encoded_bits_per_weight(manifest), 4),
        "parts": [
            {**dataclasses.asdict(row), "bits_per_weight": round(row.bits_per_weight, 4)}
            for row in summarise(manifest, tensor_table(BagelConfig.from_folder(out)))
        ],
    }


def _child_seconds() -> float:
    """Processor time of the conversions that ended: on a machine that does other work too, what they cost."""
    times = os.times()
    return times.children_user + times.children_system


def _anonymous_bytes(pid: int) -> int:
    """0 where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _shape(layers: int) -> str:
    """The name of BAGEL's shape with so many decoder layers, made known to `write_checkpoint`."""
    if layers == SHAPES["bagel-7b"].decoder.num_layers:
        return "bagel-7b"
    whole = SHAPES["bagel-7b"]
    decoder = dataclasses.replace(whole.decoder, num_layers=layers)
    SHAPES[f"bagel-7b, {layers} layers"] = dataclasses.replace(whole, decoder=decoder)
    return f"bagel-7b, {layers} layers"


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds, peak memory and sizes of conversions.")
    parser.add_argument("work", type=Path, help="an empty folder with room for the source and the largest variant")
    parser.add_argument("--source", type=Path, help="a checkpoint, instead of random weights at the 7B shape")
    parser.add_argument("--layers", type=int, default=28, help="decoder layers of the random checkpoint")
    parser.add_argument("--formats", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS / "conversion_bagel-7b.json")
    arguments = parser.parse_args()
    source = arguments.source or arguments.work / "source"
    if not source.exists():
        write_checkpoint(_shape(arguments.layers), source, "cpu")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    weights = "random" if not arguments.source else "own"
    settings = {"layers": arguments.layers, "source_bytes": size, "source": weights}
    results = []
    for case in arguments.formats:
        out = arguments.work / "variant"
        row = measure(source, out, case)
        shutil.rmtree(out)
        print(json.dumps({key: value for key, value in row.items() if key != "parts"}), flush=True)
        results.append(row)
        write_record(arguments.out, "conversion", settings, results)


if __name__ == "__main__":
    main()

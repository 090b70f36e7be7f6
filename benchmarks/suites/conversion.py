"""`lowmem-bagel bench conversion`: seconds, peak memory and sizes of conversions, each in a process of its own.

Random weights are N(0, 0.02), so sizes are those of the published checkpoint's shape; DFloat11 takes 10.80 bits a
weight of these and 10.87 of trained ones. `load_before` is the machine's load average as each conversion began: above
0, seconds include waiting for others' work, and `processor_seconds` are what the conversion itself took.

`phases` are the seconds that each stage of the engine was at work; they overlap, and where they share cores they wait
for each other. `bounds` is what single stages reach alone.

Memory is anonymous resident memory (file-mapped pages aside), sampled from /proc every 20 ms. Linux only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..conversions import CASES, bounds, chosen
from ..options import Out, Shape

SAMPLE_SECONDS = 0.02
CONVERT = "import sys; from lowmem_bagel.benchmarks.conversions import timed; timed(*sys.argv[1:])"


def conversion_command(
    work: Annotated[Path, typer.Argument(help="An empty folder with room for the source and the largest variant.")],
    source: Annotated[Path | None, typer.Option(help="A checkpoint, instead of random weights.")] = None,
    shape: Shape = "bagel-7b",
    layers: Annotated[int | None, typer.Option(help="So many decoder layers instead of all.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each, of which the quickest counts.")] = 1,
    formats: Annotated[str, typer.Option(help="Some of them, commas between.")] = ",".join(CASES),
    out: Out = Path("conversion.json"),
) -> None:
    """Convert a checkpoint to every format, and write a JSON record."""
    from ..record import write_record
    from ..shapes import projections, shape_named
    from ..synthetic import write_checkpoint

    cases, given, config = chosen(formats), source or work / "source", shape_named(shape)
    if layers is not None:
        config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=layers))
    if not given.exists():
        write_checkpoint(config, given, "cpu")
    gate = projections(config.decoder)["gate"]
    size = sum(path.stat().st_size for path in given.glob("*.safetensors"))
    settings = {"shape": shape, "repeat": repeat, "layers": config.decoder.num_layers, "source_bytes": size}
    settings |= {"source": "own" if source else "random", "bounds_megabytes_per_second": bounds(work, gate)}
    results = []
    for case in cases:
        row = quickest(given, work / "variant", case, repeat)
        print(json.dumps({key: value for key, value in row.items() if key != "parts"}), flush=True)
        results.append(row)
        write_record(out, "conversion", settings, results)


def quickest(source: Path, out: Path, case: str, repeat: int) -> dict[str, Any]:
    """Convert some times; the folders are removed."""
    rows = []
    for _ in range(repeat):
        rows.append(measure(source, out, case))
        shutil.rmtree(out)
    return min(rows, key=lambda row: float(row["seconds"]))


def measure(source: Path, out: Path, case: str) -> dict[str, Any]:
    """Convert once; the result's folder stays."""
    from lowmem_bagel.checkpoint.folder import ModelFolder
    from lowmem_bagel.checkpoint.manifest import read_manifest
    from lowmem_bagel.checkpoint.tensors import tensor_table
    from lowmem_bagel.checkpoint.variant_summary import encoded_bits_per_weight, summarise

    busy = os.getloadavg()[0]
    start, used = time.perf_counter(), _child_seconds()
    process = subprocess.Popen([sys.executable, "-c", CONVERT, str(source), str(out), case], stdout=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{case}: the conversion failed with {process.returncode}")
    assert process.stdout is not None
    with process.stdout:
        phases = json.loads(process.stdout.read().splitlines()[-1])
    manifest = read_manifest(out)
    assert manifest is not None
    read = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    return {
        "case": case,
        "seconds": round(seconds, 1),
        "processor_seconds": round(_child_seconds() - used, 1),
        "load_before": round(busy, 1),
        "source_megabytes_per_second": round(read / seconds / 1e6),
        "phases": phases,
        "peak_anonymous_bytes": peak,
        "bytes": sum(shard.bytes for shard in manifest.shards.values()),
        "encoded_bits_per_weight": round(encoded_bits_per_weight(manifest), 4),
        "parts": [
            {**dataclasses.asdict(row), "bits_per_weight": round(row.bits_per_weight, 4)}
            for row in summarise(manifest, tensor_table(ModelFolder.open(out).config))
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

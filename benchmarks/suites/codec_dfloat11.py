"""Speed, size and memory of the DFloat11 codec on the CPU, at the 7B shapes and on real weights.

    python -m lowmem_bagel.benchmarks.suites.codec_dfloat11 [--package FOLDER] [--weights FILE.safetensors]

Encoding is timed as a whole: sign and mantissa bytes, histogram, code book, stream, gaps and positions. Verification is
decoding everything again and comparing it bit for bit, gaps and positions included. Every figure is the best of
`--repeats`; other work on the machine makes them smaller, so the load before each case is in the record, and so are
rates for a second of processor time, which it touches less. Peak memory is that of all arrays but the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lowmem_bagel.formats.dfloat11 import codec as dfloat11

from ..record import write_record

RESULTS = Path(__file__).parent.parent / "results"
SHAPES = {"gate_proj": (18944, 3584), "q_proj": (3584, 3584), "k_proj": (512, 3584), "embed_tokens": (152064, 3584)}
PACKAGE_SAMPLE = 2_000_000
"""Weights that the package's encoder is timed on: it needs seconds for these."""


def best(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of the fastest of some runs, and the least processor seconds that one took on all cores together."""
    seconds, busy = [], []
    for _ in range(repeats):
        start, start_busy = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
    return min(seconds), min(busy)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a run holds in arrays, its result included."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def normal(shape: tuple[int, int]) -> Tensor:
    """N(0, 0.02) in bf16, made in rows so that no float32 copy of the whole exists."""
    weight = torch.empty(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for rows in torch.split(weight, 2048):
        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
    return weight


def measure(name: str, weight: Tensor, threads: int, repeats: int) -> dict[str, Any]:
    """One row of the record; rates in millions of weights a second."""
    load = os.getloadavg()[0]
    encoded = dfloat11.encode([weight], threads=threads)
    out = torch.empty(weight.numel(), dtype=torch.bfloat16)
    encoding, encoding_busy = best(lambda: dfloat11.encode([weight], threads=threads), repeats)
    decoding, decoding_busy = best(lambda: dfloat11.decode(encoded, out, threads=threads), repeats)
    assert torch.equal(out.view(torch.int16), weight.view(-1).view(torch.int16))
    verifying, _ = best(lambda: _verified(encoded, weight, threads), repeats)
    peak = peak_bytes(lambda: dfloat11.encode([weight], threads=threads))
    millions = weight.numel() / 1e6
    return {
        "case": name,
        "shape": list(weight.shape),
        "threads": threads,
        "encode": round(millions / encoding, 1),
        "encode_and_verify": round(millions / (encoding + verifying), 1),
        "decode": round(millions / decoding, 1),
        "encode_per_core": round(millions / encoding_busy, 1),
        "decode_per_core": round(millions / decoding_busy, 1),
        "bits_per_weight": round(8 * encoded.nbytes / weight.numel(), 4),
        "peak_over_weight_bytes": round(peak / weight.nbytes, 2),
        "load_before": round(load, 2),
    }


def _verified(encoded: dfloat11.Encoded, weight: Tensor, threads: int) -> None:
    assert dfloat11.matches(encoded, [weight], threads=threads)


def package_rate(folder: Path) -> dict[str, Any]:
    """The package's own encoder on a sample, and whether the bytes are the same."""
    utils = _load(folder / "dfloat11_utils.py")
    weight = normal((1, PACKAGE_SAMPLE)).view(-1)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _, counts = utils.get_codec(weight)
        codec, _, table = utils.get_32bit_codec(counts)
        luts = utils.get_luts(table)
        parts = utils.encode_weights([weight], codec, 8, 512)
    seconds = time.perf_counter() - start
    ours = dfloat11.encode([weight])
    names = ["encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions"]
    theirs = {"luts": luts, **dict(zip(names, parts, strict=True))}
    theirs["output_positions"] = theirs["output_positions"].view(torch.uint8)
    same = all(torch.equal(tensor, theirs[name]) for name, tensor in ours.tensors.items())
    return {"encode": round(PACKAGE_SAMPLE / 1e6 / seconds, 2), "weights": PACKAGE_SAMPLE, "same_bytes": same}


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sizes(matrices: Sequence[Tensor]) -> dict[str, Any]:
    """Bits a weight, all overhead included, of matrices that are each a group of their own."""
    weights = sum(matrix.numel() for matrix in matrices)
    variable = sum(dfloat11.encode([matrix]).nbytes for matrix in matrices)
    return {
        "matrices": len(matrices),
        "weights": weights,
        "dfloat11_bits": round(8 * variable / weights, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed, size and memory of the DFloat11 codec on the CPU.")
    parser.add_argument("--package", type=Path, help="folder of the dfloat11 package, to time its own encoder too")
    parser.add_argument("--weights", type=Path, help="a safetensors file of real weights, to measure sizes on")
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "codec_dfloat11.json")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    start = time.perf_counter()
    dfloat11.decode(dfloat11.encode([normal((100, 100))]))
    results: dict[str, Any] = {"first_use_seconds": round(time.perf_counter() - start, 2), "cases": []}
    for name in arguments.cases:
        weight = normal(SHAPES[name])
        for threads in sorted({1, cores}):
            row = measure(name, weight, threads, arguments.repeats)
            results["cases"].append(row)
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if name == "gate_proj":
            results["normal_sizes"] = sizes([weight])
    if arguments.package is not None:
        results["package"] = package_rate(arguments.package)
        print(f"package: {results['package']}")
    if arguments.weights is not None:
        tensors = load_file(arguments.weights).values()
        real = sizes([tensor.bfloat16() for tensor in tensors if tensor.dim() == 2 and tensor.numel() >= 100_000])
        results["real_sizes"] = {"file": arguments.weights.parts[-3:], **real}
        print(f"real weights: {real}")
    units = "millions of weights a second; first_use is compiling or loading the loops, and a small tensor"
    write_record(
        arguments.out, "codec_dfloat11", {"repeats": arguments.repeats, "niceness": os.nice(0), "units": units}, results
    )
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()

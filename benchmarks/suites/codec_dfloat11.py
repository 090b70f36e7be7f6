"""`lowmem-bagel bench codec-dfloat11`: speed, size and memory of the DFloat11 codec on the CPU, at a true shape.

Encoding is timed as a whole: sign and mantissa bytes, histogram, code book, stream, gaps and positions. Verification is
decoding everything again and comparing it bit for bit, gaps and positions included. Every figure is the best of
`--repeat`; other work on the machine makes them smaller, so the load before each case is in the record, and so are
rates for a second of processor time, which it touches less. Peak memory is that of all arrays but the weights.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from lowmem_bagel.formats.dfloat11 import codec as dfloat11
from lowmem_bagel.hardware.host import cores

from ..options import Out, Shape
from ..record import write_record
from ..shapes import projections, shape_named
from ..timing import elapsed, fastest


def codec_dfloat11_command(
    shape: Shape = "bagel-7b",
    repeat: Annotated[int, typer.Option(help="Measured runs of each case.")] = 3,
    out: Out = Path("codec_dfloat11.json"),
) -> None:
    """Encode and decode matrices of every size, with one thread and with all, and write a JSON record."""
    first = elapsed(lambda: dfloat11.decode(dfloat11.encode([normal((100, 100))])))
    results: dict[str, Any] = {"first_use_seconds": round(first.seconds, 2), "cases": []}
    decoder = shape_named(shape).decoder
    each = {f"{name}_proj": size for name, size in projections(decoder).items() if name in ("gate", "q", "k")}
    for name, size in {**each, "embed_tokens": (decoder.vocab_size, decoder.hidden_size)}.items():
        weight = normal(size)
        for threads in sorted({1, cores()}):
            results["cases"].append(measure(name, weight, threads, repeat))
            print(" ".join(f"{key} {value}" for key, value in results["cases"][-1].items()), flush=True)
    units = "millions of weights a second; first_use is compiling or loading the loops, and a small tensor"
    settings = {"shape": shape, "repeats": repeat, "niceness": os.nice(0), "units": units}
    write_record(out, "codec_dfloat11", settings, results)


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
    encoding = fastest(lambda: dfloat11.encode([weight], threads=threads), repeats)
    decoding = fastest(lambda: dfloat11.decode(encoded, out, threads=threads), repeats)
    assert torch.equal(out.view(torch.int16), weight.view(-1).view(torch.int16))
    verifying = fastest(lambda: dfloat11.matches(encoded, [weight], threads=threads), repeats)
    peak = peak_bytes(lambda: dfloat11.encode([weight], threads=threads))
    millions = weight.numel() / 1e6
    return {
        "case": name,
        "shape": list(weight.shape),
        "threads": threads,
        "encode": round(millions / encoding.seconds, 1),
        "encode_and_verify": round(millions / (encoding.seconds + verifying.seconds), 1),
        "decode": round(millions / decoding.seconds, 1),
        "encode_per_core": round(millions / encoding.busy, 1),
        "decode_per_core": round(millions / decoding.busy, 1),
        "bits_per_weight": round(8 * encoded.nbytes / weight.numel(), 4),
        "peak_over_weight_bytes": round(peak / weight.nbytes, 2),
        "load_before": round(load, 2),
    }

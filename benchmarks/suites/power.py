"""`lowmem-bagel bench power`: what kernels and an INT8 picture reach when the card's limit on power holds them back.

A kernel that is timed for milliseconds after a rest runs at the highest clock; a picture keeps the card busy for
seconds, and its driver then lowers the clock until the limit is kept. So the same kernels are timed both ways, with the
energy of a call, beside the libraries' at the same shapes; and a picture's clocks and energy are told.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..cases import Setup
from ..options import Out, Seed, Shape, Size
from ..record import write_record
from ..report.meters import CardMeter, NoMeter, card_meter
from ..timing import Call, compile_ahead, elapsed_seconds

TOKENS = 8192
"""Of a 1024x1024 picture with two branches of guidance in a batch."""
KEYS = 4130
"""That a branch's tokens see: the picture's, its markers and a prompt."""
REST = 0.3
"""Seconds without work before a short timing: the clock goes up again."""
SAMPLED_EVERY = 0.02
THREADS = 8


@dataclass(frozen=True)
class Busy:
    """A kernel at one shape: operations of a call, 0 where none count, and calls that rotate over inputs."""

    name: str
    operations: float
    calls: Sequence[Call]


def power_command(
    shape: Shape = "bagel-7b",
    size: Size = 1024,
    seconds: Annotated[float, typer.Option(help="That each kernel runs on and on.")] = 0.6,
    timesteps: Annotated[int, typer.Option(help="Timesteps of the picture; 0 for none.")] = 50,
    seed: Seed = 0,
    out: Out = Path("power.json"),
) -> None:
    """Time kernels shortly and for long, and an INT8 picture, with clocks and energy; write a JSON record."""
    setup = Setup.of(shape, check_only=False, seed=seed)
    meter = card_meter(torch.device("cuda", torch.cuda.current_device()))
    found = []
    with torch.inference_mode():
        busy = [*products(setup), *others(setup)]
        compile_ahead([one.calls[0] for one in busy], THREADS)
        for one in busy:
            found.append(measured(one, meter, seconds))
            print(line(found[-1]), flush=True)
        del busy, one
    torch.cuda.empty_cache()
    picture = None if timesteps == 0 else _picture(shape, size, timesteps, meter)
    if picture is not None:
        print(
            f"picture: {picture['seconds']:.3f} s, {picture['joules']} J, median clock {picture['mhz']['median']} MHz "
            f"of {picture['mhz']['most']}"
        )
    settings = {"shape": shape, "size": size, "seconds": seconds, "timesteps": timesteps, "tokens": TOKENS}
    results = {"limit_watts": meter.limit_watts(), "kernels": found, "picture": picture, "unknown": meter.why}
    write_record(out, "power", settings, results)


def products(setup: Setup) -> Iterator[Busy]:
    """INT8's matmuls of a picture, and the libraries' in FP8 and bf16 at the same shapes."""
    from lowmem_bagel.formats.int8.kernels import int8_matmul
    from lowmem_bagel.formats.int8.tiles import Tiles

    tiles = Tiles.of(setup.device)
    (m,) = setup.tokens(TOKENS)
    one = torch.ones((), device=setup.device)
    for name in ("gate_up", "down"):
        n, k = setup.linears[name]
        operations = 2 * m * n * k
        values, weights = setup.integers(m, k), setup.rotated(setup.integers, n, k)
        scale, rows = setup.wide(m).abs(), setup.wide(n).abs()
        tile = tiles.choose(m, n, k)
        product = partial(int8_matmul, values, scale, row_scale=rows, bias=None, dtype=setup.half, tile=tile,
                          processors=tiles.processors)  # fmt: skip
        yield Busy(f"int8 {name}", operations, [partial(product, weight) for weight in weights])
        half = setup.random(m, k)
        halves = setup.rotated(setup.random, n, k)
        yield Busy(f"bf16 {name}", operations, [partial(torch.nn.functional.linear, half, weight) for weight in halves])
        if setup.capability >= (8, 9) and m % 16 == 0:
            eight = [weight.to(torch.float8_e4m3fn) for weight in halves]
            scaled = partial(torch._scaled_mm, half.to(torch.float8_e4m3fn), scale_a=one, scale_b=one,
                             out_dtype=setup.half)  # fmt: skip
            yield Busy(f"_scaled_mm fp8 {name}", operations, [partial(scaled, weight.t()) for weight in eight])


def others(setup: Setup) -> Iterator[Busy]:
    """What lies between the matmuls: attention, and SwiGLU with quantisation."""
    from lowmem_bagel.kernels.elementwise import swiglu_quantize
    from lowmem_bagel.ops.attention.base import AttentionBackend, AttentionRequest
    from lowmem_bagel.ops.attention.registry import attention_backend
    from lowmem_bagel.ops.attention.select import try_backend

    (m,), (tokens,) = setup.tokens(TOKENS), setup.tokens(TOKENS // 2)
    heads, kv_heads, depth = setup.heads
    q, k, v = (setup.random(1, *shape, depth) for shape in ((tokens, heads), (KEYS, kv_heads), (KEYS, kv_heads)))
    for name in ("cudnn", "flash", "int8"):
        attend = try_backend(attention_backend(name), AttentionRequest(setup.device, setup.half))
        if isinstance(attend, AttentionBackend):
            operations = 4 * tokens * KEYS * heads * depth
            yield Busy(f"attention {name}", operations, [partial(attend, q, k, v)] * 4)
    gate_up = setup.rotated(setup.random, m, setup.linears["gate_up"][0])
    yield Busy("swiglu_quantize", 0, [partial(swiglu_quantize, x) for x in gate_up])


def measured(one: Busy, meter: CardMeter | NoMeter, seconds: float) -> dict[str, Any]:
    """A call's seconds after a rest, and on and on: then with its energy, and the clock's median."""
    graph = _captured(one.calls)
    time.sleep(REST)
    short = elapsed_seconds(graph.replay) / len(one.calls)
    turns = max(2, int(seconds / (short * len(one.calls))))

    def replay() -> None:
        for _ in range(turns):
            graph.replay()

    replay()  # until the clock has settled
    torch.cuda.synchronize()
    with _clocks(meter) as clocks:
        before = meter.joules()
        taken = elapsed_seconds(replay)
        after = meter.joules()
    calls = turns * len(one.calls)
    joules = None if before is None or after is None else (after - before) / calls
    return {
        "kernel": one.name, "operations": one.operations, "short_seconds": short, "seconds": taken / calls,
        "joules": joules, "mhz": statistics.median(clocks) if clocks else None,
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """A kernel's figures in one line."""
    energy = "" if found["joules"] is None else f", {found['joules'] * 1e3:.0f} mJ, {found['mhz']:.0f} MHz"
    return (
        f"{found['kernel']:22s} {found['short_seconds'] * 1e6:7.0f} us after a rest, {found['seconds'] * 1e6:7.0f} on "
        f"and on, {found['operations'] / found['seconds'] / 1e12:6.0f} TOP/s{energy}"
    )


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


@contextmanager
def _clocks(meter: CardMeter | NoMeter) -> Iterator[list[int]]:
    """MHz of the multiprocessors while it lasts, as far as the driver tells."""
    found: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLED_EVERY):
            mhz = meter.clock_mhz()
            if mhz is not None:
                found.append(mhz)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _picture(shape: str, size: int, timesteps: int, meter: CardMeter | NoMeter) -> dict[str, Any]:
    """An INT8 picture's seconds, energy and clocks."""
    from lowmem_bagel.pipeline import BagelPipeline

    from ..synthetic import synthetic_folder

    torch.manual_seed(0)
    pipe = BagelPipeline.from_folder(synthetic_folder("int8", shape, "cuda"), tasks=("generate",))
    try:
        draw = partial(pipe.generate, "a red fox", height=size, width=size, seed=0)
        draw(num_timesteps=3)
        with _clocks(meter) as clocks:
            before = meter.joules()
            taken = elapsed_seconds(partial(draw, num_timesteps=timesteps))
            after = meter.joules()
    finally:
        pipe.close()
    mhz = {"median": statistics.median(clocks), "least": min(clocks), "most": max(clocks)} if clocks else None
    joules = None if before is None or after is None else after - before
    return {"seconds": taken, "joules": joules, "mhz": mhz, "attention": pipe.model.attention.name}

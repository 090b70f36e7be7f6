"""The timers: the wall clock for what takes long, a captured CUDA graph for kernels; and the machine's own ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lowmem_bagel.ops.device import enter

Call = Callable[[], object]

BEYOND_CACHE = 400_000_000
"""Bytes of inputs to rotate over, so that none is still in a level-2 cache when its turn comes again."""


def elapsed_seconds(work: Call) -> float:
    """What a run takes until the card has done it too."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copies_beyond_cache(nbytes: int) -> int:
    """How many sets of inputs of this size a timing of kernels needs."""
    return max(2, -(-BEYOND_CACHE // nbytes))


def graph_seconds(calls: Sequence[Call], replays: int = 7) -> float:
    """Seconds of one call: all calls are captured into one graph, whose replays are timed; the median counts.

    So the host's launch time is not measured, as in the CUDA graph of a text decoder; gaps between kernels are.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(calls)


def compile_ahead(calls: Iterable[Call], threads: int) -> None:
    """Run every call once, many at a time, so that kernels compile in parallel."""

    def run(call: Call) -> None:  # gives up what the call returns: results of many would fill a card
        call()

    def begin() -> None:
        if torch.cuda.is_available():
            enter(torch.device("cuda", torch.cuda.current_device()))

    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        list(pool.map(run, calls))
    _wait()


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured: bytes/s of a copy (read and written, the better of two ways) and of a reduction (read only),
    operations/s of bf16 (or fp16) and int8 matmuls."""
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    size = 8192

    def ints(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)

    source, target = ints(1 << 30), ints(1 << 30)
    words, written = source.view(torch.int64), target.view(torch.int64)
    # In a graph a plain copy is the driver's own, which may be far slower than a kernel.
    ways: list[Call] = [lambda: target.copy_(source), lambda: torch.bitwise_not(words, out=written)]
    x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    i, j = ints(size, size), ints(size, size)
    copied = 2 * source.numel() / min(graph_seconds([way] * 4) for way in ways)
    reduced = graph_seconds([lambda: torch.amax(source.view(torch.int32), 0)] * 4)
    return {
        "copy_bytes_s": copied,
        "read_bytes_s": max(copied, source.numel() / reduced),
        "half_matmul_ops_s": 2 * size**3 / graph_seconds([lambda: x @ w.T] * 4),
        "int_mm_ops_s": 2 * size**3 / graph_seconds([lambda: torch._int_mm(i, j.T)] * 4),
    }

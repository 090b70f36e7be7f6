"""Work on blocks of a CPU tensor by plain threads, one a core.

PyTorch's own threads share out each single operation, and wait for each other at its end: on blocks that fit into a
cache this costs more than it gains, and on a machine that does other work too it is many times slower than one thread.
So operations run on one thread each, and whole blocks are shared out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Block = TypeVar("_Block")
_Result = TypeVar("_Result")


def map_blocks(
    task: Callable[[_Block], _Result], blocks: Iterable[_Block], threads: int | None = None
) -> list[_Result]:
    """`task` of every block, in order; the first exception of a task is raised. `threads` None: one a usable core."""
    blocks = list(blocks)
    workers = min(len(blocks), threads or usable_cores())
    if workers <= 1:
        return [task(block) for block in blocks]
    with _one_thread_an_operation(), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(task, blocks))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """New threads take PyTorch's setting over at their first operation; the caller's is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

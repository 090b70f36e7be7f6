"""Conversions of small shards, here and in processes that are killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import torch
from lowmem_bagel.converters.engine.convert import convert

from lowmem_bagel.checkpoint.manifest import Manifest
from support.conversion_helpers import CONVERTERS, SMALL_SHARDS
from support.durable_steps import DurableSteps
from support.forkserver import context

Connection = Any


def run(source: Path, out: Path, name: str = "int8", **settings: Any) -> Manifest:
    return convert(source, out, CONVERTERS[name](), **{"shard_bytes": SMALL_SHARDS, **settings})


def child(ready: Connection, source: Path, out: Path, kill_at: int | None, settings: dict[str, Any]) -> None:
    """A conversion in a process of its own; with `kill_at`, it kills itself before that durable step, counted from 0.

    Durable steps (syncs and renames) are where the state on disk changes; it reports how many there were.
    """
    torch.set_num_threads(1)
    steps = DurableSteps(kill_at, "fsync", "replace", "unlink", "rmdir")
    ready.send("begun")
    run(source, out, **settings)
    ready.send(steps.count)


class Children:
    """Conversions started from a process that has imported everything, so that a start takes milliseconds."""

    def killed_after(self, seconds: float, source: Path, out: Path, **settings: Any) -> bool:
        """Whether the kill came before the end."""
        process, ready = self._start(source, out, None, settings)
        time.sleep(seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        ready.close()
        return process.exitcode != 0

    def killed_at(self, step: int, source: Path, out: Path, **settings: Any) -> None:
        process, ready = self._start(source, out, step, settings)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (step, process.exitcode)
        ready.close()

    def whole(self, source: Path, out: Path, **settings: Any) -> tuple[float, int]:
        """Seconds and durable steps of an uninterrupted run."""
        process, ready = self._start(source, out, None, settings)
        begun = time.perf_counter()
        steps = ready.recv()
        seconds = time.perf_counter() - begun
        process.join()
        assert process.exitcode == 0
        return seconds, steps

    def _start(self, source: Path, out: Path, kill_at: int | None, settings: dict[str, Any]) -> tuple[Any, Connection]:
        ours, theirs = context().Pipe(duplex=False)
        process = context().Process(target=child, args=(theirs, source, out, kill_at, settings))
        process.start()
        theirs.close()
        assert ours.recv() == "begun"
        return process, ours

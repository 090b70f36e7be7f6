"""Jobs files, what became of them, and batches in processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from support.durable_steps import DurableSteps
from support.forkserver import context

from .paths import CHECKPOINT

SMALL = {"height": 32, "width": 32, "num_timesteps": 2}
Connection = Any


def jobs_file(path: Path, *jobs: Mapping[str, Any] | str) -> Path:
    """A line each, as JSON, or as it is."""
    lines = [job if isinstance(job, str) else json.dumps(job) for job in jobs]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Every result by its id. Asserts that each line is whole, and of another job."""
    if not (out / "results.jsonl").exists():
        return {}
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def contents(out: Path) -> dict[str, bytes]:
    """What a batch wrote: its pictures, byte for byte, and what the results say but for their order and seconds."""
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".png", ".webp", ".jpg")}
    for id, result in results(out).items():
        found[f"result {id}"] = json.dumps({**result, "seconds": 0}).encode()
    return found


def leftovers(out: Path) -> set[str]:
    """Files that are neither pictures nor results nor the lock."""
    known = {"results.jsonl", ".lowmem-bagel-batch.lock", *(n for r in results(out).values() for n in r["files"])}
    return {path.name for path in out.iterdir()} - known


def child(ready: Connection, arguments: Sequence[str], kill_at: int | None) -> None:
    """The command in a process of its own; with `kill_at`, it kills itself before that durable step, counted from 0.

    Durable steps (writes, syncs, renames) are where the state on disk changes. It reports when it begins, and how many
    there were.
    """
    torch.set_num_threads(1)
    from lowmem_bagel.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored where the tests run
    steps = DurableSteps(kill_at, "fsync", "replace", "write")
    sys.argv = ["lowmem-bagel", *arguments]
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    ready.send("begun")
    try:
        main()
    except SystemExit as exit:
        ready.send((exit.code, steps.count))


class Children:
    """Commands started from a process that has imported everything, so that a start takes milliseconds."""

    def start(self, *arguments: object, kill_at: int | None = None) -> tuple[Any, Connection]:
        """A process that has begun, and where its end is told."""
        ours, theirs = context().Pipe(duplex=False)
        process = context().Process(target=child, args=(theirs, list(map(str, arguments)), kill_at))
        process.start()
        theirs.close()
        assert ours.recv() == "begun"
        return process, ours


MODEL = ("--model", str(CHECKPOINT), "--device", "cpu")

"""Workers that are processes of this machine, one for each card, or several on its processor."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from ..errors import SettingError, UserError
from .loading import Recipe
from .team import Event
from .work import Work, carried_out, check_card

STEPS_EVERY = 0.1
"""Seconds between two steps that are told."""
GRACE = 5.0
"""Seconds that a worker may take to end."""


class Processes:
    """A `Team` of processes.

    Args:
        recipes: how each one's pipeline is made, by its name.
        context: of multiprocessing.
    """

    def __init__(self, recipes: Mapping[str, Recipe], context: Any = None) -> None:
        self.recipes = recipes
        self.workers = [*recipes]
        self._context = context or multiprocessing.get_context("spawn")
        self._processes: dict[str, Any] = {}
        self._ends: dict[str, Connection] = {}

    def start(self, worker: str) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self.recipes[worker]), name=f"lowmem-bagel {worker}", daemon=True
        )
        with _without_interrupts():
            process.start()
        theirs.close()
        self._processes[worker], self._ends[worker] = process, ours

    def give(self, worker: str, work: Work) -> None:
        with suppress(OSError):  # it has died, which is the next that is heard of it
            self._ends[worker].send(work)

    def event(self) -> Event:
        (end, *_) = wait([*self._ends.values()])
        worker = next(name for name, known in self._ends.items() if known is end)
        try:
            told = self._ends[worker].recv()
        except (EOFError, OSError):
            return Event(worker, "died", why=self._buried(worker))
        kind, about = told
        if kind == "refused":
            self._buried(worker)
        return Event(worker, kind, **about)

    def pid(self, worker: str) -> int:
        """Of its process."""
        return int(self._processes[worker].pid)

    def close(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for worker in [*self._processes]:
            self._buried(worker)

    def _buried(self, worker: str) -> str:
        """How a process ended that is about to."""
        process = self._processes.pop(worker)
        self._ends.pop(worker).close()
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def worker_devices(devices: str) -> list[str]:
    """ "0,1" or "cpu,cpu" as names of devices, one a worker.

    Raises:
        SettingError: it names none, or one card twice.
    """
    from ..planner.devices import device_name

    names = [device_name(text) for text in devices.split(",")]
    twice = [name for name in names if name != "cpu" and names.count(name) > 1]
    if twice:
        raise SettingError(f"devices names {twice[0]} twice; a card has one worker")
    return names


def recipes_for(devices: Sequence[str], recipe: Recipe) -> dict[str, Recipe]:
    """A recipe for each device, of a machine whose cores and memory they share."""
    from dataclasses import replace

    from ..hardware.host import cores

    made = {}
    for number, device in enumerate(devices):
        name = device if devices.count(device) == 1 else f"{device} ({devices[: number + 1].count(device)})"
        options = {**recipe.options, "device": device}
        threads = max(1, cores() // devices.count("cpu")) if device == "cpu" else None
        made[name] = replace(recipe, options=options, threads=recipe.threads or threads, sharers=len(devices))
    return made


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started meanwhile never gets Ctrl-C, which a terminal sends to all: it is ours to end it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(end: Connection, recipe: Recipe) -> None:
    """What a worker does: loads, and then a job after the other, until there is nobody to tell."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what it says of a folder, who started us has said
            pipeline = recipe.load()
    except UserError as error:
        end.send(("refused", {"error": error}))
        return
    end.send(("loaded", {}))
    while True:
        try:
            work = end.recv()
        except EOFError:
            return
        outcome = carried_out(pipeline, work, _Telling(end))
        end.send(("done", {"outcome": outcome}))
        if outcome.result.traceback:
            check_card(pipeline)


def _end_with_parent() -> None:
    """Where the process that hands out is killed, nobody else ends us: we would hold a card for nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class _Telling:
    """A pipeline's callback that tells of steps now and then."""

    def __init__(self, end: Connection) -> None:
        self._end, self._told = end, 0.0

    def __call__(self, event: Any) -> None:
        if time.monotonic() - self._told > STEPS_EVERY:
            self._told = time.monotonic()
            self._end.send(("step", {"step": (event.index + hasattr(event, "x_t"), event.total)}))

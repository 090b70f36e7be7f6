"""Workers that are actors of Ray, on this machine or many: Ray says where each has room.

A worker that died is made anew as another actor, because one that Ray itself restarts refuses to be waited for while
there is no room for it. Nothing is read from a disk that machines may not share, but the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, MissingExtraError, SettingError, UserError, first_line
from .loading import Recipe
from .team import Event
from .work import Outcome, Work, carried_out, check_card

if TYPE_CHECKING:
    from ..pipeline import BagelPipeline

LOCAL = "local"
"""Instead of an address: a Ray of our own, for as long as the batch runs."""
ANSWER_SECONDS = 10.0
"""In which a Ray that there is answers."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_COLOR_PREFIX": "0"}
"""Ray tells nobody of a run, and its own notes hold no escape sequences; who has set these otherwise is heeded."""


@dataclass(frozen=True)
class Share:
    """How many workers there are, and what one takes: cards and cores of a machine; `sharers` of them may share one."""

    workers: int
    gpus: int
    cpus: int
    sharers: int


def share_of(machines: Sequence[Mapping[str, float]], workers: int | None, on_cards: bool) -> Share:
    """A worker a card, or as many as are asked for; without cards they divide the cores.

    Args:
        machines: what Ray says that each has.

    Raises:
        SettingError: there are no cards, and no number of workers is given; or no cores.
    """
    cards = [int(machine.get("GPU", 0)) for machine in machines]
    if on_cards and any(cards):
        return Share(workers or sum(cards), 1, 1, max(cards))
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    if workers is None or not cores:
        what = "no cards" if cores else "neither cards nor cores to give"
        raise SettingError(f"this Ray has {what}; --ray-workers N puts N workers on its processors")
    each = math.ceil(workers / len(cores))
    return Share(workers, 0, max(1, min(cores) // each), each)


class RayTeam:
    """A `Team` of actors. Connects, and starts a Ray where none is meant to be there.

    Args:
        address: HOST:PORT of a cluster, "auto" for the one that this machine is part of, or "local". Where this process
            is connected to one already, that is used.
        workers: how many; None for one a card.

    Raises:
        MissingExtraError: Ray is not installed.
        SettingError: no Ray answers, or it has nothing to work on.
    """

    def __init__(self, address: str, workers: int | None, recipe: Recipe) -> None:
        self._open = contextlib.ExitStack()
        self._ray = _connected(address, self._open)
        try:
            machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self.share = share_of(machines, workers, recipe.options.get("device") != "cpu")
        except BaseException:
            self._open.close()
            raise
        self.workers = [f"worker {number}" for number in range(1, self.share.workers + 1)]
        self._recipe = replace(
            _everywhere(recipe), sharers=self.share.sharers,
            threads=recipe.threads or (None if self.share.gpus else self.share.cpus),
        )  # fmt: skip
        self._actor = self._ray.remote(Actor).options(num_gpus=self.share.gpus, num_cpus=self.share.cpus)
        self._actors: dict[str, Any] = {}
        self._awaited: dict[Any, tuple[str, str]] = {}
        """What is to come of which worker: (worker, kind of event)."""

    def start(self, worker: str) -> None:
        self._actors[worker] = self._actor.remote(self._recipe)
        self._awaited[self._actors[worker].load.remote()] = worker, "loaded"

    def give(self, worker: str, work: Work) -> None:
        self._awaited[self._actors[worker].work.remote(work)] = worker, "done"

    def event(self) -> Event:
        from ray.exceptions import RayError, RayTaskError

        (reference, *_), _ = self._ray.wait([*self._awaited], num_returns=1)
        worker, kind = self._awaited.pop(reference)
        try:
            value = self._ray.get(reference)
        except RayTaskError as error:
            self._dismiss(worker)
            if isinstance(error.cause, UserError):
                return Event(worker, "refused", error=error.cause)
            raise
        except RayError as error:
            self._dismiss(worker)
            if "ModuleNotFoundError" in str(error):
                lacks = "a machine of this Ray lacks lowmem-bagel, or has another version; install it there"
                return Event(worker, "refused", error=SettingError(lacks))
            return Event(worker, "died", why=f"died ({first_line(error).rstrip('.')})")
        return Event(worker, "done", outcome=value) if kind == "done" else Event(worker, "loaded")

    def pid(self, worker: str) -> int:
        """Of its process, on whichever machine it is; waits until it has loaded."""
        return int(self._ray.get(self._actors[worker].pid.remote()))

    def close(self) -> None:
        for worker in [*self._actors]:
            self._dismiss(worker)
        self._open.close()

    def _dismiss(self, worker: str) -> None:
        """What it has goes back to Ray, also where it is only out of reach."""
        self._ray.kill(self._actors.pop(worker))


class Actor:
    """What Ray runs: owns a pipeline, and does a job after the other."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._pipeline: BagelPipeline | None = None

    def load(self) -> None:
        """Load the model, for which Ray has made room.

        Raises:
            UserError: it cannot be; it says on which machine.
        """
        try:
            self._pipeline = self._recipe.load()
        except UserError as error:
            missing = isinstance(error, CheckpointError | ConfigError)
            remedy = "; the model must lie at the same path on every machine" if missing else ""
            error.args = (f"{error} (on {socket.gethostname()}){remedy}",)
            raise

    def work(self, work: Work) -> Outcome:
        """Do a job. What it fails by is its outcome; a fault that takes the card with it ends this process."""
        assert self._pipeline is not None
        outcome = carried_out(self._pipeline, work)
        if outcome.result.traceback:
            try:
                check_card(self._pipeline)
            except RuntimeError:
                os._exit(1)
        return outcome

    def pid(self) -> int:
        return os.getpid()


def _connected(address: str, until: contextlib.ExitStack) -> Any:
    """The module, connected; disconnected, and what was started is ended, when `until` ends."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError('Ray is not installed: pip install "lowmem-bagel[ray]"') from error
    # Ray says what it has to say on stdout, from a thread: that is for answers.
    until.enter_context(contextlib.redirect_stdout(sys.stderr))
    if ray.is_initialized():
        return ray
    _check_answers(address)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **_own(address))
    except (RuntimeError, ValueError, OSError) as error:
        until.close()
        why = "none runs here" if isinstance(error, ConnectionError) and address == "auto" else first_line(error)
        raise SettingError(
            f"cannot use the Ray {address!r} ({why}); start one with ray start --head, or give --ray local"
        ) from error
    finally:
        if main:  # which Ray has set to a handler of its own
            signal.signal(signal.SIGTERM, before)
    until.callback(ray.shutdown)
    return ray


def _own(address: str) -> dict[str, Any]:
    return {"include_dashboard": False} if address == LOCAL else {}


def _check_answers(address: str) -> None:
    """Refuse an address where nobody listens, for which Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in (LOCAL, "auto"):
        return
    if not (colon and host and port.isdecimal() and int(port) < 1 << 16):
        raise SettingError(f"--ray takes HOST:PORT of a Ray, auto or local, not {address!r:.80}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise SettingError(
            f"no Ray answers at {address} ({error.strerror or error}); start it, or name another"
        ) from error


def _everywhere(recipe: Recipe) -> Recipe:
    """With paths as they are on every machine."""
    options = dict(recipe.options)
    if options.get("base"):
        options["base"] = os.path.abspath(os.path.expanduser(options["base"]))
    if options.get("lora"):
        options["lora"] = tuple(os.path.abspath(os.path.expanduser(path)) for path in options["lora"])
    path = recipe.path and Path(os.path.abspath(os.path.expanduser(recipe.path)))
    return replace(recipe, path=path, options=options)

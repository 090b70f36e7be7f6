"""Many hostile inputs, each to be answered by the right result or by an error of ours, soon, in little memory.

A test makes the inputs; here they are run and watched: what they raise, how long they take, what memory they need, and
by an audit hook which files they open, whether they start a program or connect to anything. In CI a kind gets some
hundred inputs. By hand, more of them, and a record of what was run (see `lowmem_bagel.errors` for what may be raised):

    FUZZ_INPUTS=20000 FUZZ_SEED=7 FUZZ_RECORD=tests/data/fuzz.json python -m pytest tests/fuzz -q

Pictures and hubs' answers, which are watched in their own ways, take the same three (tests/pictures/test_fuzz.py,
tests/hub/test_odd_answers.py).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from lowmem_bagel.benchmarks.record import environment

from lowmem_bagel.errors import LowmemBagelError
from support.command import ATTACK, drives_a_terminal
from support.paths import ROOT

MAX_SECONDS = 5.0
"""Of the processor, so that a busy machine counts for nothing."""
MAX_WAIT = 4 * MAX_SECONDS
"""Of the clock: what waits needs no processor."""
MAX_BYTES = 1 << 30
MAX_MESSAGE = 1100
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile")
CONNECTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind")
_OWN = (ROOT, sys.prefix, sys.base_prefix, *filter(None, sys.path), "/proc", "/sys", "/dev", "/usr", "/etc")
OWN_PLACES = tuple(os.path.realpath(place) for place in _OWN)
"""Where Python, its packages and the system's libraries read for their own sake."""

Make = Callable[[Random], Callable[[], object]]
"""Makes an input, and gives what is to be done with it; only the second is watched."""


class TookTooLong(BaseException):
    """Raised inside what takes longer than MAX_WAIT; nothing of ours catches it."""


@dataclass
class Tally:
    """What became of the inputs of one kind. `failures` counts each way in which some were not answered rightly, and
    `examples` has the number of the first of them."""

    kind: str
    seed: int
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    worst_seconds: float = 0.0
    worst_input: int = 0
    peak_bytes: int = 0
    """By how much the process's largest memory grew."""
    failures: dict[str, int] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)

    def failed(self, how: str) -> None:
        self.failures[how] = self.failures.get(how, 0) + 1
        self.examples.setdefault(how, self.inputs - 1)


def fuzz(kind: str, make: Make, inputs: int, folder: Path, *, loopback: bool = False) -> Tally:
    """Run `inputs` inputs of a kind; nothing may be read or written outside `folder`, and nothing be connected to, but
    for this machine where `loopback` says so. Asserts that none failed.

    The environment may ask for another number (FUZZ_INPUTS), another seed (FUZZ_SEED) and a record (FUZZ_RECORD).
    """
    inputs = int(os.environ.get("FUZZ_INPUTS", inputs))
    seed = int(os.environ.get("FUZZ_SEED", 0))
    tally = Tally(kind, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _WATCH.begin(folder, loopback)
    try:
        for number in range(inputs):
            random = Random(f"{kind} {seed} {number}")
            _one(tally, make(random))
    finally:
        _WATCH.end()
    tally.peak_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    keep(tally)
    assert not tally.failures, json.dumps(asdict(tally), indent=1)
    return tally


def _one(tally: Tally, run: Callable[[], object]) -> None:
    tally.inputs += 1
    started = time.process_time()
    try:
        with _limits(), _WATCH.on():
            run()
    except LowmemBagelError as error:
        tally.refused += 1
        if drives_a_terminal(str(error)) or "\n" in str(error) or len(str(error)) > MAX_MESSAGE:
            tally.failed(f"a message that is not one short line: {str(error)[:200]!r}")
    except SystemExit as exit:
        tally.refused += exit.code == 2
        if exit.code not in (0, 2):
            tally.failed(f"exit code {exit.code}")
    except TookTooLong:
        tally.failed(f"did not end within {MAX_WAIT:g} s")
    except BaseException as error:
        tally.failed(f"{type(error).__name__} at {_place(error)}: {str(error)[:200]!r}")
    taken = time.process_time() - started
    if taken > MAX_SECONDS:
        tally.failed(f"took longer than {MAX_SECONDS:g} s")
    if taken > tally.worst_seconds:
        tally.worst_seconds, tally.worst_input = taken, tally.inputs - 1
    tally.seconds += taken
    for seen in _WATCH.taken():
        tally.failed(seen)


def _place(error: BaseException) -> str:
    """The line of ours that an exception passed last."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "lowmem_bagel" in f.filename or "converters" in f.filename]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


@contextmanager
def _limits() -> Iterator[None]:
    """No more than MAX_WAIT, and MAX_BYTES of address space beyond what is taken already."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TookTooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_BYTES, hard))
    outer = signal.setitimer(signal.ITIMER_REAL, MAX_WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)


class _Watch:
    """An audit hook; one can never be removed, so there is one that mostly looks away."""

    def __init__(self) -> None:
        self._hooked = self._on = self._loopback = False
        self._places: tuple[str, ...] = ()
        self._seen: list[str] = []

    def begin(self, folder: Path, loopback: bool) -> None:
        self._places, self._loopback = (*OWN_PLACES, os.path.realpath(folder)), loopback
        if not self._hooked:
            sys.addaudithook(self._hook)
            self._hooked = True

    def end(self) -> None:
        self._places = ()

    @contextmanager
    def on(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def taken(self) -> Iterable[str]:
        seen, self._seen = self._seen, []
        return seen

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open" and isinstance(args[0], str | bytes):
            self._on = False  # what follows opens files too
            with suppress(ValueError):  # a name that no file can have
                place = os.path.realpath(os.fsdecode(args[0]))
                if not any(place == own or place.startswith(own + os.sep) for own in self._places):
                    self._seen.append(f"opened {place}")
            self._on = True
        elif event in STARTS:
            self._seen.append(f"started a program: {event} {str(args)[:200]}")
        elif event in CONNECTS and not (self._loopback and "127.0.0.1" in str(args)):
            self._seen.append(f"connected: {event} {str(args)[:200]}")


_WATCH = _Watch()


@contextmanager
def watched(folder: Path, loopback: bool = False) -> Iterator[list[str]]:
    """Gets, once left, what was opened outside `folder`, started or connected to meanwhile."""
    seen: list[str] = []
    _WATCH.begin(folder, loopback)
    try:
        with _WATCH.on():
            yield seen
    finally:
        _WATCH.end()
        seen += _WATCH.taken()


def keep(tally: Tally) -> None:
    """Adds the tally to the record that the environment asks for, in place of an older one of its kind."""
    path = os.environ.get("FUZZ_RECORD")
    if path:
        record = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(tally).items()}
        machine = {"commit": environment()["commit"], "python": platform.python_version()}
        record[tally.kind] = {**rounded, **machine}
        Path(path).write_text(json.dumps(record, indent=1) + "\n")


# What hostile inputs are made of ------------------------------------------------------------------------------------

VALUES: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**31 - 1, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e300, "", "a", "0",
    ATTACK, "\0", "é中😀", "../../etc/passwd", "/etc/passwd", "C:\\x", "x" * 5000, ".", "..", [], {}, [[]], [0],
    [None] * 50, {"a": 1}, {"": None}, {"a": {"b": {"c": []}}},
)  # fmt: skip
TOKENS: tuple[bytes, ...] = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" * 400, b"1" * 5000, b'"\\ud800"', b'"\\u0000"',
    b'"\xff"', b"[" * 2000, b'{"a":' * 2000, b"\xef\xbb\xbf", b"\0", b"'", b"//", b",", b":", b"}", b"]", b'"', b"\\",
    b"tru", b"-",
)  # fmt: skip


def mutated_value(random: Random, value: object) -> object:
    """The value with some of what is inside it replaced, removed, moved or doubled."""
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        value = _changed(random, value)
    return value


def _changed(random: Random, value: object) -> object:
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        changed = dict(value)
        kind = random.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.2:
            changed[random.choice(("", "x", ATTACK, key + "x", "a" * 500))] = changed.pop(key)
        elif kind < 0.3:
            changed[key], changed[random.choice(list(value))] = value[random.choice(list(value))], value[key]
        else:
            changed[key] = _changed(random, value[key])
        return changed
    if isinstance(value, list) and value and random.random() < 0.8:
        place = random.randrange(len(value))
        kind = random.random()
        if kind < 0.1:
            return value[:place]
        if kind < 0.2:
            return value + value[place:]
        return [*value[:place], _changed(random, value[place]), *value[place + 1 :]]
    if type(value) is int and random.random() < 0.5:
        return random.choice((value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)))
    if isinstance(value, str) and value and random.random() < 0.5:
        place = random.randrange(len(value))
        return value[:place] + random.choice(("", "x", "\n", "\x1b", "/", ".", "*", "(", "\u202e")) + value[place + 1 :]
    return random.choice(VALUES)


def mutated_bytes(random: Random, data: bytes) -> bytes:
    """The bytes with some replaced, cut off, doubled or put in."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        place = random.randrange(len(changed) + 1)
        kind = random.random()
        if kind < 0.4 and place < len(changed):
            changed[place] = random.randrange(256)
        elif kind < 0.5:
            del changed[place:]
        elif kind < 0.6:
            del changed[place : place + random.randrange(1, 30)]
        elif kind < 0.7:
            changed[place:place] = changed[place : place + random.randrange(1, 60)]
        else:
            changed[place:place] = random.choice(TOKENS)
    return bytes(changed)


def mutated_json(random: Random, text: bytes) -> bytes:
    """A JSON text whose values or whose bytes are changed."""
    if random.random() < 0.6:
        text = json.dumps(mutated_value(random, json.loads(text))).encode()
    if random.random() < 0.5:
        text = mutated_bytes(random, text)
    return text

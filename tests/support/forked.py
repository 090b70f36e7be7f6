"""Python programs in processes of their own that begin with everything imported: forks of one that has done so.

Importing torch takes most of what a command on a tiny model takes, and Gradio as long again. What a test says of the
start itself, or of what is imported, needs an interpreter of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

from support.paths import TESTS

MODEL = ("lowmem_bagel.pipeline", "lowmem_bagel.converters.int8", "safetensors.torch", "typer.testing")
SERVER = (*MODEL, "lowmem_bagel.serve.server", "lowmem_bagel.serve.app", "lowmem_bagel.serve.page.imported")
NUMBER = 16
"""Bytes that a number is told in."""


class Forked:
    """A program that runs; `subprocess.Popen` as far as tests need it, with text on its streams.

    `path` comes before what Python finds modules by, and the program is told `arguments` in `sys.argv`.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[object] = (),
        *,
        imported: tuple[str, ...] = MODEL,
        path: Sequence[Path] = (),
        folder: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        request = {
            "program": program,
            "arguments": [*map(str, arguments)],
            "path": [*map(str, path)],
            "folder": str(folder or Path.cwd()),
            "environment": dict(environment),
        }
        self.returncode: int | None = None
        self.arguments = request["arguments"]
        out, err, (self._told, telling) = os.pipe(), os.pipe(), socket.socketpair()
        with telling:
            kept = (out[1], err[1], telling.fileno())
            parent(imported).ask(json.dumps(request).encode(), kept)
        os.close(out[1])
        os.close(err[1])
        self.stdout, self.stderr = open(out[0]), open(err[0])  # noqa: SIM115
        self.pid = int(self._told.recv(NUMBER, socket.MSG_WAITALL))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._told.settimeout(timeout)
            try:
                said = self._told.recv(NUMBER, socket.MSG_WAITALL)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.arguments, timeout or 0) from None
            assert said, "the process that it is a fork of has ended"
            self.returncode = int(said)
            self._told.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def finished(self) -> subprocess.CompletedProcess[str]:
        """What it said, when it has ended."""
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(self.stderr.read()))
        reader.start()
        with self.stdout, self.stderr:
            out = self.stdout.read()
            reader.join()
        return subprocess.CompletedProcess(self.arguments, self.wait(), out, said[0])


class Worker:
    """`subprocess.Popen([python, "-m", MODULE])` for a program that starts others of its kind: a fork of this process,
    which has imported what takes a new interpreter its seconds. What it is asked and answers goes through pipes."""

    def __init__(self, command: Sequence[str], *, stderr: IO[bytes], **_: Any) -> None:
        asked, answers = os.pipe(), os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for place, fd in enumerate((asked[0], answers[1], stderr.fileno())):
                os.dup2(fd, place)
            for fd in (*asked, *answers):
                os.close(fd)
            module = command[command.index("-m") + 1]
            run(f"import runpy; runpy.run_module({module!r}, run_name='__main__')")
        os.close(asked[0])
        os.close(answers[1])
        self.stdin, self.stdout = open(asked[1], "w"), open(answers[0])  # noqa: SIM115

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


# The process that is forked ---------------------------------------------------------------------------------------


class Parent:
    """The one that has imported these modules, and is a child of this process."""

    def __init__(self, imported: tuple[str, ...]) -> None:
        self.control, theirs = socket.socketpair()
        self.process: subprocess.Popen[bytes] | None = None
        self.forked: int | None = None
        if imported != MODEL and imported[: len(MODEL)] == MODEL:  # a fork itself, of the one that has most of it
            with theirs:
                parent(MODEL).ask(json.dumps({"parent": imported}).encode(), [theirs.fileno()])
            return
        if (spare := free_spare()) is not None:
            with theirs:
                program = f"import sys; from support import forked; forked.answer_all({imported!r}, int(sys.argv[1]))"
                self.forked = spare.begin(program, [theirs.fileno()])
            return
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "support.forked", str(theirs.fileno()), *imported],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )

    def ask(self, request: bytes, fds: Sequence[int]) -> None:
        socket.send_fds(self.control, [told(len(request))], fds)
        self.control.sendall(request)

    def end(self) -> None:
        self.control.close()
        if self.process is not None:
            self.process.wait()
        if self.forked is not None:
            os.waitpid(self.forked, 0)


parents: list[Parent] = []


@cache
def parent(imported: tuple[str, ...]) -> Parent:
    parents.append(Parent(imported))
    return parents[-1]


def end_all() -> None:
    """At the end of the session."""
    for one in reversed(parents):
        one.end()
    for spare in spares:
        spare.control.close()
        if not spare.begun:  # Python's own server of forks ends with this process
            os.waitpid(spare.pid, 0)


class Spare:
    """A fork of this process that waits for a program."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        self.begun = False
        self.pid = os.fork()
        if self.pid == 0:
            become_what_is_asked(theirs.detach())
        theirs.close()

    def begin(self, program: str, fds: Sequence[int]) -> int:
        """As `python -c` does, its arguments the numbers that these are open under there. Returns the process's."""
        self.begun = True
        request = json.dumps({"program": program, "environment": {**os.environ}}).encode()
        socket.send_fds(self.control, [told(len(request))], fds)
        self.control.sendall(request)
        return self.pid


spares: list[Spare] = []


def keep_spares(number: int = 2) -> None:
    """For the parent of forks and for Python's own server of them: where this process has imported PyTorch and has run
    nothing yet, a fork of it is as good as a new interpreter, and need not import it."""
    spares.extend(Spare() for _ in range(number))


def free_spare() -> Spare | None:
    return next((spare for spare in spares if not spare.begun), None)


def become_what_is_asked(control: int) -> NoReturn:
    """Without what belongs to the tests: their streams, what else they have open, and pytest's hook on imports.

    What was open is nothing from here on, under its number: what had it open closes that one when it is forgotten.
    """
    with open(os.devnull) as nothing:
        for fd in {0, *map(int, os.listdir("/dev/fd"))} - {1, 2, control, nothing.fileno()}:
            os.dup2(nothing.fileno(), fd)
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever runs the tests interrupts what asks
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    main.__dict__["stdin"], sys.stdin = sys.stdin, open(0, closefd=False)  # noqa: SIM115
    asked = socket.socket(fileno=control)
    length, fds, _, _ = socket.recv_fds(asked, NUMBER, 3)
    if not length:
        os._exit(0)
    request = json.loads(asked.recv(int(length), socket.MSG_WAITALL))
    asked.close()
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["-c", *map(str, fds)]
    run(request["program"])


def told(number: int) -> bytes:
    return b"%*d" % (NUMBER, number)


def answer_requests(control: socket.socket) -> None:
    """One fork a request, which lasts as long as the program in a fork of its own, and tells its number and its end."""
    while True:
        length, fds, _, _ = socket.recv_fds(control, NUMBER, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not length:
            return
        request = json.loads(control.recv(int(length), socket.MSG_WAITALL))
        if os.fork() == 0:
            control.close()
            if "parent" in request:
                answer_all(request["parent"], fds[0])
                os._exit(0)
            look_after(request, *fds)
        for fd in fds:
            os.close(fd)


def answer_all(imported: Sequence[str], control: int) -> None:
    import_all(imported)
    answer_requests(socket.socket(fileno=control))


def import_all(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every fork goes through all of it, and gets a copy of the pages that this writes to
    assert threading.active_count() == 1, threading.enumerate()


def look_after(request: dict[str, Any], out: int, err: int, telling: int) -> NoReturn:
    number = os.fork()
    if number == 0:
        os.close(telling)
        run_as_told(request, out, err)
    os.close(out)
    os.close(err)
    os.write(telling, told(number))
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
        os.write(telling, told(code))
    os._exit(0)


def run_as_told(request: dict[str, Any], out: int, err: int) -> NoReturn:
    """As `python -c PROGRAM ARGUMENTS` does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = request["path"]
    sys.argv = ["-c", *request["arguments"]]
    run(request["program"])


def run(program: str) -> NoReturn:
    """To the end of this process, as an interpreter does."""
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    code: object = 0
    try:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever runs the tests interrupts what asks
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    answer_all(sys.argv[2:], int(sys.argv[1]))

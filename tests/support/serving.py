"""Servers to talk to: a service on the demo checkpoint in this process, and the command in one of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.serve.options import KEY_VARIABLE, ServeOptions
from lowmem_bagel.serve.service import Service
from lowmem_bagel.settings import LoadOptions
from support.command import INTERRUPTIBLE
from support.forked import SERVER, Forked

RUN = "from lowmem_bagel.cli import main; main()"
UNHURRIED = "from support.unhurried import *; pause_in_long_pictures(pytest.MonkeyPatch()); "
SERVE = ("serve", "--port", "0", "--device", "cpu")
BASE_URL = "http://127.0.0.1:7860"
"""For clients of an application without a socket: a host that it is willing to be."""
PROMPT = "a red circle on a white background"
QUICK = {"seed": 1, "num_timesteps": 2, "height": 32, "width": 32}
"""A picture in some ten milliseconds."""
LONG = {"seed": 1, "num_timesteps": 5000, "height": 32, "width": 32}
"""A picture that nobody waits for."""


def until(true: Callable[[], object], seconds: float = 60, pause: float = 0.01) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(pause)


def service_of(path: Path = FOLDER, **options: Any) -> Service:
    """Not started."""
    return Service(path, LoadOptions(device="cpu", dtype="float32"), ServeOptions(**options))


@contextmanager
def running_service(**options: Any) -> Iterator[Service]:
    """Loaded, on the demo checkpoint; what still runs at the end is stopped."""
    made = service_of(**options)
    made.start()
    until(lambda: made.loaded or made.failure)
    try:
        assert made.failure is None
        yield made
    finally:
        made.close(finish=False)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class ServerProcess:
    """`lowmem-bagel serve` in a process of its own, on a port that was free."""

    process: subprocess.Popen[str] | Forked
    url: str
    err: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, path: str, body: object = None, timeout: float = 60, **headers: str) -> Answer:
        """A GET, or a POST of JSON where there is a body; `_` in a header's name stands for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            named = {"content-type": "application/json"} | named
        request = urllib.request.Request(self.url + path, data, named)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def until_ready(self) -> None:
        until(lambda: self.ask("/health").json["status"] == "ready", pause=0.05)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def ended(self, timeout: float = 60) -> int:
        """The exit code."""
        return self.process.wait(timeout)

    def rss(self) -> int:
        """Bytes of memory that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


def spawn(*arguments: object, key: str = "") -> subprocess.Popen[str]:
    """In an interpreter of its own."""
    command = [sys.executable, "-c", INTERRUPTIBLE + RUN, *SERVE, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment_with(key)
    )


def fork(*arguments: object, key: str = "") -> Forked:
    """In a process that has imported everything, with pauses in long pictures."""
    return Forked(UNHURRIED + RUN, (*SERVE, *arguments), imported=SERVER, environment=environment_with(key))


def environment_with(key: str) -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", KEY_VARIABLE: key}


@contextmanager
def server_process(
    *arguments: object, ready: bool = True, key: str = "", start: Callable[..., Any] = fork
) -> Iterator[ServerProcess]:
    """The command with these arguments, loaded where `ready`; killed where a test leaves it running."""
    started = start(*arguments, key=key)
    assert started.stdout is not None and started.stderr is not None
    line = started.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, (line, started.stderr.read())
    server = ServerProcess(started, found[0])
    reader = threading.Thread(target=lambda: server.err.extend(started.stderr or ()), daemon=True)
    reader.start()
    try:
        if ready:
            server.until_ready()
        yield server
    finally:
        started.kill()
        started.wait()
        reader.join(10)
        started.stdout.close()
        started.stderr.close()


def client_for(app: Any, **about: Any) -> Any:
    """What talks to an application in this process, by a host that it is willing to be."""
    from starlette.testclient import TestClient

    return TestClient(app, **{"base_url": BASE_URL, "raise_server_exceptions": False, **about})


@contextmanager
def served(make_app: Callable[[Service], Any], **options: Any) -> Iterator[ServerThread]:
    """The server in a thread of this process, its application at work, so that a test can bend its limits."""
    from lowmem_bagel.serve.server import Server, serve

    service = service_of(**{"port": 0, "page": False, **options})
    found: list[str] = []
    made: list[Server] = []

    class Noted(Server):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    thread = threading.Thread(target=lambda: serve(service, make_app, lambda url, _: found.append(url), Noted))
    thread.start()
    until(lambda: found and made and (service.loaded or service.failure))
    running = ServerThread(service, made[0], found[0])
    try:
        until(lambda: made[0].front.app is not None)
        yield running
    finally:
        made[0].handle_exit(signal.SIGTERM, None)
        made[0].handle_exit(signal.SIGTERM, None)
        thread.join(30)
        assert not thread.is_alive()


@dataclass
class ServerThread:
    service: Service
    server: Any
    url: str

    @property
    def place(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

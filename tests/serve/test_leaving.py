"""The end of the process: what answers a client that is gone does not keep it, and the application ends in order."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

import pytest

from lowmem_bagel.serve import server as serving
from lowmem_bagel.serve.front import Front
from lowmem_bagel.serve.service import Service

Message = MutableMapping[str, Any]


class Stubborn:
    """An application one of whose requests ends long after its client."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.events: list[str] = []

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            for expected in ("startup", "shutdown"):
                self.events.append((await receive())["type"])
                await send({"type": f"lifespan.{expected}.complete"})
            return
        self.asked.set()
        await asyncio.sleep(30)

    def end_streams(self) -> None: ...


class Idle:
    """A service without requests."""

    def close(self) -> None: ...


def test_an_answer_without_a_client_is_given_up_and_the_application_still_ends_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "LAST_BYTES_SECONDS", 0.05)
    monkeypatch.setattr(serving, "ABORTED_SECONDS", 0.05)
    application = Stubborn()
    server = serving.Server(cast("Service", Idle()), cast("Front", application))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    with socket.create_connection(listening.getsockname(), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert application.asked.wait(10)
        begun = time.monotonic()
        server.leave()
        thread.join(10)
    assert not thread.is_alive() and time.monotonic() - begun < 10
    assert server.force_exit
    assert application.events == ["lifespan.startup", "lifespan.shutdown"]

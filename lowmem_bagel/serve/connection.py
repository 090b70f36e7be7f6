"""One client's connection: HTTP/1.1 as uvicorn speaks it, and no client may hold it for nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15
"""For a request's head to arrive, from the connection's beginning or the answer before it."""
TAKING_SECONDS = 60
"""For a client to take what was written to it, before more may be."""
MAX_CONNECTIONS = 512
"""At a time: below the 1024 files that many systems let a process open."""


class Connection(H11Protocol):
    """Closes on clients that send no request in time or take no answer, and on those that are too many."""

    _head: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, "too many connections; ask again later", (b"retry-after", b"5"))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(self._head, self._taking)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is not before:
            self._end(self._head)

    def on_response_complete(self) -> None:
        answered = self.cycle
        self._await_head()
        super().on_response_complete()
        if self.cycle is not answered:  # the next request had come already
            self._end(self._head)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self.loop.call_later(TAKING_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end(self._taking)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request that can be read")

    def _await_head(self) -> None:
        self._end(self._head)
        self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _refuse(self, status: int, message: str, *headers: tuple[bytes, bytes]) -> None:
        trouble: dict[str, Any] = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": trouble | ({"type": "server_error"} if status >= 500 else {})}).encode()
        about = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
        for event in (
            h11.Response(status_code=status, headers=[*about, (b"connection", b"close")]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @staticmethod
    def _end(*timers: asyncio.TimerHandle | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()

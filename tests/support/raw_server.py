"""A server on 127.0.0.1 that sends whatever bytes a test likes, as slowly as it likes."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType


@dataclass
class RawServer:
    """Answers every connection with the pieces of `answer`, given the request's head; while in a `with` block."""

    answer: Callable[[bytes], Iterable[bytes]]
    pause: float = 0.0
    """Seconds between two pieces."""
    heads: list[bytes] = field(default_factory=list)
    sent: int = 0

    def __enter__(self) -> RawServer:
        self._stop = threading.Event()
        handler = type("BoundHandler", (_Handler,), {"raw": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.place = f"127.0.0.1:{self._server.server_address[1]}"
        self.endpoint = f"http://{self.place}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    def wait(self) -> bool:
        """Between two pieces; whether it is all over."""
        return self._stop.wait(self.pause) if self.pause else self._stop.is_set()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(socketserver.BaseRequestHandler):
    raw: RawServer

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = self.request.recv(65536)
            if not piece:
                break
            head += piece
        self.raw.heads.append(head)
        for piece in self.raw.answer(head):
            self.request.sendall(piece)
            self.raw.sent += len(piece)
            if self.raw.wait():
                return


def reply(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; `_` in a header's name stands for `-`."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body

"""Clients that send nothing, take nothing, are too many or speak no HTTP: none of them holds the server."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import repeat
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from support.serving import ServerThread, served, until

from lowmem_bagel.serve import connection

PIECE, PIECES = b"x" * 65536, 1000
HEAD = b"GET /small HTTP/1.1\r\nHost: localhost\r\n"


def app_of(_: object) -> Starlette:
    """A small answer, one of 65 MB, and one that reads no body."""

    async def small(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{len(await request.body())} bytes")

    async def large(_: Request) -> StreamingResponse:
        return StreamingResponse(PIECE for _ in range(PIECES))

    async def early(_: Request) -> PlainTextResponse:
        return PlainTextResponse("no", 413)

    both = ["GET", "POST"]
    return Starlette(
        routes=[Route("/small", small, methods=both), Route("/large", large), Route("/early", early, methods=both)]
    )


@pytest.fixture(scope="module")
def running() -> Iterator[ServerThread]:
    with served(app_of) as server:
        yield server


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(connection, "TAKING_SECONDS", 0.2)


def connected(server: ServerThread) -> socket.socket:
    return socket.create_connection(server.place, timeout=20)


def read_all(client: socket.socket) -> bytes:
    """Until the server closes."""
    found = bytearray()
    with suppress(ConnectionError):
        while piece := client.recv(1 << 20):
            found += piece
    return bytes(found)


def read_until(client: socket.socket, wanted: bytes) -> None:
    found = b""
    while wanted not in found:
        piece = client.recv(65536)
        assert piece, found
        found += piece


def trickle(client: socket.socket, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        client.sendall(piece)
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"A: b"])
@pytest.mark.usefixtures("hasty")
def test_a_head_that_does_not_come_closes_the_connection(running: ServerThread, sent: bytes) -> None:
    with connected(running) as client:
        client.sendall(sent)
        begun = time.monotonic()
        assert read_all(client) == b""
        assert 0.1 < time.monotonic() - begun < 5
    until(lambda: running.connections == 0)


@pytest.mark.usefixtures("hasty")
def test_a_head_that_trickles_closes_it_too(running: ServerThread) -> None:
    with connected(running) as client:
        begun = time.monotonic()
        with pytest.raises(ConnectionError):
            trickle(client, (bytes([byte]) for byte in HEAD * 20))
        assert time.monotonic() - begun < 5


@pytest.mark.usefixtures("hasty")
def test_a_connection_is_kept_for_the_next_request_and_not_for_ever(running: ServerThread) -> None:
    with connected(running) as client:
        for _ in range(2):
            client.sendall(HEAD + b"\r\n")
            read_until(client, b"0 bytes")
        assert read_all(client) == b""


@pytest.mark.usefixtures("hasty")
def test_a_request_that_takes_long_is_no_idle_connection(running: ServerThread) -> None:
    with connected(running) as client:
        client.sendall(HEAD.replace(b"GET", b"POST") + b"Content-Length: 3\r\n\r\n")
        time.sleep(0.5)
        client.sendall(b"abc")
        read_until(client, b"3 bytes")


@pytest.mark.usefixtures("hasty")
def test_requests_that_come_together_are_all_answered(running: ServerThread) -> None:
    with connected(running) as client:
        client.sendall((HEAD + b"\r\n") * 3)
        assert read_all(client).count(b"200 OK") == 3


@pytest.mark.usefixtures("hasty")
def test_who_takes_nothing_is_left(running: ServerThread) -> None:
    with connected(running) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: running.connections == 1)
        until(lambda: running.connections == 0)
        assert len(read_all(client)) < len(PIECE) * PIECES
    until(lambda: not running.server.server_state.tasks)


def test_who_takes_slowly_gets_it_all(running: ServerThread) -> None:
    with connected(running) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        time.sleep(0.3)
        assert len(read_all(client)) > len(PIECE) * PIECES


@pytest.mark.usefixtures("hasty")
def test_who_goes_on_sending_what_was_refused_is_left(running: ServerThread) -> None:
    with connected(running) as client:
        client.sendall(b"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\nabc")
        read_until(client, b" 413 ")
        with pytest.raises(ConnectionError):
            trickle(client, repeat(b"x" * 1000, 200))


def test_too_many_connections_are_told_so(running: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    until(lambda: running.connections == 0)
    held = [connected(running) for _ in range(3)]
    until(lambda: running.connections == 3)
    with connected(running) as client:
        assert_failure(read_all(client), 503, "too many connections")
    held.pop().close()
    until(lambda: running.connections == 2)
    with connected(running) as client:
        client.sendall(HEAD + b"Connection: close\r\n\r\n")
        assert b"200 OK" in read_all(client)
    for client in held:
        client.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /small\r\n",
        b"GET /small HTTP/1.1\r\n\r\n",
        HEAD + b"Host: evil.example\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so(running: ServerThread, sent: bytes) -> None:
    with connected(running) as client:
        client.sendall(sent + b"\r\n\r\n")
        assert_failure(read_all(client), 400, "no HTTP request")


def test_a_head_without_end_is_cut(running: ServerThread) -> None:
    with connected(running) as client:
        client.sendall(HEAD + b"X: ")
        with pytest.raises(ConnectionError):
            trickle(client, repeat(b"y" * 50_000, 200))


def assert_failure(answer: bytes, status: int, said: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    error: dict[str, Any] = json.loads(body)["error"]
    assert said in error["message"]


def test_websockets_are_no_way_in(running: ServerThread) -> None:
    with connected(running) as client:
        client.sendall(HEAD + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n")
        assert b"101" not in read_all(client).split(b"\r\n")[0]

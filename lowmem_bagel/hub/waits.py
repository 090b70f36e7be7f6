"""A network of which every wait counts against one limit: connecting, a handshake, dripping headers, a body."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpcore2


@dataclass
class Limit:
    """When an exchange has taken too long; None: never."""

    until: float | None

    def within(self, timeout: float | None) -> float | None:
        """Seconds to wait at most."""
        if self.until is None:
            return timeout
        left = self.until - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("no whole answer came in time")
        return left if timeout is None else min(left, timeout)


class TimedNetwork(httpcore2.NetworkBackend):
    """The system's network, with every wait held to a limit."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._system = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        wait = self._limit.within(timeout)
        return TimedStream(
            self._system.connect_tcp(host.strip("[]"), port, wait, local_address, socket_options), self._limit
        )


class TimedStream(httpcore2.NetworkStream):
    """A connection, with every wait held to a limit."""

    def __init__(self, stream: httpcore2.NetworkStream, limit: Limit) -> None:
        self._stream = stream
        self._limit = limit

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._limit.within(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._limit.within(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return TimedStream(
            self._stream.start_tls(ssl_context, server_hostname, self._limit.within(timeout)), self._limit
        )

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

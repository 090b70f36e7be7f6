"""An internet of a test's own: names with public addresses, behind which servers of this machine answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import httpcore2

from lowmem_bagel.hub.waits import Limit, TimedNetwork


@dataclass
class Internet:
    """`names` are looked up here; a public address leads to the port of `servers`, and no other address anywhere."""

    names: Mapping[str, Sequence[str]]
    servers: Mapping[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)

    def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.names[host]

    def network(self, limit: Limit) -> httpcore2.NetworkBackend:
        return _Wires(self, TimedNetwork(limit))


class _Wires(httpcore2.NetworkBackend):
    def __init__(self, internet: Internet, wires: httpcore2.NetworkBackend) -> None:
        self._internet, self._wires = internet, wires

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        self._internet.connected.append(host)
        if host not in self._internet.servers:
            raise httpcore2.ConnectError("nobody is there")
        there = self._internet.servers[host]
        return self._wires.connect_tcp("127.0.0.1", there, timeout, local_address, socket_options)

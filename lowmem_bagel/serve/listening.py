"""Where the server listens: sockets, opened before anything slow begins."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Mapping

from ..errors import SettingError
from .options import KEY_VARIABLE, ServeOptions

BACKLOG = 256
"""Connections that may wait to be accepted."""
SAID: Mapping[int, str] = {
    errno.EADDRINUSE: "port {port} is in use; choose another with --port, or 0 for any that is free",
    errno.EACCES: "port {port} is for administrators; choose one from 1024 on with --port",
    errno.EADDRNOTAVAIL: "{host} is no address of this machine; listen at one that is with --host",
}
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Of one of a name's addresses: the machine has, say, no IPv6."""


def listen(options: ServeOptions) -> list[socket.socket]:
    """Sockets at every address that the host's name has.

    Raises:
        SettingError: an unknown host, a port in use, or an address that others reach while there is no key.
    """
    addresses = _addresses(options.host, options.port)
    if not options.api_key and not all(map(_loopback, addresses)):
        raise SettingError(
            f"{options.host} is no loopback address, so others are let in: set an API key as {KEY_VARIABLE}"
        )
    opened: list[socket.socket] = []
    refused: OSError | None = None
    port = options.port
    for family, address in addresses:
        try:
            opened.append(_opened(family, (address[0], port, *address[2:])))
        except OSError as error:
            if error.errno not in NOT_HERE:
                _close(opened)
                raise _refusal(error, options) from error
            refused = error
        else:
            port = opened[-1].getsockname()[1]  # the same at all, where any would do
    if not opened:
        assert refused is not None
        raise _refusal(refused, options) from refused
    return opened


def url_of(options: ServeOptions, opened: list[socket.socket]) -> str:
    """What a browser on this machine calls the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(options.host, options.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{opened[0].getsockname()[1]}"


def _addresses(host: str, port: int) -> list[tuple[int, tuple[str, int, *tuple[int, ...]]]]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SettingError(f"unknown host {host!r}; listen at an address of this machine with --host") from error
    families = (socket.AF_INET, socket.AF_INET6)
    return list(dict.fromkeys((family, address) for family, *_, address in found if family in families))  # type: ignore[misc]


def _loopback(known: tuple[int, tuple[str, int, *tuple[int, ...]]]) -> bool:
    return ipaddress.ip_address(known[1][0].partition("%")[0]).is_loopback


def _opened(family: int, address: tuple[str, int, *tuple[int, ...]]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let another program take the port over
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError:
        made.close()
        raise
    return made


def _refusal(error: OSError, options: ServeOptions) -> SettingError:
    said = SAID.get(
        error.errno or 0, "cannot listen at {host}:{port} ({reason}); choose another with --host and --port"
    )
    return SettingError(said.format(host=options.host, port=options.port, reason=error.strerror))


def _close(opened: list[socket.socket]) -> None:
    for one in opened:
        one.close()

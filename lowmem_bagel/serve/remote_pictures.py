"""Pictures that a request names by an address: fetched where the server's owner allows it, and from public hosts alone.

Whoever may ask this server could otherwise have it ask others in its place: the machine's own services, its network, a
cloud's metadata. So a name is resolved once, all of its addresses are checked, and the connection goes to one of those,
without a second look-up that might say something else; each redirect is checked alike. The environment's proxies are
not used: a proxy resolves names itself, where nothing is checked, and stands inside the network that is to be spared.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import urljoin

import httpcore2

from ..errors import ImageError, LowmemBagelError, SettingError
from ..hub.waits import Limit, TimedNetwork
from ..hub.web import REDIRECTS, Address, address, one_line, shown

MAX_REDIRECTS = 3
MAX_BYTES = 32 << 20
"""Of a picture."""
SECONDS = 30.0
"""For all of it, redirects included; only the system's look-up of names has its own patience."""
SILENCE = 10.0
"""Seconds without a byte."""

IPv4, IPv6 = ipaddress.IPv4Network, ipaddress.IPv6Network
SPECIAL_V4 = tuple(
    IPv4(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32",
    )
)  # fmt: skip
"""IANA's special purposes, multicast, and the public address at which a cloud (Azure) serves a machine's secrets.
Python's own `is_global` differs between its versions."""
UNICAST_V6 = IPv6("2000::/3")
SPECIAL_V6 = tuple(IPv6(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
"""Within it: tunnels, whose addresses hold others of IPv4, and examples."""
TRANSLATED_V6 = IPv6("64:ff9b::/96")
"""IPv4 as networks without it see it (NAT64)."""

Resolve: TypeAlias = Callable[[str, int], Sequence[str]]


def resolved(host: str, port: int) -> list[str]:
    """A host's addresses, by the system's resolver, which also reads 2130706433 and 0x7f.1 as 127.0.0.1."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


def is_public(text: str) -> bool:
    """Whether an IP address is one of the internet's, and no machine's or network's own."""
    found = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found in TRANSLATED_V6:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        return found in UNICAST_V6 and not any(found in network for network in SPECIAL_V6)
    return not any(found in network for network in SPECIAL_V4)


class PublicNetwork(httpcore2.NetworkBackend):
    """A network without what is not public.

    Args:
        network: connects to IP addresses.
        resolve: gives those of a name.
    """

    def __init__(self, network: httpcore2.NetworkBackend, resolve: Resolve) -> None:
        self._network, self._resolve = network, resolve

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = self._resolve(host.strip("[]"), port)
        if not addresses:
            raise httpcore2.ConnectError("it has no address")
        if not all(map(is_public, addresses)):
            raise ImageError(f"{shown(host)} is not on the public internet, and pictures are fetched from nowhere else")
        failure: Exception | None = None
        for found in addresses[:2]:  # IPv6 and IPv4, as they are mostly ordered
            try:
                return self._network.connect_tcp(found, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure


@dataclass(frozen=True)
class RemotePictures:
    """Fetches pictures.

    Args:
        allowed: whether anything may be fetched.
        seconds, max_bytes: that a picture may take.
        resolve, network: of a test that is its own internet.
    """

    allowed: bool
    seconds: float = SECONDS
    max_bytes: int = MAX_BYTES
    resolve: Resolve = resolved
    network: Callable[[Limit], httpcore2.NetworkBackend] = TimedNetwork
    trusted: Callable[[], ssl.SSLContext] = httpcore2.default_ssl_context

    def fetch(self, url: str) -> bytes:
        """What an http(s) URL leads to; whether it is a picture is seen when it is opened. Not for an event loop.

        Raises:
            SettingError: nothing is fetched by this server.
            ImageError: it leads to nothing, to where it must not, to too much, or it takes too long.
        """
        if not self.allowed:
            raise SettingError(
                "this server fetches no pictures; send it as a data: URL, or start the server with --remote-images"
            )
        limit = Limit(time.monotonic() + self.seconds)
        place = _place(url)
        for _ in range(MAX_REDIRECTS + 1):
            with self._answer(place, limit) as response:
                if response.status not in REDIRECTS:
                    return self._content(place, response)
                place = _following(place, response)
        raise ImageError(f"{place} is the end of more than {MAX_REDIRECTS} redirects; give the picture's own address")

    @contextlib.contextmanager
    def _answer(self, place: Address, limit: Limit) -> Iterator[httpcore2.Response]:
        """One request and its answer; whatever fails meanwhile, reading it too, is an ImageError."""
        network = PublicNetwork(self.network(limit), self.resolve)
        trusted = self.trusted() if place.scheme == "https" else None
        waits = dict.fromkeys(("connect", "read", "write", "pool"), min(SILENCE, self.seconds))
        request = httpcore2.Request(
            "GET",
            httpcore2.URL(scheme=place.scheme, host=place.host, port=place.port, target=place.target),
            headers=[
                ("Host", str(place).partition("://")[2]),
                ("User-Agent", "lowmem-bagel"),
                ("Accept", "image/*"),
                ("Accept-Encoding", "identity"),
            ],
            extensions={"timeout": waits, "sni_hostname": place.name},
        )
        try:
            with httpcore2.ConnectionPool(ssl_context=trusted, network_backend=network) as pool:
                response = pool.handle_request(request)
                try:
                    yield response
                finally:
                    response.close()
        except LowmemBagelError:
            raise
        except Exception as error:  # the libraries below have no common root
            reason = one_line(str(error)) or type(error).__name__
            raise ImageError(f"the picture cannot be had from {place} ({reason})") from error

    def _content(self, place: Address, response: httpcore2.Response) -> bytes:
        if response.status != 200:
            raise ImageError(f"the picture cannot be had from {place} (it answers with status {response.status})")
        if _header(response, b"content-encoding") not in ("", "identity"):
            raise ImageError(f"the picture cannot be had from {place} (it sends compressed data unasked)")
        assert isinstance(response.stream, Iterable)
        content = bytearray()
        for chunk in response.stream:
            content += chunk
            if len(content) > self.max_bytes:
                raise ImageError(f"the picture at {place} has over {self.max_bytes >> 20} MB; give a smaller one")
        return bytes(content)


def _place(url: str) -> Address:
    try:
        return address(url)
    except ValueError as error:  # which includes UnicodeError
        raise ImageError(f"{shown(url)} is no picture's address ({one_line(str(error))})") from error


def _following(place: Address, response: httpcore2.Response) -> Address:
    location = _header(response, b"location")
    if not location:
        raise ImageError(f"{place} redirects to no place; give the picture's own address")
    try:
        following = _place(urljoin(f"{place}{place.target}", location))
    except ValueError as error:  # of urljoin
        raise ImageError(f"{place} redirects to {shown(location)}, which is no address") from error
    if (place.scheme, following.scheme) == ("https", "http"):
        raise ImageError(f"{place} redirects to {following}, which is not encrypted; give the picture's own address")
    return following


def _header(response: httpcore2.Response, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in response.headers if key.lower() == name), "")

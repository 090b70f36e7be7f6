"""Asking over HTTP: the one way for listings and for bytes, through the environment's proxy and within limits.

The client beneath is `httpcore2`, what httpx stands on: it takes a network of one's own, so that every wait of an
exchange, those of a proxy's handshake and of dripping headers too, counts against one limit. Redirects are followed
here, because only here is known what may be told to whom.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httpcore2

from ..errors import DownloadError, printable
from ..files import parse_json
from .proxies import Proxy, host_bytes, proxy_for
from .waits import Limit, TimedNetwork

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 10
LISTING_BYTES = 8 * 2**20
"""Far above the list of any checkpoint's files, and few enough that parsed they fill no memory."""
ANSWER_WAITS = 4
"""An answer, or the head of a file's, may take so many times the seconds of silence that are put up with."""
BUNDLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
KEPT = "!\"$%&'()*+,/:;<=>?@[\\]^`{|}~"
"""Stays as it is in an address: a signature may cover how it is written."""
SECRETS = ("authorization", "cookie")


class ConnectionFailed(DownloadError):
    """The network or the server failed; trying again may help."""


@dataclass(frozen=True)
class Address:
    """A parsed http or https URL; `host` as `host_bytes` writes it."""

    scheme: str
    host: str
    port: int
    target: str

    def __str__(self) -> str:
        """Where it is, without the path, and never with a name or password."""
        usual = self.port == (443 if self.scheme == "https" else 80)
        return f"{self.scheme}://{self.host}" if usual else f"{self.scheme}://{self.host}:{self.port}"

    @property
    def name(self) -> str:
        """The host without the brackets of an IPv6 address."""
        return self.host.strip("[]")


def address(url: str) -> Address:
    """Parse a URL.

    Raises:
        ValueError: neither http nor https, no host, or one that cannot be.
    """
    parts: SplitResult = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("its scheme is neither http nor https")
    host = host_bytes(parts.hostname or "").decode()
    port = (443 if parts.scheme == "https" else 80) if parts.port is None else parts.port
    if port == 0:
        raise ValueError("no server listens on port 0")
    target = quote(parts.path or "/", safe=KEPT) + (f"?{quote(parts.query, safe=KEPT)}" if parts.query else "")
    return Address(parts.scheme, host, port, target)


@dataclass(frozen=True)
class Answer:
    """A server's answer whose body is still to come. `headers` have small letters; `origin` is who answers."""

    status: int
    headers: Mapping[str, str]
    origin: Address
    body: Iterable[bytes]

    def read(self, limit: int = LISTING_BYTES) -> bytes:
        """The whole body.

        Raises:
            DownloadError: it is longer than `limit` bytes, or the connection failed.
        """
        read = bytearray()
        for chunk in self.body:
            read += chunk
            if len(read) > limit:
                raise DownloadError(
                    f"{self.origin} answers with more than {limit / 1e6:.0f} MB where a short text belongs; "
                    "check --endpoint and --source"
                )
        return bytes(read)

    def json(self, limit: int = LISTING_BYTES) -> Any:
        """The body as JSON.

        Raises:
            ValueError: it is none, or nested too deeply to be an answer.
            DownloadError: as of `read`.
        """
        return parse_json(self.read(limit))


@dataclass(frozen=True)
class Web:
    """The network as one download uses it; several threads may ask at once.

    A server that is silent for `timeout` seconds has failed. Each request has a connection of its own.
    """

    timeout: float

    @contextlib.contextmanager
    def get(self, url: str, headers: Mapping[str, str], *, whole: bool) -> Iterator[Answer]:
        """GET a URL, after redirects. `Authorization` and cookies go to the first server alone.

        The head of the answer has to arrive within a few times `timeout`, and with `whole` its body too.

        Raises:
            ConnectionFailed: no connection, or it broke off; while the body is read too.
            DownloadError: a proxy or a redirect that cannot be used, or a server that is not trusted.
        """
        limit = Limit(time.monotonic() + ANSWER_WAITS * self.timeout)
        place, headers = self._first(url), {**headers, "Accept-Encoding": "identity"}
        for _ in range(MAX_REDIRECTS + 1):
            with self._exchange(place, headers, limit) as answer:
                if answer.status not in REDIRECTS:
                    limit.until = limit.until if whole else None
                    yield answer
                    return
                following = _redirected(place, answer)
            if (following.scheme, following.host, following.port) != (place.scheme, place.host, place.port):
                headers = {key: value for key, value in headers.items() if key.lower() not in SECRETS}
            place = following
        raise DownloadError(f"{place} redirects without end; check --endpoint, or try again later")

    def _first(self, url: str) -> Address:
        try:
            return address(url)
        except ValueError as error:
            raise DownloadError(f"{shown(url)} is not an address ({error})") from error

    @contextlib.contextmanager
    def _exchange(self, place: Address, headers: Mapping[str, str], limit: Limit) -> Iterator[Answer]:
        """One request and its answer, without redirects."""
        proxy = proxy_for(place.scheme, place.name, place.port, os.environ)
        url = httpcore2.URL(scheme=place.scheme, host=place.host, port=place.port, target=place.target)
        waits = dict.fromkeys(("connect", "read", "write", "pool"), self.timeout)
        extensions = {"timeout": waits, "sni_hostname": place.name}
        host = str(place).partition("://")[2]
        sent = [("Host", host), *headers.items()]
        request = httpcore2.Request("GET", url, headers=sent, extensions=extensions)
        with self._pool(place, proxy, limit) as pool:
            with _explained(place, proxy):
                response = pool.handle_request(request)
            try:
                yield _answer(place, proxy, response)
            finally:
                response.close()

    def _pool(self, place: Address, proxy: Proxy | None, limit: Limit) -> httpcore2.ConnectionPool:
        network = TimedNetwork(limit)
        trusted = self._trusted if place.scheme == "https" else None
        if proxy is None:
            return httpcore2.ConnectionPool(ssl_context=trusted, network_backend=network)
        url = httpcore2.URL(scheme=proxy.scheme, host=host_bytes(proxy.host), port=proxy.port)
        if proxy.scheme == "socks5":
            return httpcore2.SOCKSProxy(url, proxy_auth=proxy.login, ssl_context=trusted, network_backend=network)
        to_proxy = self._trusted if proxy.scheme == "https" else None
        return httpcore2.HTTPProxy(
            url, proxy_auth=proxy.login, ssl_context=trusted, proxy_ssl_context=to_proxy, network_backend=network
        )

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        """The certificates to believe: those of a variable that names some, else the system's."""
        named = next((name for name in BUNDLES if os.environ.get(name)), None)
        if named is None:
            return httpcore2.default_ssl_context()
        path = os.environ[named]
        try:
            if os.path.isdir(path):
                return ssl.create_default_context(capath=path)
            return ssl.create_default_context(cafile=path)
        except OSError as error:  # which includes SSLError
            raise DownloadError(
                f"{named} names {path!r}, where no certificates can be read; correct it or unset it"
            ) from error


def _answer(place: Address, proxy: Proxy | None, response: httpcore2.Response) -> Answer:
    headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in response.headers}
    if response.status == 407 and proxy is not None:
        raise _locked(proxy)
    if headers.get("content-encoding", "identity") != "identity":
        raise DownloadError(f"{place} sends what was not asked for (compressed data); check --endpoint")
    return Answer(response.status, headers, place, _body(place, proxy, response))


def _body(place: Address, proxy: Proxy | None, response: httpcore2.Response) -> Iterator[bytes]:
    assert isinstance(response.stream, Iterable)
    chunks = iter(response.stream)
    while True:
        with _explained(place, proxy):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def _redirected(place: Address, answer: Answer) -> Address:
    """Where a redirect leads.

    Raises:
        DownloadError: nowhere, to something that is no web server, or from https to http.
    """
    location = answer.headers.get("location", "")
    with contextlib.suppress(UnicodeDecodeError):
        location = location.encode("latin-1").decode()
    to = shown(location.partition("?")[0])
    try:
        if not location:
            raise ValueError("it names no place")
        following = address(urljoin(f"{place}{place.target}", location))
    except ValueError as error:
        raise DownloadError(f"{place} redirects to {to}, which is no address ({error}); check --endpoint") from error
    if (place.scheme, following.scheme) == ("https", "http"):
        raise DownloadError(f"{place} redirects to {to}, which is not encrypted; check --endpoint")
    return following


@contextlib.contextmanager
def _explained(place: Address, proxy: Proxy | None) -> Iterator[None]:
    """Around what only the network and the other side decide: whatever goes wrong there becomes one line."""
    try:
        yield
    except Exception as error:  # the libraries below have no common root, and stumble over strange answers
        raise _failure(error, place, proxy) from error


def _failure(error: Exception, place: Address, proxy: Proxy | None) -> DownloadError:
    detail = one_line(str(error)) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = one_line(cause.verify_message) or detail
            return DownloadError(f"{place} is not trusted ({reason}); install ca-certificates or set SSL_CERT_FILE")
        cause = cause.__cause__ or cause.__context__
    if proxy is None:
        return ConnectionFailed(
            f"{place} cannot be reached ({detail}); check the network, or give another --endpoint or --source"
        )
    if isinstance(error, httpcore2.ProxyError) and detail.startswith(("407", "Requested", "Invalid username")):
        return _locked(proxy)
    return ConnectionFailed(
        f"{place} cannot be reached through the proxy {proxy} ({detail}); "
        f"check that proxy, or name {place.name} in NO_PROXY to go without it"
    )


def _locked(proxy: Proxy) -> DownloadError:
    does = "asks for a name and password" if proxy.login is None else "does not take the name and password it is given"
    return DownloadError(f"the proxy {proxy} {does}; write them as {proxy.scheme}://NAME:PASSWORD@HOST:PORT")


def shown(text: object, limit: int = 100) -> str:
    """What somebody gave for an address or a name, fit for a line of ours: quoted, without name and password, cut."""
    return one_line(repr(text.rpartition("@")[2] if isinstance(text, str) else text), limit)


def one_line(text: str, limit: int = 200) -> str:
    """What others wrote, fit for a line of ours: its first line, nothing unprintable, cut."""
    return printable(next(iter(text.splitlines()), ""), limit)

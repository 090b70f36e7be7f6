"""The proxies that the environment names: which one stands before an address, and whether it can be used."""

from __future__ import annotations

import ipaddress
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from ..errors import DownloadError, MissingExtraError

PORTS: Mapping[str, int] = {"http": 80, "https": 443, "socks5": 1080}
SPELLINGS: Mapping[str, str] = {"socks": "socks5", "socks5h": "socks5"}
"""Other names of a kind. Names of hosts are looked up by the SOCKS proxy, however it is spelled."""
SYSTEM = "the system's settings"
FORMS = "http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT"


@dataclass(frozen=True)
class Proxy:
    """A proxy that can be used; `setting` is the variable that names it."""

    setting: str
    scheme: str
    host: str
    """Without the brackets of an IPv6 address."""
    port: int
    login: tuple[bytes, bytes] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """For people: without name and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port} of {self.setting}"


def proxy_for(scheme: str, host: str, port: int, environ: Mapping[str, str]) -> Proxy | None:
    """The proxy for a server, by HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in small letters or capitals.

    Small letters win, and set to nothing they turn the variable off, as for Python and curl. Without any of these the
    proxies of the system's settings count, where a system has such. `host` is without brackets.

    Raises:
        DownloadError: the proxy cannot be used; the line names the variable, and never a password.
        MissingExtraError: a SOCKS proxy, and the package for it is not installed.
    """
    found = _variables(environ)
    if not found.keys() & {"http", "https", "all"}:
        found = {**{key: (SYSTEM, value) for key, value in _system(host).items()}, **found}
    setting, value = found.get(scheme) or found.get("all") or ("", "")
    if not value or _bypassed(host, port, found.get("no", ("", ""))[1]):
        return None
    return _usable(setting, value)


def _variables(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What the environment says: kind -> (name of the variable, value)."""
    names = [name for kind in ("http", "https", "all", "no") for name in (f"{kind}_PROXY".upper(), f"{kind}_proxy")]
    said = {name.lower().removesuffix("_proxy"): (name, environ[name].strip()) for name in names if name in environ}
    return {kind: (name, value) for kind, (name, value) in said.items() if value}


def _system(host: str) -> Mapping[str, str]:
    """What Windows' and macOS's own settings say for a host; nothing elsewhere."""
    settings = urllib.request.getproxies()
    return {} if not settings or urllib.request.proxy_bypass(host) else settings


def _bypassed(host: str, port: int, exceptions: str) -> bool:
    """Whether NO_PROXY names a server: a host or domain, an address or network, any of them with a port, or `*`."""
    return any(_excepts(entry.lower(), host.lower(), port) for entry in re.split(r"[,\s]+", exceptions) if entry)


def _excepts(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    named = re.fullmatch(r"\[(.+)\](?::(\d+))?|([^:]+):(\d+)", entry)
    if named is not None:
        entry, wanted = named[1] or named[3], named[2] or named[4]
        if wanted is not None and wanted != str(port):
            return False
    address, network = _address(host), _network(entry)
    if address is not None or network is not None:
        return address is not None and network is not None and address in network
    domain = entry.removeprefix("*").strip(".")
    return bool(domain) and f".{host.rstrip('.')}".endswith(f".{domain}")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None


def _usable(setting: str, value: str) -> Proxy:
    parts = _split(setting, value)
    scheme = SPELLINGS.get(parts.scheme, parts.scheme)
    if scheme not in PORTS:
        raise DownloadError(f"{setting} names {scheme}, a kind of proxy that cannot be used; write it as {FORMS}")
    if scheme == "socks5" and find_spec("socksio") is None:
        raise MissingExtraError(
            f"{setting} names a SOCKS proxy, which needs a package: pip install 'lowmem-bagel[socks]'; "
            "or set it to a proxy that speaks HTTP"
        )
    login = None
    if parts.username is not None or parts.password is not None:
        login = unquote_to_bytes(parts.username or ""), unquote_to_bytes(parts.password or "")
        if max(map(len, login)) > 255 or any(byte < 32 for part in login for byte in part):
            raise DownloadError(f"{setting} holds a name or password that no proxy takes; correct it")
    assert parts.hostname is not None
    return Proxy(setting, scheme, parts.hostname, parts.port or PORTS[scheme], login)


def _split(setting: str, value: str) -> SplitResult:
    """The parts of a proxy's address; without `scheme://` it is an HTTP one's, as everywhere."""
    try:
        value.encode()
        parts = urlsplit(value if "://" in value else f"http://{value}")
        usable = bool(host_bytes(parts.hostname or "")) and parts.port != 0
    except ValueError:  # also what is no text, no port or no host
        usable = False
    if not usable:
        raise DownloadError(f"{setting} does not hold the address of a proxy; write it as {FORMS}")
    return parts


def host_bytes(host: str) -> bytes:
    """A host as it is sent: ASCII, an IPv6 address in brackets.

    Raises:
        ValueError: no host can be called so.
    """
    if ":" in host:
        ipaddress.IPv6Address(host)
        return f"[{host}]".encode()
    name = host.encode("idna")
    if not re.fullmatch(rb"[A-Za-z0-9._~-]+", name):
        raise ValueError(f"no host is called {host!r}")
    return name

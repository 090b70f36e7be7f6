"""Which proxy stands before a server, and downloads through real ones."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from support.command import Ran
from support.hub_server import CERTIFICATE, HubServer
from support.proxy_servers import ProxyServer
from support.raw_server import RawServer

from lowmem_bagel.errors import DownloadError, MissingExtraError, UserError
from lowmem_bagel.hub import proxies
from lowmem_bagel.hub.download import Patience, download
from lowmem_bagel.hub.proxies import proxy_for

BIG, SMALL = "ema.safetensors", "llm_config.json"
FILES = {BIG: random.randbytes(300_000), SMALL: b"{}"}
HASTY = Patience(timeout=5.0, attempts=2, pause=0.01)
VARIABLES = [name for kind in ("HTTP", "HTTPS", "ALL", "NO") for name in (f"{kind}_PROXY", f"{kind.lower()}_proxy")]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "HF_TOKEN", "HF_ENDPOINT", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=[False, True], ids=["http", "https"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    if request.param:
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with HubServer(dict(FILES), tls=request.param) as server:
        yield server


def fetched(hub: HubServer, out: Path) -> dict[str, bytes]:
    download(hub.repo, out, endpoint=hub.endpoint, files=list(FILES), patience=HASTY)
    return {name: (out / name).read_bytes() for name in FILES}


def places(hub: HubServer) -> set[str]:
    return {url.partition("://")[2] for url in (hub.endpoint, hub.content_network)}


@pytest.mark.parametrize("spelling", ["http://{}", "{}", "HTTP://{}/", " http://{} "])
@pytest.mark.parametrize("variable", ["OWN_PROXY", "own_proxy", "ALL_PROXY", "all_proxy"])
def test_listing_and_bytes_go_through_an_http_proxy(
    variable: str, spelling: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = hub.endpoint.partition(":")[0]
    name = variable.replace("OWN", own.upper()).replace("own", own)
    with ProxyServer() as proxy:
        monkeypatch.setenv(name, spelling.format(proxy.place))
        assert fetched(hub, tmp_path) == FILES
        assert set(proxy.asked) == places(hub)


def test_a_proxy_that_speaks_tls(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ProxyServer("https") as proxy:
        monkeypatch.setenv("ALL_PROXY", f"https://{proxy.place}")
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        assert fetched(hub, tmp_path) == FILES
        assert set(proxy.asked) == places(hub)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks", "SOCKS5"])
@pytest.mark.parametrize("variable", ["ALL_PROXY", "all_proxy", "HTTP_PROXY", "https_proxy"])
def test_listing_and_bytes_go_through_a_socks_proxy(
    variable: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("socksio")
    tls = variable.lower().startswith("https")
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with HubServer(dict(FILES), tls=tls) as hub, ProxyServer("socks5") as proxy:
        monkeypatch.setenv(variable, f"{scheme}://{proxy.place}/")
        assert fetched(hub, tmp_path) == FILES
        assert set(proxy.asked) == places(hub)


@pytest.mark.parametrize("kind", ["http", "socks5"])
def test_names_are_looked_up_by_the_proxy(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("socksio")
    with HubServer({SMALL: b"{}"}) as hub:
        host, _, port = hub.endpoint.rpartition("/")[2].partition(":")
        with ProxyServer(kind, forwards_to=(host, int(port))) as proxy:
            monkeypatch.setenv("ALL_PROXY", f"{kind}://{proxy.place}")
            download(hub.repo, tmp_path, endpoint="http://hub.invalid", files=[SMALL], patience=HASTY)
            assert set(proxy.asked) == {"hub.invalid:80"}


@pytest.mark.parametrize("kind", ["http", "socks5"])
def test_a_proxy_gets_its_name_and_password(
    kind: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("socksio")
    with ProxyServer(kind, login=("me", "p@ss word")) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"{kind}://me:p%40ss%20word@{proxy.place}")
        assert fetched(hub, tmp_path) == FILES


@pytest.mark.parametrize("kind", ["http", "socks5"])
@pytest.mark.parametrize("login", ["", "me:hunter2@"])
def test_a_proxy_that_wants_another_password_is_named_without_it(
    login: str, kind: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("socksio")
    with ProxyServer(kind, login=("me", "right")) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"{kind}://{login}{proxy.place}")
        does = "does not take the name and password" if login else "asks for a name and password"
        with pytest.raises(DownloadError, match=f"the proxy {kind}://{proxy.place} of ALL_PROXY {does}") as caught:
            fetched(hub, tmp_path)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "https", "socks5"])
def test_a_failed_connection_names_its_proxy(
    scheme: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("all_proxy", f"{scheme}://me:hunter2@{place}")
        message = (
            rf"^{hub.endpoint} cannot be reached through the proxy {scheme}://{place} of all_proxy \(.*refused.*\)"
        )
        with pytest.raises(DownloadError, match=message) as caught:
            fetched(hub, tmp_path)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [b"", b"\x05", b"\x05\x00", b"\x05\x05", b"\x05\xff", b"\x05\x00\x05\x00\x00\x09", b"HTTP/1.1 200 OK\r\n\r\n",
     b"HTTP/1.1 503 no\r\n\r\n", b"\0" * 5000, b"HTTP/1.1 200 " + b"x" * 200_000],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_a_proxy_that_answers_nonsense(
    scheme: str, answer: bytes, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RawServer(lambda head: [answer]) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://{proxy.place}")
        with pytest.raises(DownloadError) as caught:
            download(hub.repo, tmp_path, endpoint=hub.endpoint, patience=Patience(0.1, 1, 0.0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("socks4://127.0.0.1:9", "a kind of proxy that cannot be used"),
        ("socks4a://127.0.0.1:9", "a kind of proxy that cannot be used"),
        ("ftp://127.0.0.1:9", "a kind of proxy that cannot be used"),
        ("http://", "address of a proxy"),
        ("http://[::1", "address of a proxy"),
        ("http://127.0.0.1:port", "address of a proxy"),
        ("http://127.0.0.1:99999", "address of a proxy"),
        ("http://127.0.0.1:0", "address of a proxy"),
        ("http://two words:9", "address of a proxy"),
        ("http://\udc80:9", "address of a proxy"),
        ("http://" + "a" * 70 + ":9", "address of a proxy"),
        ("://127.0.0.1:9", "address of a proxy"),
        ("socks5://" + "n" * 300 + ":hunter2@127.0.0.1:9", "no proxy takes"),
    ],
)
def test_a_proxy_that_cannot_be_used(value: str, message: str) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        given = value.replace("//1", "//me:hunter2@1")
        with pytest.raises(DownloadError, match=f"^{name} .*{message}") as caught:
            proxy_for("https", "hub.example.org", 443, {name: given})
        assert "hunter2" not in str(caught.value)
        assert "write it as http://HOST:PORT" in str(caught.value) or "correct it" in str(caught.value)


def test_a_socks_proxy_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"^all_proxy .*pip install 'lowmem-bagel\[socks\]'"):
        proxy_for("https", "hub.example.org", 443, {"all_proxy": "socks://127.0.0.1:9"})
    assert issubclass(MissingExtraError, UserError)


A, B, C = "http://a:1", "http://b:2", "http://c:3"


@pytest.mark.parametrize(
    ("environ", "http", "https"),
    [
        ({}, None, None),
        ({"HTTP_PROXY": A}, "HTTP_PROXY", None),
        ({"HTTPS_PROXY": A}, None, "HTTPS_PROXY"),
        ({"ALL_PROXY": A}, "ALL_PROXY", "ALL_PROXY"),
        ({"all_proxy": A, "HTTPS_PROXY": B}, "all_proxy", "HTTPS_PROXY"),
        ({"ALL_PROXY": A, "all_proxy": B, "http_proxy": C}, "http_proxy", "all_proxy"),
        ({"HTTPS_PROXY": A, "https_proxy": ""}, None, None),
        ({"ALL_PROXY": "", "HTTPS_PROXY": " "}, None, None),
        ({"ALL_PROXY": "nonsense://", "HTTPS_PROXY": A, "HTTP_PROXY": B}, "HTTP_PROXY", "HTTPS_PROXY"),
        ({"ALL_PROXY": "nonsense://", "NO_PROXY": "*"}, None, None),
    ],
)
def test_the_variable_that_counts(environ: Mapping[str, str], http: str | None, https: str | None) -> None:
    found = [proxy_for(scheme, "hub.example.org", 443, environ) for scheme in ("http", "https")]
    assert [proxy and proxy.setting for proxy in found] == [http, https]


@pytest.mark.parametrize(
    ("exceptions", "host", "bypassed"),
    [
        ("hub.example.org", "hub.example.org", True),
        ("HUB.Example.org", "hub.example.org", True),
        ("example.org", "hub.example.org", True),
        (".example.org", "hub.example.org", True),
        (".example.org", "example.org", True),
        ("*.example.org", "hub.example.org", True),
        ("example.org.", "hub.example.org", True),
        ("ample.org", "hub.example.org", False),
        ("other.org, hub.example.org", "hub.example.org", True),
        ("other.org hub.example.org", "hub.example.org", True),
        ("hub.example.org:443", "hub.example.org", True),
        ("hub.example.org:80", "hub.example.org", False),
        ("*", "hub.example.org", True),
        (",, ,", "hub.example.org", False),
        (".", "hub.example.org", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1:443", "127.0.0.1", True),
        ("27.0.0.1", "127.0.0.1", False),
        ("127.0.0.0/8", "127.9.9.9", True),
        ("10.0.0.0/8", "127.0.0.1", False),
        ("127.0.0.0/8", "hub.example.org", False),
        ("0.1", "127.0.0.1", False),
        ("::1", "::1", True),
        ("[::1]", "::1", True),
        ("[::1]:443", "::1", True),
        ("[::1]:80", "::1", False),
        ("0:0:0:0:0:0:0:1", "::1", True),
        ("fe80::/10", "fe80::5", True),
        ("[", "hub.example.org", False),
    ],
)
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_no_proxy(name: str, exceptions: str, host: str, bypassed: bool) -> None:
    found = proxy_for("https", host, 443, {"ALL_PROXY": "http://proxy:3128", name: exceptions})
    assert (found is None) == bypassed


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "through the proxy socks5://127.0.0.1:1 of ALL_PROXY"),
        ("HTTP_PROXY", "socks5h://127.0.0.1:1", "through the proxy socks5://127.0.0.1:1 of HTTP_PROXY"),
        ("all_proxy", "socks://127.0.0.1:1", "through the proxy socks5://127.0.0.1:1 of all_proxy"),
        ("http_proxy", "http://me:hunter2@127.0.0.1:1", "through the proxy http://127.0.0.1:1 of http_proxy"),
        ("ALL_PROXY", "socks4://me:hunter2@127.0.0.1:1", "ALL_PROXY names socks4, a kind of proxy that cannot be used"),
        ("ALL_PROXY", "http://me:hunter2@127.0.0.1:x", "ALL_PROXY does not hold the address of a proxy"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong_with_a_proxy(
    name: str, value: str, says: str, cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("socksio")
    monkeypatch.setenv(name, value)
    ran = cli("download", "owner/model", tmp_path / "out", "--endpoint", "http://hub.invalid")
    assert says in ran.error
    assert "hunter2" not in ran.error
    assert not (tmp_path / "out").exists()


def test_no_proxy_is_honored(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ProxyServer() as proxy:
        monkeypatch.setenv("ALL_PROXY", f"http://{proxy.place}")
        monkeypatch.setenv("no_proxy", "127.0.0.0/8")
        assert fetched(hub, tmp_path) == FILES
        assert proxy.asked == []


def test_settings_of_the_system_count_without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies.urllib.request, "getproxies", lambda: {"https": "http://corporate:8080"})
    monkeypatch.setattr(proxies.urllib.request, "proxy_bypass", lambda host: host == "intranet")
    assert str(proxy_for("https", "hub.example.org", 443, {})) == "http://corporate:8080 of the system's settings"
    assert proxy_for("https", "intranet", 443, {}) is None
    assert proxy_for("https", "hub.example.org", 443, {"NO_PROXY": "example.org"}) is None
    assert proxy_for("https", "hub.example.org", 443, {"http_proxy": A}) is None

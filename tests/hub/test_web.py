"""What servers may not do: go on without end, redirect anywhere, learn a token that is not theirs."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import CERTIFICATE, HubServer, git_sha1
from support.raw_server import RawServer, reply

from lowmem_bagel.errors import DownloadError
from lowmem_bagel.hub.download import DownloadResult, Patience, download
from lowmem_bagel.hub.web import LISTING_BYTES, Web, address

SMALL = "llm_config.json"
HASTY = Patience(timeout=0.15, attempts=2, pause=0.01)
SOURCES = ("huggingface", "modelscope")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[..., DownloadResult]:
    def fetch(endpoint: str, **settings: Any) -> DownloadResult:
        asked = {"files": [SMALL], "patience": HASTY, **settings}
        return download("owner/model", tmp_path / "out", endpoint=endpoint, **asked)

    return fetch


def refused(fetch: Callable[..., DownloadResult], endpoint: str, message: str, **settings: Any) -> None:
    """One line, with the place, and nothing on the disk."""
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(endpoint, **settings)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def dripping(text: bytes) -> Iterable[bytes]:
    return (text[i : i + 1] for i in itertools.count() if i < len(text))


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS: dict[str, Callable[[bytes], Iterable[bytes]]] = {
    "body": lambda head: itertools.chain([HEAD + b"\r\n"], itertools.repeat(b'{"a": [' * 9000)),
    "chunks": lambda head: itertools.chain([CHUNKED], itertools.repeat(b"10000\r\n" + b" " * 65536 + b"\r\n")),
    "headers": lambda head: itertools.chain([HEAD], itertools.repeat(b"X-Header: " + b"y" * 9000 + b"\r\n")),
    "one header": lambda head: itertools.chain([HEAD, b"X-Header: "], itertools.repeat(b"y" * 9000)),
    "announcements": lambda head: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "length": lambda head: [reply(b"{}").replace(b"Length: 2", b"Length: 1" + b"0" * 30), *[b" " * 65536] * 200],
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("what", ENDLESS)
def test_an_endless_answer_is_given_up(what: str, source: str, fetch: Callable[..., DownloadResult]) -> None:
    with RawServer(ENDLESS[what]) as server:
        started = time.monotonic()
        refused(
            fetch, server.endpoint, f"^{server.endpoint} (answers with more than 8 MB|cannot be reached)", source=source
        )
        assert time.monotonic() - started < 5
        assert server.sent < 8 * LISTING_BYTES


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "answer",
    [reply(b'{"siblings": []}' + b" " * 500), b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500],
    ids=["body", "headers"],
)
def test_a_dripping_answer_is_given_up(answer: bytes, source: str, fetch: Callable[..., DownloadResult]) -> None:
    with RawServer(lambda head: dripping(answer), pause=0.02) as server:
        started = time.monotonic()
        refused(fetch, server.endpoint, "no whole answer came in time|timed out", source=source)
        assert time.monotonic() - started < 3


def test_a_dripping_head_after_a_redirect_is_given_up(fetch: Callable[..., DownloadResult]) -> None:
    listing = {"siblings": [{"rfilename": SMALL, "size": 2, "blobId": "0" * 40}]}

    def answer(head: bytes) -> Iterable[bytes]:
        if b"/api/models/" in head:
            return [reply(json.dumps(listing).encode())]
        if b" /there" in head:
            return itertools.chain([HEAD], itertools.repeat(b"X: y\r\n"))
        return [reply(b"", "302 Found", Location="/there")]

    with RawServer(answer, pause=0.02) as server:
        started = time.monotonic()
        refused(fetch, server.endpoint, "no whole answer came in time|timed out")
        assert time.monotonic() - started < 4


def test_a_file_that_drips_is_given_up_and_what_came_is_kept(
    fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    content = bytes(100_000)
    listing = {"sha": None, "siblings": [{"rfilename": SMALL, "size": len(content), "blobId": git_sha1(content)}]}

    def answer(head: bytes) -> Iterator[bytes]:
        if b"/api/models/" in head:
            yield reply(json.dumps(listing).encode())
        else:
            start = int(head.partition(b"bytes=")[2].partition(b"-")[0] or 0)
            yield f"HTTP/1.1 206 OK\r\nContent-Range: bytes {start}-\r\nContent-Length: 90000\r\n\r\n".encode()
            yield from itertools.repeat(b"\0")

    with RawServer(answer, pause=0.02) as server:
        refused(fetch, server.endpoint, f"^{SMALL}: {server.endpoint} sent .* bytes and no more; .* resumes")
    (part,) = (tmp_path / "out").glob(".download/*.part")
    assert 5 < part.stat().st_size < 1000


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("ftp://127.0.0.1/file", "redirects to 'ftp://127.0.0.1/file', which is no address"),
        ("file:///etc/passwd", "which is no address"),
        ("http://[", "which is no address"),
        ("http://[::1", "which is no address"),
        ("http://", "redirects without end"),
        ("http:///path", "redirects without end"),
        ("http://127.0.0.1:0/", "which is no address"),
        ("http://127.0.0.1:port/", "which is no address"),
        ("http://127.0.0.1:99999999/", "which is no address"),
        ("http://" + "a" * 64 + "/", "which is no address"),
        ("http://a..b/", "which is no address"),
        ("http://a b/", "which is no address"),
        ("http://%41%00/", "which is no address"),
        ("http://\udcff..\udcfe/", "which is no address"),
        ("http://me:hunter2@[/", "which is no address"),
        ("", "which is no address"),
        ("/again", "redirects without end"),
        ("//127.0.0.1:1/there", "cannot be reached"),
        ("http://nowhere.invalid/", "http://nowhere.invalid cannot be reached"),
    ],
)
@pytest.mark.parametrize("status", ["302 Found", "308 There"])
def test_redirects_are_checked(status: str, location: str, message: str, fetch: Callable[..., DownloadResult]) -> None:
    with RawServer(lambda head: [reply(b"", status, Location=location)]) as server:
        refused(fetch, server.endpoint, message)
        assert len(server.heads) <= 11


def test_a_redirect_without_a_place(fetch: Callable[..., DownloadResult]) -> None:
    with RawServer(lambda head: [reply(b"", "302 Found")]) as server:
        refused(fetch, server.endpoint, "redirects to '', which is no address")


def test_https_is_not_left(fetch: Callable[..., DownloadResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with HubServer({SMALL: b"{}", "big.safetensors": bytes(5000)}, tls=True) as hub:
        hub.content_network = hub.content_network.replace("https", "http")
        refused(fetch, hub.endpoint, "which is not encrypted", files=["big.safetensors"])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("login", ["token", "endpoint"])
def test_credentials_follow_redirects_only_on_the_same_server(
    login: str, source: str, fetch: Callable[..., DownloadResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RawServer(lambda head: [reply(b"{}")]) as other:

        def answer(head: bytes) -> list[bytes]:
            return [reply(b"", "307 There", Location=f"{other.endpoint}/x" if b" /there" in head else "/there")]

        with RawServer(answer) as server:
            endpoint = server.endpoint
            if login == "token":
                monkeypatch.setenv("HF_TOKEN", "c2VjcmV0")
            else:
                endpoint = endpoint.replace("//", "//me:c2VjcmV0@")
            refused(fetch, endpoint, "does not answer as", source=source)
            told = [b"authorization" in head.lower() for head in server.heads]
            assert told == [login == "endpoint" or source == "huggingface"] * 2
    (head,) = other.heads
    assert b"authorization" not in head.lower()
    assert b"c2VjcmV0" not in head


def test_a_name_and_password_of_the_endpoint_are_sent_and_never_shown(fetch: Callable[..., DownloadResult]) -> None:
    with RawServer(lambda head: [reply(b"", "403 Forbidden")]) as server:
        with pytest.raises(DownloadError) as caught:
            fetch(server.endpoint.replace("//", "//me:hunter%32@"))
        assert b"Authorization: Basic bWU6aHVudGVyMg==" in server.heads[0]
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "endpoint",
    ["http://[::1", "http://127.0.0.1:port", "http://127.0.0.1:99999", "http://\0", "http://\udc80", "http://a/\udc80",
     "http://me:hunter2@[", "ftp://a", "http://", "hub.example.org", "http://a b", "http://a/?b", "http://a#b", "//a",
     "\n"],
)  # fmt: skip
def test_endpoints_that_are_none(endpoint: str, source: str, fetch: Callable[..., DownloadResult]) -> None:
    refused(fetch, endpoint, "is not an endpoint; write it as https://hub.example.org", source=source)
    with pytest.raises(DownloadError) as caught:
        fetch(endpoint)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("revision", ["\udc80", "a\0b", "..", ".", "a\nb", "r" * 300])
def test_revisions_that_are_none(revision: str, source: str, fetch: Callable[..., DownloadResult]) -> None:
    refused(fetch, "http://127.0.0.1:1", "cannot be a revision", source=source, revision=revision)


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "ü", "\udc80", "x" * 5000])
def test_a_token_that_is_none(
    token: str, fetch: Callable[..., DownloadResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    refused(fetch, "http://127.0.0.1:1", "^HF_TOKEN does not hold an access token")
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_bytes(token.encode("utf-8", "surrogateescape"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    refused(fetch, "http://127.0.0.1:1", "/token(:| does)")


def test_the_token_of_a_login_is_used(
    fetch: Callable[..., DownloadResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("hf_secret\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with HubServer({SMALL: b"{}"}, token="hf_secret") as hub:
        fetch(hub.endpoint)
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
        refused(fetch, hub.endpoint, f"accept its conditions at {hub.endpoint}/owner/model and set HF_TOKEN to a token")
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        refused(fetch, hub.endpoint, "as the owner of your token")


def test_offline_is_said(fetch: Callable[..., DownloadResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(fetch, "http://127.0.0.1:1", "^HF_HUB_OFFLINE is set")


def test_an_untrusted_server_and_certificates_that_cannot_be_read(
    fetch: Callable[..., DownloadResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with HubServer({SMALL: b"{}"}, tls=True) as hub:
        refused(fetch, hub.endpoint, f"^{hub.endpoint} is not trusted .*; install ca-certificates or set SSL_CERT_FILE")
        for name in ("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
            with monkeypatch.context() as patch:
                patch.setenv(name, str(CERTIFICATE))
                fetch(hub.endpoint)
                patch.setenv(name, str(tmp_path / "absent"))
                refused(fetch, hub.endpoint, f"^{name} names .*absent', where no certificates can be read")
                patch.setenv(name, str(CERTIFICATE.with_suffix(".key")))
                refused(fetch, hub.endpoint, f"^{name} names ")


def test_data_that_comes_compressed_though_not_asked_for(fetch: Callable[..., DownloadResult]) -> None:
    with RawServer(lambda head: [reply(b"{}", Content_Encoding="gzip")]) as server:
        refused(fetch, server.endpoint, "what was not asked for")
        assert b"accept-encoding: identity" in server.heads[0].lower()


@pytest.mark.parametrize(
    ("url", "host", "place", "target"),
    [
        ("http://hub.example.org", "hub.example.org", "http://hub.example.org", "/"),
        ("HTTPS://Hub.Example.org:443/a?b=c#d", "hub.example.org", "https://hub.example.org", "/a?b=c"),
        ("http://h/a'(~)*?b='c'|d%7e+e;f", "h", "http://h", "/a'(~)*?b='c'|d%7e+e;f"),
        ("http://[::1]:8080/a b", "[::1]", "http://[::1]:8080", "/a%20b"),
        ("http://me:secret@bücher.example/ü%20", "xn--bcher-kva.example", "http://xn--bcher-kva.example", "/%C3%BC%20"),
    ],
)
def test_addresses(url: str, host: str, place: str, target: str) -> None:
    read = address(url)
    assert (read.host, str(read), read.target) == (host, place, target)


def test_an_ipv6_server_is_reached_and_asked_by_its_name(tmp_path: Path) -> None:
    import socket
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Server(HTTPServer):
        address_family = socket.AF_INET6

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.headers["Host"].encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        server = Server(("::1", 0), Handler)
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        Thread(target=server.handle_request, daemon=True).start()
        place = f"[::1]:{server.server_address[1]}"
        with Web(5.0).get(f"http://{place}/", {}, whole=True) as answer:
            assert answer.read() == place.encode()

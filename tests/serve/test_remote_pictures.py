"""Pictures by address: from public hosts alone, whatever name, number or redirect leads elsewhere; bounded in all."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.internet import Internet
from support.raw_server import RawServer, reply

from lowmem_bagel.errors import ImageError, SettingError, UserError
from lowmem_bagel.serve.remote_pictures import RemotePictures, is_public, resolved

PUBLIC, OTHER = "93.184.216.34", "2606:4700::6810:85e5"


def answer(head: bytes) -> Iterator[bytes]:
    """A site: /picture is one, /to?URL redirects there, /loop to itself, and others misbehave."""
    target = head.split(b" ")[1].decode()
    if target.startswith("/to?"):
        yield reply(b"", "302 Found", Location=target[4:])
    elif target.startswith("/hops/"):
        left = int(target[6:])
        yield reply(b"", "307 Moved", Location=f"/hops/{left - 1}" if left else "/picture")
    elif target == "/huge":
        yield b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
        while True:
            yield b"x" * 65536
    elif target == "/slow":
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
        while True:
            yield b"x"
            time.sleep(0.02)
    elif target == "/headers":
        yield b"HTTP/1.1 200 OK\r\n"
        while True:
            yield b"a: b\r\n"
            time.sleep(0.02)
    elif target == "/nowhere":
        yield reply(b"", "302 Found")
    elif target == "/squeezed":
        yield reply(b"x", Content_Encoding="gzip")
    elif target == "/picture":
        yield reply(b"a picture")
    else:
        yield reply(b"", "404 Not Found")


@pytest.fixture(scope="module")
def site() -> Iterator[RawServer]:
    with RawServer(answer) as server:
        yield server


@pytest.fixture
def internet(site: RawServer) -> Internet:
    names = {
        "good.example": [OTHER, PUBLIC],
        "inside.example": ["10.0.0.7"],
        "both.example": [PUBLIC, "127.0.0.1"],
        "mapped.example": ["::ffff:127.0.0.1"],
        "gone.example": [],
        "xn--bcher-kva.example": [PUBLIC],
    }
    return Internet(names, {PUBLIC: int(site.place.partition(":")[2])})


def pictures(internet: Internet, **more: Any) -> RemotePictures:
    return RemotePictures(True, **{"resolve": internet.resolve, "network": internet.network, **more})


@pytest.mark.parametrize("path", ["/picture", "/to?/picture", "/to?http://good.example/picture", "/hops/2"])
def test_a_public_picture_is_fetched(internet: Internet, path: str) -> None:
    assert pictures(internet).fetch(f"http://good.example{path}") == b"a picture"
    assert internet.connected[:2] == [OTHER, PUBLIC]


def test_names_of_any_script_are_looked_up_as_the_net_has_them(internet: Internet, site: RawServer) -> None:
    assert pictures(internet).fetch("http://bücher.example:80/picture") == b"a picture"
    assert b"Host: xn--bcher-kva.example\r\n" in site.heads[-1]


def test_a_name_is_resolved_once_and_the_connection_goes_to_what_was_checked(internet: Internet) -> None:
    """DNS rebinding: the second answer would be an inner address."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    assert (
        pictures(internet, resolve=lambda host, port: next(answers)).fetch("http://a.example/picture") == b"a picture"
    )
    assert internet.connected == [PUBLIC]


HOSTILE = [
    "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://0x7f.0.0.1/",
    "http://0177.0.0.1/", "http://017700000001/", "http://0/", "http://localhost/", "http://[::1]/", "http://[::]/",
    "http://[::ffff:127.0.0.1]/", "http://[::ffff:a9fe:a9fe]/", "http://[::127.0.0.1]/", "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/", "http://[2001:0:7f00:1::]/", "http://[fe80::1]/", "http://[fc00::1]/",
    "http://[ff02::1]/", "http://169.254.169.254/latest/meta-data/", "http://168.63.129.16/", "http://100.64.0.1/",
    "http://192.168.1.1/", "http://172.31.255.255/", "http://10.1.2.3:8080/", "http://224.0.0.1/",
    "http://255.255.255.255/", "http://0.0.0.0:7860/", "http://198.18.0.1/", "http://me:secret@127.0.0.1/",
    "http://good.example@127.0.0.1/", "http://127.0.0.1#good.example/", "http://１２７.0.0.1/",
]  # fmt: skip


@pytest.mark.parametrize("url", HOSTILE)
def test_no_spelling_of_an_inner_address_is_reached(internet: Internet, url: str) -> None:
    with pytest.raises(ImageError, match="not on the public internet"):
        pictures(internet, resolve=resolved).fetch(url)
    assert internet.connected == []


@pytest.mark.parametrize("host", ["inside.example", "both.example", "mapped.example"])
def test_no_name_leads_inside(internet: Internet, host: str) -> None:
    with pytest.raises(ImageError, match="not on the public internet"):
        pictures(internet).fetch(f"https://{host}/picture")
    assert internet.connected == []


@pytest.mark.parametrize(
    "target",
    ["http://inside.example/", "http://127.0.0.1/", "//both.example/x", "http://[::1]:7860/v1/models"],
)
def test_no_redirect_leads_inside(internet: Internet, target: str) -> None:
    internet.names = {**internet.names, "127.0.0.1": ["127.0.0.1"], "::1": ["::1"]}
    with pytest.raises(ImageError, match="not on the public internet"):
        pictures(internet).fetch(f"http://good.example/to?{target}")
    assert set(internet.connected) == {OTHER, PUBLIC}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "neither http nor https"),
        ("ftp://good.example/a", "neither http nor https"),
        ("gopher://good.example/", "neither http nor https"),
        ("/etc/passwd", "neither http nor https"),
        ("http://", "no picture's address"),
        ("http://good.example:99999/", "no picture's address"),
        ("http://good.example:0/", "no picture's address"),
        ("http://[::1", "no picture's address"),
        (f"http://{'a' * 70}.example/", "no picture's address"),
        ("http://good.example/to?file:///etc/passwd", "neither http nor https"),
        ("http://good.example/to?http://good.example/to?/", "status 404"),
        ("http://good.example/nowhere", "no place"),
        ("http://good.example/hops/3", "more than 3 redirects"),
        ("http://good.example/missing", "status 404"),
        ("http://good.example/squeezed", "compressed"),
        ("http://gone.example/", "no address"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(internet: Internet, url: str, said: str) -> None:
    with pytest.raises(ImageError, match=said) as refused:
        pictures(internet).fetch(url)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("path", "said"), [("/huge", "over 1 MB"), ("/slow", "timed out|in time"), ("/headers", "timed out|in time")]
)
def test_neither_size_nor_time_is_without_bound(internet: Internet, path: str, said: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ImageError, match=said):
        pictures(internet, seconds=0.3, max_bytes=1 << 20).fetch(f"http://good.example{path}")
    assert time.monotonic() - begun < 3


def test_nothing_is_fetched_unless_allowed(internet: Internet) -> None:
    with pytest.raises(SettingError, match="--remote-images"):
        RemotePictures(False, resolve=internet.resolve, network=internet.network).fetch("http://good.example/picture")
    assert internet.asked == []


def test_the_environments_proxy_is_not_used(internet: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert pictures(internet).fetch("http://good.example/picture") == b"a picture"


def test_a_host_without_a_name_server_is_an_error_in_one_line(internet: Internet) -> None:
    def fails(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(UserError, match="not known"):
        pictures(internet, resolve=fails).fetch("http://nowhere.example/")


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "2a00:1450:4001::200e", "64:ff9b::808:808", "172.32.0.1"])
def test_the_internets_own_are_public(text: str) -> None:
    assert is_public(text)

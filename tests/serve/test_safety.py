"""Who may in: hosts, other sites' pages, keys, sessions, bodies."""

from __future__ import annotations

import base64
import logging
import re
import time
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from support.serving import BASE_URL, client_for

from lowmem_bagel.serve import body_limits, keys, login
from lowmem_bagel.serve.options import ServeOptions
from lowmem_bagel.serve.safety import HEADERS, Safety, host_name

KEY = "correct-horse-battery-staple"
BEARER = {"authorization": f"Bearer {KEY}"}
BROWSER = {"accept": "text/html,application/xhtml+xml"}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Says how many bytes came; opens itself to all sites, as some frameworks do."""
    body = await Request(scope, receive).body()
    session = scope.get("state", {}).get("session", "")
    headers = {"access-control-allow-origin": "*", "access-control-allow-credentials": "true", "x-session": session}
    await PlainTextResponse(str(len(body)), headers=headers)(scope, receive, send)


def open_server(**about: Any) -> Any:
    return client_for(Safety(echo, ServeOptions()), **about)


def keyed_server(**about: Any) -> Any:
    return client_for(Safety(echo, ServeOptions(api_key=KEY)), **about)


@pytest.fixture(autouse=True)
def wrong_keys_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "WRONG_SECONDS", 0.0)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7860", "[::1]:99", "LOCALHOST.:7860", "[::1]"])
def test_names_of_this_machine(host: str) -> None:
    assert open_server().get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "evil.example:80@127.0.0.1", "[::2]", "",
     "127.0.0.1:7860:1", "0.0.0.0:7860", "localhost, evil.example", "lo\tcalhost", "[::1", "192.168.1.5"],
)  # fmt: skip
def test_names_that_were_made_to_lead_here(host: str) -> None:
    refused = open_server().post("/v1/images/generations", headers={"host": host})
    assert refused.status_code == 403
    assert "answers to localhost alone" in refused.json()["error"]["message"]


def test_with_a_key_any_name_will_do() -> None:
    assert keyed_server().get("/", headers={"host": "bagel.example", **BEARER}).status_code == 200
    assert keyed_server().get("/", headers={"host": "bagel.example"}).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:7860"},
        {"origin": "http://127.0.0.1:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": BASE_URL},
        {"origin": ""},
    ],
)
def test_pages_of_other_sites_change_nothing(headers: dict[str, str]) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        refused = open_server().request(method, "/v1/images/generations", headers=headers)
        assert refused.status_code == 403
        assert refused.json()["error"]["type"] == "permission_error"
    assert open_server().get("/", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"origin": BASE_URL}, {"sec-fetch-site": "same-origin", "origin": BASE_URL}, {"sec-fetch-site": "none"}],
)
def test_its_own_page_and_programs_may(headers: dict[str, str]) -> None:
    assert open_server().post("/v1/images/generations", headers=headers).status_code == 200


def test_who_brings_the_key_is_no_other_sites_page() -> None:
    assert keyed_server().post("/v1/x", headers={"origin": "https://gui.example", **BEARER}).status_code == 200


def test_no_answer_opens_the_server_to_other_sites() -> None:
    answer = open_server().get("/", headers={"origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": KEY},
        {"authorization": "Bearer "},
        {"authorization": b"Bearer \xff\xfe"},
        {"authorization": "Basic !!!"},
        {"authorization": "Basic " + base64.b64encode(b"user:wrong").decode()},
        {"authorization": f"Digest {KEY}"},
        {"cookie": f"{keys.COOKIE}={KEY}"},
        {"cookie": f"{keys.COOKIE}="},
        {"cookie": "=;;;\x7f"},
        {"x-api-key": KEY},
    ],
)
def test_without_the_key_nobody_is_let_in(headers: dict[str, Any]) -> None:
    refused = keyed_server().post("/v1/images/generations", headers=headers)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert keyed_server().get(f"/v1/models?key={KEY}&api_key={KEY}").status_code == 401


def test_the_key_by_header() -> None:
    assert keyed_server().post("/v1/x", headers=BEARER).status_code == 200
    assert keyed_server().post("/v1/x", headers={"authorization": f"bearer  {KEY} "}).status_code == 200
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    assert keyed_server().post("/sdapi/v1/x", headers={"authorization": f"Basic {basic}"}).status_code == 200


def test_whether_it_lives_is_told_to_all() -> None:
    assert keyed_server().get("/health").status_code == 200
    assert keyed_server().get("/metrics").status_code == 401


def test_a_browser_brings_the_key_once() -> None:
    client = keyed_server(follow_redirects=False)
    form = client.get("/", headers=BROWSER)
    assert form.status_code == 401
    assert 'type="password"' in form.text
    wrong = client.post("/login", data={"key": "wrong"}, headers=BROWSER)
    assert (wrong.status_code, 'role="alert"' in wrong.text) == (401, True)
    assert not client.cookies
    right = client.post("/login", data={"key": KEY}, headers={"origin": BASE_URL})
    assert (right.status_code, right.headers["location"]) == (303, "/")
    said = right.headers["set-cookie"]
    assert re.search(r"HttpOnly.*SameSite=strict", said)
    assert KEY not in said
    page = client.get("/", headers=BROWSER)
    assert page.status_code == 200
    assert page.headers["x-session"]
    assert client.post("/v1/x", headers={"origin": BASE_URL}).status_code == 200
    assert client.post("/v1/x", headers={"origin": "https://evil.example"}).status_code == 403
    assert client.post("/login", data={"key": KEY}, headers={"origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"", ""), (b"\xff=\xfe", "application/x-www-form-urlencoded"), (b"key", "text/plain"), (b"&" * 60_000, ""),
     (b"--x\r\n", "multipart/form-data; boundary=x"), (b"key[]=1&key=2&key=3&key=4&key=5", "")],
)  # fmt: skip
def test_forms_that_are_none(body: bytes, kind: str) -> None:
    assert keyed_server().post("/login", content=body, headers={"content-type": kind}).status_code == 401
    assert keyed_server().post("/login", content=b"x" * 70_000).status_code == 413


def test_sessions_end_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.datastructures import Headers

    known = keys.Keys(KEY)

    def inside(token: str) -> bool:
        return known.session_of(Headers({"cookie": f"a=b; {keys.COOKIE}={token}"})) is not None

    first = known.begin_session()
    assert inside(first)
    tokens = [known.begin_session() for _ in range(keys.MAX_SESSIONS)]
    assert not inside(first)
    assert inside(tokens[0])
    later = keys.time.monotonic() + keys.SESSION_SECONDS + 1
    monkeypatch.setattr(keys.time, "monotonic", lambda: later)
    assert not inside(tokens[-1])


def test_the_key_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "lowmem_bagel"):
        client = keyed_server()
        client.get("/", headers=BEARER)
        client.post("/login", data={"key": KEY})
    assert KEY not in caplog.text
    assert KEY not in repr(keys.Keys(KEY))
    assert KEY not in repr(ServeOptions(api_key=KEY))


@pytest.mark.parametrize(
    ("path", "limit"), [("/v1/images/edits", 64 << 20), ("/gradio_api/queue/join", 4 << 20), ("/x", 65536)]
)
def test_bodies_have_limits(path: str, limit: int) -> None:
    assert body_limits.limit_of(path) == limit


def test_a_body_over_its_limit_is_refused_announced_or_not() -> None:
    def pieces() -> Any:
        yield from [b"x" * 10_000] * 7

    assert open_server().post("/x", content=b"x" * 65536).text == "65536"
    for body in (b"x" * 65537, pieces()):
        refused = open_server().post("/x", content=body)
        assert refused.status_code == 413
        assert "this route takes" in refused.json()["error"]["message"]


def test_all_bodies_together_have_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limits, "IN_FLIGHT", 1000)
    server = open_server()
    begun = time.monotonic()
    refused = server.post("/x", content=b"x" * 1001)
    assert time.monotonic() - begun < body_limits.LAST_SECONDS, "nothing more of its body can come"
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert server.post("/x", content=b"x" * 1000).status_code == 200, "what was refused is not held"


def test_a_body_that_never_ends_arriving(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(body_limits, "BODY_SECONDS", 0.01)
    monkeypatch.setattr(body_limits, "LAST_SECONDS", 0.01)
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(10)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [(b"host", b"localhost")]}
    asyncio.run(Safety(echo, ServeOptions())(scope, receive, send))
    assert sent[0]["status"] == 408


def test_host_names() -> None:
    assert host_name("[::1]:80") == "::1"
    assert host_name("a.b:1") == "a.b"
    assert host_name("a:b:1") == ""


def test_no_websockets() -> None:
    with pytest.raises(WebSocketDisconnect) as refused, open_server().websocket_connect("/x"):
        pass
    assert refused.value.code == 1008

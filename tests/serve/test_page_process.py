"""The command with its page: soon there, beside the API, and no way to the machine's files."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT
from support.serving import ServerProcess, server_process, spawn, until

import lowmem_bagel

SECRET = Path(lowmem_bagel.__file__)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process() as running:
        yield running


def get(server: ServerProcess, target: str, method: str = "GET") -> bytes:
    """The whole answer to a target as it stands: nothing on the way makes it a proper one."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        found = bytearray()
        while piece := client.recv(65536):
            found += piece
    return bytes(found)


def test_a_page_that_says_so_is_there_until_the_page_is() -> None:
    with server_process(ready=False, start=spawn) as server:
        first = server.ask("/")
        assert "text/html" in first.headers["content-type"]
        assert b"lowmem-bagel is starting" in first.body
        until(lambda: server.ask("/").status == 200)
        assert b"gradio" in server.ask("/").body


def test_page_and_api_each_answer_in_their_places(server: ServerProcess) -> None:
    assert server.ask("/").headers["content-type"].startswith("text/html")
    assert server.ask("/v1/images/generations").status == 405
    assert server.ask("/sdapi/v1/txt2img").status == 405
    for path in ("/v1/nothing", "/nothing", "/sdapi/nothing", "/gradio_api/info", "/gradio_api/nothing"):
        missing = server.ask(path)
        assert (missing.status, missing.json["error"]["code"]) == (404, "not_found"), path
    assert server.ask("/health").status == 200
    assert server.ask("/docs").status == 200


TARGETS = [
    "/gradio_api/file={file}", "/gradio_api/file={uploads}/../../../../../../{file}",
    "/gradio_api/file=..%2f..%2f{file}",
    "/gradio_api/file=//{file}", "/gradio_api/file=%00{file}", "/gradio_api/file=file://{file}", "/file={file}",
    "/gradio_api/file/{file}", "/gradio_api/file=~/../..{file}", "/gradio_api/file=/proc/self/cwd/{relative}",
    "/gradio_api/file={relative}", "/gradio_api/file=lowmem_bagel/__init__.py", "/static/../../../../../../../..{file}",
    "/static/..%2f..%2f..%2f..%2f..%2f..%2f..{file}", "/assets/..%2f..%2f..%2f..%2f..{file}", "/svelte/../..{file}",
    "/gradio_api/stream/x/y/..{file}", "/gradio_api/proxy=http://127.0.0.1:{port}/health", "/%2e%2e/%2e%2e{file}",
    "/gradio_api/file=http://127.0.0.1:{port}/health", "/gradio_api//file={file}", "//gradio_api/file={file}",
    "/gradio_api/file=C:\\windows\\win.ini", "/theme.css/../../..{file}", "http://localhost/gradio_api/file={file}",
    "/custom_component/x/y/z/..%2f..{file}", "/gradio_api/component_server", "/gradio_api/vibe-code/",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_no_target_leads_to_a_file_of_the_machine(server: ServerProcess, target: str) -> None:
    where = {"file": SECRET, "uploads": "/tmp/gradio", "relative": SECRET.relative_to(ROOT), "port": server.port}
    answer = get(server, target.format(**where))
    assert int(answer.split()[1]) in (400, 403, 404, 405), answer[:200]
    assert b"BagelPipeline" not in answer
    assert b'"status"' not in answer


def upload(server: ServerProcess, content: bytes, name: str) -> tuple[int, bytes]:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\nContent-Type: image/png\r\n\r\n'
        % name.encode()
    ) + content
    answer = server.ask("/gradio_api/upload", body + b"\r\n--x--\r\n", content_type="multipart/form-data; boundary=x")
    return answer.status, answer.body


@pytest.mark.parametrize("name", ["a.png", "../../../../tmp/escaped.png", "/tmp/escaped.png", "..\\..\\escaped.png"])
def test_uploads_lie_in_their_folder_and_are_given_back(server: ServerProcess, name: str) -> None:
    status, body = upload(server, b"12345", name)
    assert status == 200
    path = body.decode().strip('[]"\n')
    assert Path(path).resolve().is_relative_to(Path("/tmp/gradio").resolve()) or "gradio" in path
    assert not Path("/tmp/escaped.png").exists()
    assert get(server, f"/gradio_api/file={path}").endswith(b"12345")


def test_uploads_are_bounded(server: ServerProcess) -> None:
    assert upload(server, b"x" * (65 << 20), "a.png")[0] == 413


def test_other_sites_cannot_use_the_page(server: ServerProcess) -> None:
    for path in ("/gradio_api/queue/join", "/gradio_api/upload"):
        assert server.ask(path, {}, origin="https://evil.example").status == 403
    answer = server.ask("/", origin="https://evil.example", host="evil.example")
    assert answer.status == 403
    assert "access-control-allow-origin" not in server.ask("/config", origin="https://evil.example").headers


def test_events_name_no_file_and_no_address(server: ServerProcess) -> None:
    for path in (str(SECRET), "http://127.0.0.1:1/x.png", "/tmp/gradio/../../etc/passwd"):
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        for index in range(8):
            event = {"data": data, "fn_index": index, "session_hash": "abc", "event_data": None}
            assert server.ask("/gradio_api/queue/join", event).status in (400, 403)
        assert server.ask("/gradio_api/run/predict", {"data": data, "fn_index": 0}).status in (403, 404)


def test_with_a_key_the_page_is_behind_it_too() -> None:
    key = "correct-horse-battery-staple"
    with server_process("--no-page", key=key, ready=False) as server:
        while server.ask("/health").json["status"] != "ready":
            time.sleep(0.05)
        for path in ("/v1/models", "/docs", "/openapi.json", "/metrics", "/sdapi/v1/options"):
            assert server.ask(path).status == 401
            assert server.ask(path, authorization=f"Bearer {key}").status == 200
        server.signal()
        assert server.ended(20) == 0
    assert not [line for line in server.err if key in line]


def test_an_open_page_is_no_reason_to_stay() -> None:
    """A page holds a stream open as long as it is shown, which ends with the server."""
    with server_process() as server, socket.create_connection(("127.0.0.1", server.port), timeout=30) as page:
        page.sendall(b"GET /gradio_api/heartbeat/abc HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in page.recv(65536)
        server.signal()
        said = b""
        while piece := page.recv(65536):
            said += piece
        assert said.endswith(b"0\r\n\r\n"), "it was broken off"
        assert server.ended(20) == 0
    assert not [line for line in server.err if "Traceback" in line], server.err

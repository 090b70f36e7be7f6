"""Of Gradio only what the page uses can be reached, and no file but uploaded ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from support.serving import BASE_URL, running_service, service_of

from lowmem_bagel.serve.app import create_app
from lowmem_bagel.serve.page import mount_page
from lowmem_bagel.serve.page.guard import allowed, files_in


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with running_service() as service, TestClient(create_app(service), base_url=BASE_URL) as made:
        yield made


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/favicon.ico", "/gradio_api/app_id"])
def test_what_the_page_needs_is_there(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200


def test_the_page_names_no_other_server(client: TestClient) -> None:
    import re

    said = client.get("/").text
    fetched = re.findall(r"""(?:src|href)=["']?(https?://[^"' >]+)""", said)
    assert [address for address in fetched if not address.startswith(BASE_URL)] == []


def test_our_script_runs_before_the_pages_own(client: TestClient) -> None:
    page = client.get("/")
    assert page.text.index("window.requestAnimationFrame = ") < page.text.index('<script type="module"')
    assert len(client.get("/", headers={"accept-encoding": "identity"}).content) == len(page.content)
    assert client.head("/").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=http://127.0.0.1:1/secret"),
        ("GET", "/gradio_api/file=https://example.com/picture.png"),
        ("GET", "/gradio_api/file=FILE:///etc/passwd"),
        ("GET", "/gradio_api/proxy=https://example.com/"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/deep_link"),
        ("POST", "/gradio_api/call/run"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/api/predict"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/component_server"),
        ("PUT", "/"),
        ("GET", "/nothing"),
    ],
)
def test_what_it_does_not_need_is_not(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 404
    assert "message" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", str(Path(__file__))])
def test_files_of_the_machine_are_not_served(client: TestClient, path: str) -> None:
    assert client.get(f"/gradio_api/file={path}").status_code == 403


FOREIGN = [
    "/etc/passwd",
    "http://127.0.0.1:1/x.png",
    "https://example.com/x.png",
    "../../etc/passwd",
    "UPLOADS/../elsewhere.png",
    "UPLOADS",
    tempfile.gettempdir() + "/x.png",
    "x\0y",
    7,
]


@pytest.mark.parametrize("path", FOREIGN)
def test_an_event_may_name_uploaded_files_alone(client: TestClient, path: Any) -> None:
    from gradio.utils import get_upload_folder

    if isinstance(path, str):
        path = path.replace("UPLOADS", get_upload_folder())
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for data in ([file], [[{"image": file}]], {"deep": [file]}):
        answer = client.post("/gradio_api/queue/join", json={"data": data, "fn_index": 0, "session_hash": "x"})
        assert answer.status_code == 403
        assert "uploaded" in answer.json()["error"]["message"]


def test_an_event_is_bounded_and_json(client: TestClient) -> None:
    join = "/gradio_api/queue/join"
    assert client.post(join, content=b"{").status_code == 400
    assert client.post(join, content=b"[" * 100_000).status_code == 400
    assert client.post(join, json={"data": ["x" * (2 << 20)]}).status_code == 413


def test_sessions_are_bounded() -> None:
    from lowmem_bagel.serve.page.layout import SESSIONS

    app = FastAPI()
    mount_page(app, service_of())
    page = app.routes[-1].app.app  # type: ignore[attr-defined]
    assert page.state_holder.capacity == SESSIONS


def test_the_lists_match_whole_paths() -> None:
    assert allowed("GET", "/gradio_api/file=/tmp/gradio/abc/picture.png")
    assert not allowed("GET", "/gradio_api/queue/data/../../x")
    assert not allowed("POST", "/")
    assert not allowed("DELETE", "/gradio_api/reset")
    assert list(files_in({"a": [{"path": "x", "b": {"path": "y"}}], "path": None})) == ["x", "y"]

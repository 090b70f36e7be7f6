"""Whatever is sent to whichever route: an answer in the one shape that says what is wrong, and never a fault."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from support.serving import PROMPT, client_for, running_service

from lowmem_bagel.sampling.denoise import PictureSampler
from lowmem_bagel.serve.app import create_app
from lowmem_bagel.serve.failures import Failure

HUGE = 10**400
JSON = [
    b"", b"null", b"[]", b"1", b'"x"', b"{", b"\xff\xfe\x00", b'{"prompt": }', b"[" * 50_000, b'{"a":' * 50_000,
    b'{"prompt": NaN}', b'{"prompt": ' + b"9" * 6000 + b"}", b'{"prompt": "\\ud800"}', b'{"prompt": "\x00"}',
]  # fmt: skip
WRONG: list[Any] = [
    None,
    "many",
    "",
    -1,
    0,
    1.5,
    HUGE,
    -HUGE,
    1e308,
    [],
    {},
    [1, 2, 3],
    True,
    "1e999",
    {"a": 1},
    "\x00",
]
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "-0.0", "9" * 400]
AS_JSON = {"content-type": "application/json"}
FIELDS = {
    "/v1/images/generations": (
        {"prompt": PROMPT, "num_timesteps": 2, "size": "32x32"},
        ("prompt", "size", "n", "num_timesteps", "seed", "cfg_text_scale", "cfg_interval", "response_format", "stream",
         "partial_images", "step_cache", "output_format"),
    ),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
        ("messages", "max_tokens", "temperature", "top_p", "stop", "n", "stream", "seed"),
    ),
    "/sdapi/v1/txt2img": (
        {"prompt": PROMPT, "steps": 2, "width": 32, "height": 32},
        ("prompt", "steps", "width", "height", "seed", "cfg_scale", "batch_size", "n_iter"),
    ),
}  # fmt: skip
"""Of a route: a request that is done, and fields of it that are spoiled one by one."""


FEW = 3
"""Timesteps of a picture whose request leaves them to the defaults: it is drawn, and its looks are no matter here."""


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    run = PictureSampler.run

    def few(sampler: PictureSampler, noise: Any, count: int, *given: Any) -> Any:
        return run(sampler, noise, min(count, FEW), *given)

    with running_service(page=False) as service, pytest.MonkeyPatch.context() as patch:
        patch.setattr(PictureSampler, "run", few)
        yield client_for(create_app(service))


def told(answer: Any) -> bool:
    """Whether it was refused as it should be; what was done all the same is no matter here."""
    assert answer.status_code < 500, answer.text[:500]
    if answer.status_code < 400:
        return False
    error = Failure.model_validate(answer.json()).error
    assert error.message.isprintable() and 5 < len(error.message) < 3000, error
    assert "Traceback" not in error.message and "/lowmem_bagel/" not in error.message
    return True


def test_no_route_takes_what_is_no_json(client: Any) -> None:
    paths = [path for path, about in client.app.openapi()["paths"].items() if "post" in about]
    assert len(paths) >= 5
    for path in paths:
        wants_body = "requestBody" in client.app.openapi()["paths"][path]["post"]
        for body in JSON:
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            assert told(answer) or not wants_body, (path, body[:50])


@pytest.mark.parametrize("path", FIELDS)
def test_a_field_that_is_wrong_is_refused_or_harmless(client: Any, path: str) -> None:
    request, names = FIELDS[path]
    assert client.post(path, json=request).status_code == 200
    refused = 0
    for name in names:
        for value in WRONG:
            refused += told(client.post(path, content=json.dumps({**request, name: value}).encode(), headers=AS_JSON))
        for number in NUMBERS:
            marked = json.dumps({**request, name: "MARK"}).replace('"MARK"', number)
            refused += told(client.post(path, content=marked.encode(), headers=AS_JSON))
    assert refused > len(names) * len(WRONG) / 2


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    return file.getvalue()


def part(name: str, content: bytes, about: str = "") -> bytes:
    return b"--x\r\nContent-Disposition: form-data; name=%s%s\r\n\r\n%s\r\n" % (name.encode(), about.encode(), content)


WHOLE = part("image", png(), '; filename="a.png"') + part("prompt", b"make it blue") + part("num_timesteps", b"2")
END = b"--x--\r\n"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"--x", b"--x--\r\n", b"--y\r\n\r\n--y--\r\n", WHOLE[:60], WHOLE[:-1], b"\r\n" * 5000 + WHOLE + END,
        part("image", b"no picture", '; filename="a.png"') + part("prompt", b"x") + END,
        part("image", png()[:60], '; filename="a.png"') + part("prompt", b"x") + END,
        part("image", png(), '; filename="../../etc/passwd"') + END,
        part("image", b"/etc/passwd") + part("prompt", b"x") + END,
        part("image", b"file:///etc/passwd") + part("prompt", b"x") + END,
        part("prompt", b"x" * 30_000) + part("image", png(), '; filename="a.png"') + END,
        WHOLE + part("n", b"NaN") + END, WHOLE + part("n", b"1e400") + END, WHOLE + part("size", b"9" * 500) + END,
        WHOLE + part("seed", b"\xff\xfe") + END, b"".join(part(f"f{i}", b"") for i in range(2000)) + END,
        b"".join(part("image", png(), '; filename="a.png"') for _ in range(50)) + part("prompt", b"x") + END,
        b"--x\r\nContent-Disposition: attachment\r\n\r\nx\r\n" + END, b"--x\r\n: \r\n\r\n" + END,
        b"--x\r\n" + b"A: b\r\n" * 5000 + b"\r\n\r\n" + END,
    ],
)  # fmt: skip
def test_forms_that_are_damaged(client: Any, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/v1/images/edits", content=body, headers=headers)
    assert told(answer) or answer.json()["data"], body[:80]


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 5000,
        "text/plain",
        "",
        "application/x-www-form-urlencoded",
    ],
)
def test_forms_of_another_kind(client: Any, kind: str) -> None:
    assert told(client.post("/v1/images/edits", content=WHOLE + END, headers={"content-type": kind}))


def bomb() -> bytes:
    """A PNG of 60,000 by 60,000 pixels, in some kilobytes."""
    whole = png()
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return whole[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
        "https://example.com/a.png",
        "gopher://x",
        "\x00",
        "data:",
        "data:text/html,<b>",
        "data:image/svg+xml,<svg/>",
        "data:image/png;base64,",
        "data:image/png;base64,!!!!",
        "data:image/png;base64," + base64.b64encode(bomb()).decode(),
        "data:image/png;base64," + base64.b64encode(png()[:50]).decode(),
    ],
)
def test_pictures_that_are_none(client: Any, url: str) -> None:
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    assert told(client.post("/v1/chat/completions", json=request))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../../etc/passwd",
        "/v1/%2e%2e/%2e%2e/etc/passwd",
        "/file=/etc/passwd",
        "/%00",
        "/v1/models/..%2f..%2fx",
        "//etc/passwd",
        "/sdapi/v1/nothing",
        "/docs/../x",
    ],
)
def test_no_path_leads_to_a_file(client: Any, path: str) -> None:
    answer = client.get(path)
    assert told(answer)
    assert b"root:" not in answer.content


def test_methods_that_are_none(client: Any) -> None:
    for method in ("TRACE", "PROPFIND", "DELETE", "X"):
        assert told(client.request(method, "/v1/images/generations"))

"""Bodies: whatever bytes come, a 4xx that says what is wrong, and never a fault of ours."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.encoders import jsonable_encoder
from PIL import Image
from support.api import instant
from support.serving import BASE_URL, running_service

from lowmem_bagel.serve.app import create_app
from lowmem_bagel.serve.openai_schemas import PictureData, PicturesAnswer, PictureTokens, PictureUsage
from lowmem_bagel.serve.payloads import answered_with

JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=b"}


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    with running_service(page=False) as service:
        instant(service)
        yield create_app(service)


def post(app: Any, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE_URL) as client:
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(ask())


def refused(answer: httpx.Response) -> str:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    message: str = error["message"]
    assert 5 < len(message) < 3000 and message.isprintable()
    return message


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/chat/completions", "/sdapi/v1/txt2img"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"1", b'"text"', b"\xff\xfe", b"\x00", b'{"prompt": "\\ud800"}', b"[" * 100_000,
        b'{"a":' * 50_000, b'{"prompt": NaN}', b'{"prompt": "a", "prompt": "b"}', b'{"prompt": 1e999}',
        b'{"n": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "seed": -Infinity}', b'{"prompt": {"$ref": "#"}}',
        b'{"prompt": "a", "n": 1e400}', b"a=b",
    ],
)  # fmt: skip
def test_what_is_no_json_of_a_request_is_refused(app: Any, path: str, body: bytes) -> None:
    refused(post(app, path, body, JSON))


def test_the_kind_of_body_must_be_said(app: Any) -> None:
    """A page of another site can send plain text without asking, and JSON not."""
    refused(post(app, "/v1/images/generations", b'{"prompt": "a"}', {"content-type": "text/plain"}))


def part(name: str, content: bytes, file: bool = False) -> bytes:
    named = b'; filename="a.png"' if file else b""
    return b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name.encode(), named, content)


END = b"--b--\r\n"
_FILE = io.BytesIO()
Image.new("RGB", (2, 2)).save(_FILE, "PNG")
URL = f"data:image/png;base64,{base64.b64encode(_FILE.getvalue()).decode()}"
PROMPT = part("prompt", b"blue")


@pytest.mark.parametrize(
    ("body", "headers", "said"),
    [
        (b"", FORM, "prompt"),
        (END, FORM, "prompt"),
        (PROMPT + END, FORM, "no picture to change"),
        (PROMPT + part("image", b"x", file=True) + END, FORM, "not a picture"),
        (PROMPT + part("image", b"", file=True) + END, FORM, "picture"),
        (PROMPT + part("image", b"file:///etc/passwd") + END, FORM, "is no picture"),
        (PROMPT + part("image", b"http://localhost/") + END, FORM, "--remote-images"),
        (PROMPT + part("prompt2", b"x") + END, FORM, "prompt2"),
        (PROMPT + part("seed", b"x", file=True) + END, FORM, "no field for a file"),
        (PROMPT + part("seed", b"1e999") + END, FORM, "seed"),
        (PROMPT + part("seed", b"NaN") + END, FORM, "seed"),
        (PROMPT + part("cfg_text_scale", b"nan") + END, FORM, "cfg_text_scale"),
        (PROMPT + part("n[]", b"1") + END, FORM, "n: "),
        (part("prompt[]", b"1") + END, FORM, "prompt"),
        (PROMPT + part("n", b"1") * 101 + END, FORM, "fields"),
        (part("prompt", b"x" * 2_000_000) + END, FORM, "exceeded"),
        (PROMPT + part("image[]", b"x", file=True) * 40 + END, FORM, "files"),
        (b"--b\r\nno head at all", FORM, ""),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", FORM, "name"),
        (b"\x00" * 100, FORM, ""),
        (PROMPT, {"content-type": "multipart/form-data"}, "boundary"),
        (b"prompt=blue", {"content-type": "application/x-www-form-urlencoded"}, "no picture to change"),
        (b'{"prompt": "a"}', JSON, "prompt"),
    ],
)
def test_what_is_no_form_of_an_edit_is_refused(app: Any, body: bytes, headers: dict[str, str], said: str) -> None:
    assert said in refused(post(app, "/v1/images/edits", body, headers))


def test_a_bomb_is_refused_by_its_header(app: Any) -> None:
    """Ten billion pixels in a hundred bytes."""
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"0" * 10_000)), (b"IEND", b"")]
    written = [struct.pack(">I", len(of)) + kind + of + struct.pack(">I", zlib.crc32(kind + of)) for kind, of in chunks]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(written)
    url = f"data:image/png;base64,{base64.b64encode(bomb).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    assert "100000x100000 pixels: too large" in refused(post(app, "/v1/chat/completions", body, JSON))
    body = json.dumps({"prompt": "blue", "init_images": [url]}).encode()
    assert "too large" in refused(post(app, "/sdapi/v1/img2img", body, JSON))


def test_the_documents_examples_can_be_sent(app: Any) -> None:
    schemas = app.openapi()["components"]["schemas"]
    for path, name in (
        ("/v1/images/generations", "ImageRequest"),
        ("/v1/chat/completions", "ChatRequest"),
        ("/sdapi/v1/txt2img", "Txt2ImgRequest"),
        ("/sdapi/v1/img2img", "Img2ImgRequest"),
    ):
        (example,) = schemas[name]["examples"]
        assert post(app, path, json.dumps(example).encode(), JSON).status_code == 200, name


def test_a_form_reads_numbers_flags_and_lists_as_clients_write_them(app: Any) -> None:
    fields = {"seed": b"5", "think": b"False", "cfg_interval": b"[0.2, 0.9]", "n": b"1", "size": b"", "stream": b""}
    body = PROMPT + b"".join(part(name, value) for name, value in fields.items() if value)
    answer = post(app, "/v1/images/edits", body + part("image", URL.encode()) + END, FORM)
    used = answer.json()["data"][0]["settings"]
    assert (used["seed"], used["think"], used["cfg_interval"], used["prompt"]) == (5, False, [0.2, 0.9], "blue")
    listed = part("cfg_interval[]", b"0.3") + part("cfg_interval[]", b"0.8")
    answer = post(app, "/v1/images/edits", PROMPT + listed + part("image[0]", URL.encode()) + END, FORM)
    assert answer.json()["data"][0]["settings"]["cfg_interval"] == [0.3, 0.8]


def test_a_prompt_that_looks_like_a_number_is_a_text(app: Any) -> None:
    picture = part("image", URL.encode())
    answer = post(app, "/v1/images/edits", part("prompt", b"42") + picture + END, FORM)
    assert answer.json()["data"][0]["settings"]["prompt"] == "42"


def test_large_json_is_parsed_and_pictures_of_some_megabytes_are_taken(app: Any) -> None:
    content = [{"type": "image_url", "image_url": {"url": URL + " " * (20 << 20)}}, {"type": "text", "text": "what?"}]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    assert post(app, "/v1/chat/completions", body, JSON).json()["choices"][0]["message"]["content"] == "an answer"


def test_an_answer_is_what_the_framework_would_write() -> None:
    """Every field, with those that are null, in UTF-8."""
    tokens = PictureTokens(image_tokens=1, text_tokens=2)
    usage = PictureUsage(
        input_tokens=3, input_tokens_details=tokens, output_tokens=1, output_tokens_details=tokens, total_tokens=4
    )
    data = [
        PictureData(b64_json="aGk=", settings={"seed": 1, "cfg_interval": [0.4, 1.0], "prompt": "\u7ea2\n\U0001f534"})
    ]
    answer = PicturesAnswer(created=1, output_format="png", size="16x16", data=data, usage=usage)
    written = answered_with(answer)
    assert written.media_type == "application/json"
    assert json.loads(bytes(written.body)) == jsonable_encoder(answer)
    assert "\u7ea2".encode() in bytes(written.body)

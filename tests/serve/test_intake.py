"""Requests on their way in: pictures by address, all or nothing, and what each counts as."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from starlette.requests import Request
from support.internet import Internet
from support.raw_server import RawServer, reply
from support.serving import LONG, PROMPT, QUICK, running_service, until

from lowmem_bagel.errors import BusyError, ImageError, SettingError, UnavailableError
from lowmem_bagel.pictures.opening import Picture, open_picture
from lowmem_bagel.serve.intake import Intake, Link
from lowmem_bagel.serve.remote_pictures import RemotePictures
from lowmem_bagel.serve.service import MAX_PROMPT, Service
from lowmem_bagel.serve.usage import tokens_of

PUBLIC = "93.184.216.34"
REQUEST = Request({"type": "http", "client": ("127.0.0.1", 1), "headers": []})


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(page=False, queue=2) as made:
        yield made


@pytest.fixture(scope="module")
def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def intake(service: Service, png: bytes) -> Iterator[Intake]:
    """An intake of a server that fetches, from an internet with one picture and one page."""
    with RawServer(lambda head: [reply(png if b" /picture" in head else b"<html>")]) as site:
        names = {"good.example": [PUBLIC], "inside.example": ["192.168.0.1"]}
        internet = Internet(names, {PUBLIC: int(site.place.partition(":")[2])})
        yield Intake(service, RemotePictures(True, resolve=internet.resolve, network=internet.network))


def submit(intake: Intake, *terms: Any, settings: Any = (QUICK,)) -> Any:
    return asyncio.run(intake.submit(REQUEST, terms, "image", settings))


def test_a_picture_by_address_is_the_same_as_its_bytes(intake: Intake, png: bytes) -> None:
    jobs = [
        submit(intake, picture, PROMPT)[0]
        for picture in (Link("http://good.example/picture"), Link("HTTP://good.example/picture"), png)
    ]
    results = []
    for job in jobs:
        while not job.wait(job.progress.version, 30).over:
            pass
        results.append(job.progress.result.image.tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (Link("http://good.example/page"), "a web page"),
        (Link("http://inside.example/picture"), "not on the public internet"),
        (Link("file:///etc/passwd"), "is no picture"),
        (Link("/etc/passwd"), "is no picture"),
        (Link("data:image/png;base64,AA"), "not a picture"),
        (b"", "picture"),
    ],
)
def test_what_is_no_picture_never_waits(intake: Intake, service: Service, term: Any, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        submit(intake, term, PROMPT)
    assert service.queue.order() == []


def test_bounds_hold_before_anything_is_opened_or_fetched(intake: Intake) -> None:
    with pytest.raises(SettingError, match="9 pictures"):
        submit(intake, *[Link("http://nowhere.example/")] * 9)
    with pytest.raises(SettingError, match="characters"):
        submit(intake, "data:" + "x" * MAX_PROMPT)
    with pytest.raises(SettingError, match="picture stands where a text"):
        submit(intake, "DATA:image/png;base64,AAAA")


def test_all_of_a_requests_pictures_wait_or_none(intake: Intake, service: Service) -> None:
    running = service.submit([PROMPT], "image", LONG, "other")
    until(lambda: running.progress.state == "running")
    with pytest.raises(BusyError):
        submit(intake, PROMPT, settings=[QUICK] * 3)
    assert service.queue.order() == []
    with pytest.raises(SettingError, match="num_timesteps"):
        submit(intake, PROMPT, settings=[QUICK, {"num_timesteps": 1}])
    assert service.queue.order() == []
    service.cancel(running)


def test_a_text_waits_for_nobodys_picture(intake: Intake, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, go_on = threading.Event(), threading.Event()

    def slow(content: Any) -> Picture:
        opening.set()
        assert go_on.wait(10)
        return open_picture(content)

    monkeypatch.setattr("lowmem_bagel.serve.intake.open_picture", slow)

    async def both() -> list[Any]:
        picture = asyncio.create_task(intake.submit(REQUEST, [png, PROMPT], "image", [QUICK]))
        await asyncio.to_thread(opening.wait, 10)
        text = await intake.submit(REQUEST, [PROMPT], "image", [QUICK])
        assert not picture.done()
        go_on.set()
        return text + await picture

    for job in asyncio.run(both()):
        while not job.wait(job.progress.version, 30).over:
            pass
        assert job.progress.state == "done"


def test_nothing_is_opened_while_the_model_loads(png: bytes) -> None:
    from support.serving import service_of

    with pytest.raises(UnavailableError, match="loading"):
        submit(Intake(service_of()), b"no picture", PROMPT)


def test_tokens_are_those_that_the_model_sees(service: Service, png: bytes) -> None:
    assert service.loaded is not None
    pipeline = service.loaded.pipeline
    model = pipeline.model
    text = len(model.tokenizer.text_block(PROMPT))
    asked = tokens_of(service.loaded, pipeline.prepare([png, PROMPT], output="text"))
    drawn = tokens_of(service.loaded, pipeline.prepare([png, PROMPT], output="image"))
    config = model.folder.config
    width, height = config.vae_resize.resized(64, 32)
    seen = config.vit_resize.resized(width, height)
    patches = (seen[0] // config.vit.patch_size) * (seen[1] // config.vit.patch_size) + 2
    latents = (width // config.token_pixels) * (height // config.token_pixels) + 2
    assert asked == (text, patches)
    assert drawn == (text, patches + latents)

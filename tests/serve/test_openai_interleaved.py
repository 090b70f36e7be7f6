"""Chats that are answered in texts and pictures, by the official client against a real server."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from support.api import listening
from support.drawn_answers import WORDS, answers_with_pictures
from support.later import Later
from support.serving import running_service, until

from lowmem_bagel.pictures.saving import read_metadata
from lowmem_bagel.serve.service import Service

openai: Any = Later("openai")

BOTH: Any = ["text", "image"]
SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_timesteps": 4, "max_rounds": 2, "seed": 3}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(page=False, queue=4) as made:
        yield made


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(service) as url:
        yield url


@pytest.fixture
def client(url: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    assert service.loaded is not None
    answers_with_pictures(monkeypatch, service.loaded.pipeline.model.tokenizer)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none is needed", max_retries=0) as made:
        yield made


def asked(client: Any, content: Any = "draw it", **more: Any) -> Any:
    settings = SMALL | more.pop("settings", {})
    messages: Any = [{"role": "user", "content": content}, *more.pop("after", [])]
    return client.chat.completions.create(
        model="any",
        messages=messages,
        modalities=more.pop("modalities", BOTH),
        max_tokens=40,
        extra_body=settings,
        **more,
    )


def opened(url: str) -> bytes:
    return base64.b64decode(url.removeprefix("data:image/png;base64,"))


def test_texts_and_pictures_come_in_their_order_and_can_be_said_again(client: Any, service: Service) -> None:
    answer = asked(client)
    message = answer.choices[0].message
    assert message.content == "\n".join(WORDS) and answer.choices[0].finish_reason == "stop"
    assert [part["type"] for part in message.parts] == ["text", "image_url", "text"]
    assert message.images == [message.parts[1]]
    file = opened(message.images[0]["image_url"]["url"])
    assert Image.open(io.BytesIO(file)).size == (32, 32) and read_metadata(file)["seed"] == 4
    assert answer.settings["max_rounds"] == 2 and answer.settings["seed"] == 3
    assert service.loaded is not None
    tokenizer = service.loaded.pipeline.model.tokenizer
    words = sum(len(tokenizer.encode(text)) for text in WORDS)
    assert answer.usage.completion_tokens == words and answer.usage.total_tokens > words
    before = answer.usage.prompt_tokens
    again = [{"role": "assistant", "content": message.parts}, {"role": "user", "content": "and now?"}]
    assert asked(client, after=again).usage.prompt_tokens > before + words


def test_pieces_are_the_whole(client: Any) -> None:
    chunks = list(asked(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "\n".join(WORDS)
    pictures = [number for number, delta in enumerate(deltas) if getattr(delta, "images", None)]
    said = ["".join(delta.content or "" for delta in part) for part in (deltas[: pictures[0]], deltas[pictures[0] :])]
    assert said == [WORDS[0], f"\n{WORDS[1]}"]
    assert Image.open(io.BytesIO(opened(deltas[pictures[0]].images[0]["image_url"]["url"]))).size == (32, 32)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.parametrize(("given", "ended"), [({"max_rounds": 0}, "length"), ({"max_new_tokens": 3}, "length")])
def test_an_answer_that_would_have_gone_on_says_so(client: Any, given: dict[str, Any], ended: str) -> None:
    answer = asked(client, settings=given)
    assert answer.choices[0].finish_reason == ended and answer.choices[0].message.images == []


@pytest.mark.parametrize(("given", "wrong"), [
    ({"stop": ["x"]}, "stop is for answers in text alone"), ({"modalities": ["image"]}, "modalities must be"),
    ({"modalities": ["text", "audio"]}, "modalities must be"), ({"settings": {"style": "cubist"}}, "style"),
    ({"settings": {"num_timesteps": 1}}, "num_timesteps"),
])  # fmt: skip
def test_what_cannot_be_had_is_refused(client: Any, given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(openai.BadRequestError, match=wrong):
        asked(client, **given)


def test_text_alone_stays_as_it_was(client: Any) -> None:
    message = asked(client, modalities=["text"]).choices[0].message
    assert not hasattr(message, "images") and not hasattr(message, "parts")


def test_a_client_that_hangs_up_takes_its_answer_along(client: Any, service: Service) -> None:
    stream = asked(client, stream=True, settings={"num_timesteps": 5000})
    next(iter(stream))
    until(lambda: service.worker.running is not None)
    stream.close()
    until(lambda: service.worker.running is None, 20)

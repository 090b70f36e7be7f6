"""The official client, unchanged, against a real server on the demo checkpoint."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.api import listening
from support.later import Later
from support.serving import LONG, PROMPT, QUICK, running_service, service_of, until

from lowmem_bagel.pictures.saving import read_metadata
from lowmem_bagel.serve.service import Service

openai: Any = Later("openai")

QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(page=False, queue=4) as made:
        yield made


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    """One for all: each reads the certificates that it would trust."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none is needed", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def opened(encoded: str | None) -> Image.Image:
    assert encoded is not None
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    image.load()
    return image


def asked(*content: Any) -> Any:
    return [{"role": "user", "content": list(content)}]


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def idle(service: Service) -> bool:
    return service.worker.running is None and not service.queue.order()


def test_pictures_are_drawn_each_with_its_seed_and_settings(client: Any, service: Service, tmp_path: Path) -> None:
    answer = client.images.generate(prompt=PROMPT, n=2, extra_body={**QUICK, "timestep_shift": 2.5})
    assert answer.data is not None and answer.usage is not None
    assert [one.settings["seed"] for one in answer.data] == [1, 2]  # type: ignore[attr-defined]
    assert opened(answer.data[0].b64_json).tobytes() != opened(answer.data[1].b64_json).tobytes()
    assert answer.size == "32x32"
    assert answer.usage.output_tokens == 2 * 4
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert service.loaded is not None
    wanted = service.loaded.pipeline.generate(PROMPT, **QUICK, timestep_shift=2.5)
    assert wanted.image is not None
    assert opened(answer.data[0].b64_json).tobytes() == wanted.image.tobytes()
    (tmp_path / "a.png").write_bytes(base64.b64decode(answer.data[1].b64_json or ""))
    assert read_metadata(tmp_path / "a.png") == answer.data[1].settings  # type: ignore[attr-defined]
    assert read_metadata(tmp_path / "a.png")["timestep_shift"] == 2.5


def test_frames_are_pictures_of_one_answer(client: Any, service: Service) -> None:
    answer = client.images.generate(prompt=PROMPT, extra_body={**QUICK, "frames": 3, "frame_delta": 2})
    assert answer.data is not None and service.loaded is not None
    wanted = service.loaded.pipeline.generate(PROMPT, **QUICK, frames=3, frame_delta=2).images
    assert [opened(one.b64_json).tobytes() for one in answer.data] == [image.tobytes() for image in wanted]
    events = list(client.images.generate(prompt=PROMPT, stream=True, extra_body={**QUICK, "frames": 2}))
    assert [event.type for event in events] == ["image_generation.completed"] * 2


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_come_in_each_format_and_size(client: Any, kind: Any) -> None:
    answer = client.images.generate(
        prompt=PROMPT, size="48x32", output_format=kind, quality="high", user="me", extra_body={"num_timesteps": 2}
    )
    assert answer.data is not None
    image = opened(answer.data[0].b64_json)
    assert (image.format, image.size, answer.output_format) == (kind.upper(), (48, 32), kind)


def test_a_picture_is_changed_and_keeps_its_shape(client: Any, png: bytes, service: Service) -> None:
    settings: dict[str, Any] = {"num_timesteps": 2, "seed": 3, "cfg_interval": [0.1, 0.9]}
    answer = client.images.edit(image=png, prompt="make it blue", extra_body=settings)
    assert answer.data is not None and service.loaded is not None
    wanted = service.loaded.pipeline.edit(png, "make it blue", **settings)
    assert wanted.image is not None
    assert opened(answer.data[0].b64_json).tobytes() == wanted.image.tobytes()
    used = answer.data[0].settings  # type: ignore[attr-defined]
    assert used["cfg_interval"] == [0.1, 0.9] and used["cfg_renorm_type"] == "text_channel"


def test_several_pictures_are_one_edits(client: Any, png: bytes) -> None:
    steps = {"num_timesteps": 2}
    one = client.images.edit(image=[png], prompt="join them", size="32x32", extra_body=steps)
    two = client.images.edit(image=[("a.png", png), ("b", png)], prompt="join them", size="auto", extra_body=steps)
    assert one.usage is not None and two.usage is not None
    assert two.usage.input_tokens_details.image_tokens == 2 * one.usage.input_tokens_details.image_tokens


def test_a_picture_is_streamed_as_it_forms(client: Any) -> None:
    extra = {**QUICK, "num_timesteps": 60}
    events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=extra))
    assert 1 <= len(events[:-1]) <= 2
    assert [event.type for event in events[:-1]] == ["image_generation.partial_image"] * (len(events) - 1)
    last = events[-1]
    assert last.type == "image_generation.completed"
    assert opened(last.b64_json).size == (32, 32) and last.size == "32x32"
    assert last.usage.output_tokens == 4
    for place, event in enumerate(events[:-1]):
        assert event.type == "image_generation.partial_image" and event.partial_image_index == place
        opened(event.b64_json)


def test_an_edit_is_streamed(client: Any, png: bytes) -> None:
    events = list(client.images.edit(image=png, prompt="blue", stream=True, n=2, extra_body=QUICK))
    assert [event.type for event in events] == ["image_edit.completed"] * 2


def test_a_picture_is_asked_about(client: Any, service: Service, data_url: str, png: bytes) -> None:
    messages = asked(picture(data_url), text(QUESTION))
    answer = client.chat.completions.create(model="any", messages=messages)
    assert service.loaded is not None
    wanted = service.loaded.pipeline.ask(QUESTION, png)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (wanted.text, "stop")
    assert answer.usage is not None and answer.usage.completion_tokens == len(wanted.token_ids) - 1
    pieces = list(
        client.chat.completions.create(
            model="any", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    said = [piece.choices[0] for piece in pieces if piece.choices]
    assert said[0].delta.role == "assistant"
    assert "".join(one.delta.content or "" for one in said) == wanted.text
    assert [one.finish_reason for one in said if one.finish_reason] == ["stop"]
    assert pieces[-1].usage == answer.usage


def test_turns_are_blocks_in_their_order(client: Any, service: Service, data_url: str, png: bytes) -> None:
    messages: Any = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [picture(data_url), text("look")]},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": QUESTION},
    ]
    answer = client.chat.completions.create(model="any", messages=messages)
    assert service.loaded is not None
    wanted = service.loaded.pipeline.run(["be short", png, "look", "a circle", QUESTION], output="text")
    assert answer.choices[0].message.content == wanted.text


def test_an_answer_has_its_length_its_seed_and_its_end(client: Any, service: Service) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="any", messages=asked(text(PROMPT)), **more)

    drawn = {"temperature": 50.0, "max_completion_tokens": 12, "seed": 5}
    one, other = ask(**drawn), ask(**drawn)
    assert one.choices[0].message.content == other.choices[0].message.content
    assert one.settings["do_sample"] and one.settings["temperature"] == 50.0
    assert one.choices[0].finish_reason == "length" and one.usage.completion_tokens == 12
    whole = one.choices[0].message.content
    stop = whole[4:6]
    cut = ask(**drawn, stop=[stop, "never said"])
    assert cut.choices[0].message.content == whole.split(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    streamed = "".join(piece.choices[0].delta.content or "" for piece in ask(**drawn, stop=stop, stream=True))
    assert streamed == whole.split(stop)[0]
    greedy = ask(temperature=0, top_p=0.5, max_tokens=5)
    assert not greedy.settings["do_sample"]
    until(lambda: idle(service))


def test_the_model_has_a_name(client: Any, service: Service) -> None:
    assert [model.id for model in client.models.list()] == [service.name]
    assert client.models.retrieve(service.name).id == service.name
    with pytest.raises(openai.NotFoundError, match=f"the one served is {service.name}"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"n": 11}, "n: "),
        ({"n": 5}, "only 4 requests may wait"),
        ({"size": "9x"}, "size"),
        ({"size": "99999x16"}, "over the model's"),
        ({"size": "32x32", "extra_body": {"width": 32}}, "either size"),
        ({"response_format": "url"}, "b64_json"),
        ({"output_format": "gif"}, "output_format"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "data:image/png;base64,AAAA"}, "picture stands where a text"),
        ({"output_format": "jpeg", "prompt": "\u4e00" * 15_000}, "no room"),
        ({"extra_body": {"num_timesteps": 1}}, "num_timesteps"),
        ({"extra_body": {"num_timesteps": "5"}}, "num_timesteps"),
        ({"extra_body": {"num_timesteps": True}}, "num_timesteps"),
        ({"extra_body": {"num_timesteps": 10**400}}, "num_timesteps"),
        ({"extra_body": {"cfg_text_scale": 1e300}}, "cfg_text_scale"),
        ({"extra_body": {"cfg_interval": [0.9, 0.1]}}, "cfg_interval is reversed"),
        ({"extra_body": {"cfg_renorm_type": "x"}}, "cfg_renorm_type"),
        ({"extra_body": {"num_timestep": 5}}, "num_timestep: "),
    ],
)
def test_what_cannot_be_drawn_is_a_bad_request(client: Any, body: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        client.images.generate(**{"prompt": PROMPT, **body})
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("image", "more", "said"),
    [
        (b"no picture", {}, "not a picture"),
        (b"", {}, "picture"),
        ("png", {"mask": b"x"}, "masks are not supported"),
        ("png", {"prompt": ""}, "prompt"),
        (["png"] * 9, {}, "pictures|files"),
        ("png", {"extra_body": {"think": "perhaps"}}, "think"),
        ("png", {"extra_body": {"cfg_interval": [0.1, 0.2, 0.3]}}, "cfg_interval"),
    ],
)
def test_what_cannot_be_changed_is_a_bad_request(
    client: Any, png: bytes, image: Any, more: dict[str, Any], said: str
) -> None:
    image = [png] * len(image) if isinstance(image, list) else png if image == "png" else image
    with pytest.raises(openai.BadRequestError, match=said):
        client.images.edit(**{"image": image, "prompt": "blue", **more})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"n": 2}, "n must be 1"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools are not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"messages": []}, "messages"),
        ({"messages": asked()}, "empty"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "role"),
        ({"messages": asked({"type": "input_audio", "input_audio": {}})}, "input_audio"),
        ({"messages": asked(text("x" * 20_001))}, "20,001 characters"),
        ({"messages": asked(text("data:" + "x" * 20_001))}, "20,006 characters"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"seed": 2**64}, "seed"),
        ({"messages": asked(picture("file:///etc/passwd"))}, "no picture"),
        ({"messages": asked(picture("/etc/passwd"))}, "no picture"),
        ({"messages": asked(picture("ftp://a.example/x.png"))}, "no picture"),
        ({"messages": asked(picture("http://127.0.0.1:1/x.png"))}, "--remote-images"),
        ({"messages": asked(picture("data:image/png;base64,????"))}, "base64"),
        ({"messages": asked(picture("data:text/html,<p>"))}, "not a picture"),
        ({"messages": asked(*[picture("data:image/png;base64,AAAA")] * 9)}, "9 pictures"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(client: Any, body: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(**{"model": "any", "messages": asked(text(QUESTION)), **body})


def test_a_full_queue_is_a_rate_limit_that_the_client_waits_for(client: Any, service: Service) -> None:
    running = service.submit([PROMPT], "image", {**LONG, "num_timesteps": 1000}, "other")
    until(lambda: running.progress.step > 30)  # the client waits for no more than a minute
    waiting = [service.submit([PROMPT], "image", LONG, "other") for _ in range(3)]
    with pytest.raises(openai.RateLimitError) as refused:
        client.images.generate(prompt=PROMPT, n=2, extra_body=QUICK)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert len(service.queue.order()) == 3  # the first of the two is not left behind
    waiting.append(service.submit([PROMPT], "image", LONG, "other"))
    threading.Timer(0.2, lambda: [service.cancel(job) for job in (running, *waiting)]).start()
    patient = client.with_options(max_retries=10)
    patient._calculate_retry_timeout = lambda *_: 0.5  # type: ignore[method-assign]
    assert patient.images.generate(prompt=PROMPT, extra_body=QUICK).data


def test_a_key_is_asked_for_and_a_model_that_loads_is_waited_for() -> None:
    loading = service_of(page=False, api_key="k" * 16)
    with listening(loading) as url:
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k" * 16, max_retries=0) as client:
            assert [model.id for model in client.models.list()] == [loading.name]
            with pytest.raises(openai.InternalServerError, match="loading") as refused:
                client.images.generate(prompt=PROMPT)
            assert int(refused.value.response.headers["retry-after"]) >= 1


def test_who_hangs_up_leaves_no_job(client: Any, service: Service) -> None:
    long: Any = {"prompt": PROMPT, "extra_body": LONG}
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).images.generate(**long, n=3)
    until(lambda: idle(service), 5)
    stream = client.images.generate(**long, stream=True, partial_images=3)
    until(lambda: service.worker.running is not None, 5)
    stream.close()
    until(lambda: idle(service), 5)


def test_a_failure_in_a_stream_is_told(client: Any, service: Service) -> None:
    begun = time.monotonic()
    stream = client.images.generate(prompt=PROMPT, stream=True, extra_body=LONG)
    until(lambda: service.worker.running is not None, 5)
    assert service.worker.running is not None
    service.cancel(service.worker.running)
    with pytest.raises(openai.APIError, match="cancelled"):
        list(stream)
    assert time.monotonic() - begun < 5

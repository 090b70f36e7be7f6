"""Drawing and editing as OpenAI's clients ask for them: whole answers, and streams that show a picture as it forms."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response

from ..errors import SettingError
from ..pictures.saving import check_room
from ..settings import MAX_SEED, picture_options
from .events import event, event_stream
from .following import follow, result_of
from .intake import SUFFIXES, Given, Intake, base64_of, cancel
from .jobs import Job
from .openai_schemas import PictureData, PictureFields, PicturesAnswer, PictureTokens, PictureUsage
from .option_fields import given
from .usage import tokens_of

if TYPE_CHECKING:
    from PIL import Image

    from ..generation.results import Result


async def pictures(
    intake: Intake, request: Request, body: PictureFields, inputs: Sequence[Given], kind: str
) -> Response | PicturesAnswer:
    """Draw, or edit the inputs.

    Args:
        kind: what streamed events are named by, such as "image_generation".
    """
    output_format = body.output_format or "png"
    if body.response_format == "url":
        raise SettingError("this server keeps no pictures that a url could lead to; ask for response_format b64_json")
    check_room(f"the picture{SUFFIXES[output_format]}", body.prompt)
    settings = _settings(body, bool(inputs), intake.service.options.queue)
    partial = (body.partial_images or 0) if body.stream else 0
    jobs = await intake.submit(request, [*inputs, body.prompt], "image", settings, previews=partial > 0)
    if body.stream:
        return event_stream(_events(intake, request, jobs, kind, output_format, partial))
    try:
        results = [await result_of(request, intake.service, job) for job in jobs]
    finally:
        cancel(intake.service, jobs)
    return PicturesAnswer(
        created=int(time.time()),
        output_format=output_format,
        size=_size(results[0]),
        data=[await _data(result, image, output_format) for result in results for image in result.images],
        usage=_usage(intake, jobs, results),
    )


def _settings(body: PictureFields, editing: bool, room: int) -> list[Mapping[str, Any]]:
    """The settings of each of the request's pictures."""
    count = body.n or 1
    if count > room:
        raise SettingError(f"n is {count}, and only {room} requests may wait here; ask for fewer pictures at once")
    settings = given(body, picture_options(editing))
    if body.size not in (None, "auto"):
        if "width" in settings or "height" in settings:
            raise SettingError("give either size, or width and height")
        assert body.size is not None
        width, height = map(int, body.size.split("x"))
        settings |= {"width": width, "height": height}
    return each_its_seed(settings, count)


def each_its_seed(settings: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """Settings of several pictures: seeds follow one another, as picture tools have it; without one each is random."""
    seed = settings.get("seed")
    if seed is None:
        return [settings] * count
    return [{**settings, "seed": (seed + i) % (MAX_SEED + 1)} for i in range(count)]


async def _data(result: Result, image: Image.Image, output_format: str) -> PictureData:
    content = await base64_of(image, output_format, result.settings)
    return PictureData(b64_json=content, revised_prompt=result.text or None, settings=dict(result.settings))


def _size(result: Result) -> str:
    assert result.image is not None
    return f"{result.image.width}x{result.image.height}"


def _usage(intake: Intake, jobs: Sequence[Job], results: Sequence[Result]) -> PictureUsage:
    loaded = intake.service.loaded
    assert loaded is not None
    seen = [tokens_of(loaded, job.request) for job in jobs]
    texts, inputs = sum(tokens.text for tokens in seen), sum(tokens.pictures for tokens in seen)
    drawn = sum(len(result.latent) for result in results if result.latent is not None)
    written = sum(len(result.token_ids) for result in results)
    return PictureUsage(
        input_tokens=texts + inputs,
        input_tokens_details=PictureTokens(image_tokens=inputs, text_tokens=texts),
        output_tokens=drawn + written,
        output_tokens_details=PictureTokens(image_tokens=drawn, text_tokens=written),
        total_tokens=texts + inputs + drawn + written,
    )


async def _events(
    intake: Intake, request: Request, jobs: Sequence[Job], kind: str, output_format: str, partial: int
) -> AsyncGenerator[bytes, None]:
    """Each picture as it forms, `partial` times, and when it is done."""
    about = {"created_at": int(time.time()), "quality": "auto", "background": "opaque", "output_format": output_format}
    try:
        for job in jobs:
            shown = 0
            async with aclosing(follow(request, intake.service, job)) as following:
                async for progress in following:
                    if progress.error is not None:
                        raise progress.error
                    due = progress.steps and shown < min(partial, progress.step * (partial + 1) // progress.steps)
                    if due and progress.preview is not None and not progress.over:
                        picture = await base64_of(progress.preview, output_format, {})
                        size = f"{progress.preview.width}x{progress.preview.height}"
                        name = f"{kind}.partial_image"
                        place = {"partial_image_index": shown, "size": size}
                        yield event({"type": name, "b64_json": picture, **about, **place}, name)
                        shown += 1
            assert progress.result is not None
            usage = _usage(intake, [job], [progress.result]).model_dump()
            name = f"{kind}.completed"
            for image in progress.result.images:
                data = (await _data(progress.result, image, output_format)).model_dump(exclude_none=True)
                yield event({"type": name, **data, **about, "size": _size(progress.result), "usage": usage}, name)
    finally:
        cancel(intake.service, jobs)

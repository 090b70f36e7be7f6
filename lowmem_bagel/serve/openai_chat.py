"""Answers to chats as OpenAI's clients ask for them: whole and in pieces, cut at stop sequences."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response

from ..errors import SettingError
from ..settings import Option, TextSettings
from .events import DONE, event, event_stream
from .following import follow
from .intake import Given, Intake, Link
from .jobs import Job, Progress
from .openai_schemas import (
    Answer,
    ChatAnswer,
    ChatFields,
    ChatUsage,
    Choice,
    Message,
    PicturePart,
    TextPart,
    text_options,
)
from .option_fields import given
from .usage import tokens_of

DRAWN = {"text", "image"}
"""Modalities of answers in texts and pictures."""


async def chat(intake: Intake, request: Request, body: ChatFields) -> Response | ChatAnswer:
    """Answer the last turn."""
    refuse_what_is_not_done(body)
    (job,) = await intake.submit(request, terms_of(body.messages), "text", [settings_of(body, text_options())])
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    answering = Answering(intake, request, job, cut=Cut(tuple(filter(None, stops))))
    if body.stream:
        counted = body.stream_options is not None and body.stream_options.include_usage
        return event_stream(answering.events(bool(counted)))
    text = "".join([piece async for piece in answering.pieces()])
    choice = Choice(message=Answer(content=text), finish_reason=answering.reason)
    return ChatAnswer(**answering.about, choices=[choice], usage=answering.usage(), settings=answering.settings)


def refuse_what_is_not_done(body: ChatFields) -> None:
    """Raises SettingError for what would change the answer and cannot be had."""
    if body.n not in (None, 1):
        raise SettingError("n must be 1: ask again with another seed for another answer")
    if body.tools or body.functions:
        raise SettingError("tools are not supported: this model calls no functions")
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise SettingError("response_format must be text: this model is held to no schema")
    if body.logprobs:
        raise SettingError("logprobs are not supported")
    if body.modalities is not None and set(body.modalities) not in ({"text"}, DRAWN):
        raise SettingError("modalities must be text, or text and image; /v1/images/generations draws pictures alone")


def terms_of(messages: Sequence[Message]) -> list[Given]:
    """Turns as BAGEL was trained on them: each text is a block of its own, in order, and roles are not written out.

    Neighboring texts of one turn are one block.

    Raises:
        SettingError: nothing is said at all.
    """
    terms: list[Given] = []
    for message in messages:
        written: list[str] = []
        for part in [] if message.content is None else _parts(message.content):
            if isinstance(part, str):
                written.append(part)
                continue
            terms += _block(written)
            written = []
            terms.append(part)
        terms += _block(written)
    if not terms:
        raise SettingError("the messages are empty; ask something")
    return terms


def _parts(content: str | Sequence[TextPart | PicturePart]) -> list[str | Link]:
    if isinstance(content, str):
        return [content]
    return [_link(part) if isinstance(part, PicturePart) else part.text for part in content]


def _link(part: PicturePart) -> Link:
    return Link(part.image_url if isinstance(part.image_url, str) else part.image_url.url)


def _block(texts: Sequence[str]) -> list[str]:
    text = "\n".join(text for text in texts if text.strip())
    return [text] if text else []


def settings_of(body: ChatFields, options: Iterable[Option]) -> dict[str, Any]:
    """OpenAI's names as ours; what is given by our own names counts more. Of the settings these."""
    settings = given(body, options)
    most = body.max_completion_tokens or body.max_tokens
    if most is not None:
        settings.setdefault("max_new_tokens", most + 1)  # the frame's first token is counted by ours
    if body.top_p is not None:
        settings["top_p"] = max(body.top_p, 1e-6)  # 0 is the likeliest token
    if body.temperature == 0 and not settings.get("do_sample"):
        del settings["temperature"]
        settings["do_sample"] = False
    drawn = body.temperature is not None or (body.top_p is not None and body.top_p < 1)
    settings.setdefault("do_sample", drawn)
    return settings


@dataclass
class Cut:
    """Gives a growing text in pieces that stay true, up to the first of the stop sequences."""

    stops: tuple[str, ...]
    given: int = 0
    """Characters."""
    stopped: bool = False

    def feed(self, text: str, last: bool) -> str:
        """What may be told of the text so far that was not told before. `last`: it grows no more."""
        if self.stopped:
            return ""
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        end = min(found) if found else len(text) if last else self._sure(text)
        self.stopped = bool(found)
        piece = text[self.given : end]
        self.given = max(self.given, end)
        return piece

    def _sure(self, text: str) -> int:
        """How far it stays as it is: half a character may be whole soon, and half a stop sequence one."""
        end = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        longest = max(map(len, self.stops), default=1) - 1
        for start in range(max(0, end - longest), end):
            if any(stop.startswith(text[start:end]) for stop in self.stops):
                return start
        return end


@dataclass
class Reply:
    """An answer on its way to a client."""

    intake: Intake
    request: Request
    job: Job
    about: dict[str, Any] = field(init=False)
    last: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        name, now = self.intake.service.name, int(time.time())
        self.about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": now, "model": name}

    def piece(self, delta: dict[str, Any] | None = None, reason: str | None = None) -> dict[str, Any]:
        """A piece of the answer; without a delta, one that has none."""
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
        return {**self.about, "object": "chat.completion.chunk", "choices": choices}


@dataclass
class Answering(Reply):
    """One in text alone."""

    cut: Cut = field(default_factory=lambda: Cut(()))
    told: list[str] = field(default_factory=list)

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The answer's text; at a stop sequence the job is ended."""
        async with aclosing(follow(self.request, self.intake.service, self.job)) as following:
            async for self.last in following:
                if self.last.error is not None:
                    raise self.last.error
                piece = self.cut.feed(self.last.text, self.last.over)
                if piece:
                    self.told.append(piece)
                    yield piece
                if self.cut.stopped:
                    return

    async def events(self, counted: bool) -> AsyncGenerator[bytes, None]:
        yield event(self.piece({"role": "assistant", "content": ""}) | {"settings": self.settings})
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                yield event(self.piece({"content": piece}))
        yield event(self.piece({}, self.reason))
        if counted:
            yield event(self.piece() | {"usage": self.usage().model_dump()})
        yield DONE

    @property
    def settings(self) -> dict[str, Any]:
        return self.job.request.settings.to_json()

    @property
    def reason(self) -> Any:
        """Why the answer ended: "stop" or "length"."""
        settings, result = self.job.request.settings, self.last.result
        assert isinstance(settings, TextSettings)
        whole = self.cut.stopped or result is None or len(result.token_ids) < settings.max_new_tokens
        return "stop" if whole else "length"

    def usage(self) -> ChatUsage:
        loaded, result = self.intake.service.loaded, self.last.result
        assert loaded is not None
        asked = tokens_of(loaded, self.job.request).total
        if result is not None:
            answered = len(result.token_ids) - 1
        else:  # ended at a stop sequence
            answered = len(loaded.pipeline.model.tokenizer.encode("".join(self.told)))
        return ChatUsage(prompt_tokens=asked, completion_tokens=answered, total_tokens=asked + answered)

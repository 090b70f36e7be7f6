"""Server-sent events: an answer in pieces, kept alive while nothing comes, with a failure as its last event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse

from .failures import failure_of

SILENCE = 15.0
"""Seconds after which proxies are shown that the connection lives."""
ALIVE = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""Nobody on the way is to keep or gather the pieces."""


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One event, with a name where the protocol gives one."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n".encode()


def event_stream(events: AsyncGenerator[bytes, None]) -> StreamingResponse:
    """The answer that sends these events."""
    return StreamingResponse(_ended(_alive(events)), media_type="text/event-stream", headers=HEADERS)


async def _ended(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The status was told long ago: what fails now is an event."""
    async with aclosing(events):
        try:
            async for each in events:
                yield each
        except Exception as error:
            *_, trouble = failure_of(error)
            yield event({"error": trouble.model_dump()}, "error")


async def _alive(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The events, and a sign of life whenever there was none for a while."""
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events))
            if not (await asyncio.wait((coming,), timeout=SILENCE))[0]:
                yield ALIVE
                continue
            came, coming = coming, None
            try:
                piece = came.result()
            except StopAsyncIteration:
                return
            yield piece
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait((coming,))
        await events.aclose()

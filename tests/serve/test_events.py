"""Server-sent events: alive while nothing comes, and ended with their reader."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

import pytest

from lowmem_bagel.errors import SettingError
from lowmem_bagel.serve import events
from lowmem_bagel.serve.events import ALIVE, event, event_stream


def stream(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    return cast(Any, event_stream(source).body_iterator)


def test_silence_is_broken_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SILENCE", 0.02)

    async def slow() -> AsyncGenerator[bytes, None]:
        yield b"1"
        await asyncio.sleep(0.1)
        yield b"2"

    async def read() -> list[bytes]:
        return [piece async for piece in stream(slow())]

    pieces = asyncio.run(read())
    assert ALIVE in pieces
    assert [piece for piece in pieces if piece != ALIVE] == [b"1", b"2"]


@pytest.mark.parametrize("waits", [False, True])
def test_a_reader_that_leaves_ends_the_source(waits: bool) -> None:
    ended: list[str] = []

    async def source() -> AsyncGenerator[bytes, None]:
        try:
            yield b"1"
            await asyncio.sleep(30)
            yield b"2"
        finally:
            ended.append("closed")

    async def leave() -> None:
        async def read() -> None:
            async with aclosing(stream(source())) as pieces:
                async for _ in pieces:
                    if not waits:
                        return

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.02)
        reading.cancel()
        await asyncio.wait((reading,))

    asyncio.run(leave())
    assert ended == ["closed"]


def test_a_failure_is_the_last_event() -> None:
    async def source() -> AsyncGenerator[bytes, None]:
        yield b"1"
        raise SettingError("no such thing; ask for another")

    async def read() -> list[bytes]:
        return [piece async for piece in stream(source())]

    _, last = asyncio.run(read())
    head, _, data = last.partition(b"\ndata: ")
    assert head == b"event: error"
    assert json.loads(data)["error"]["message"] == "no such thing; ask for another"


def test_an_event_is_one_line_of_data() -> None:
    assert event({"text": "a\nb\u2028\u4e00"}) == 'data: {"text": "a\\nb\u2028\u4e00"}\n\n'.encode()

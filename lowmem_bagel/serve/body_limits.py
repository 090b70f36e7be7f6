"""What a client sends: no more than its route takes, not too much of all clients together, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from ..units import format_bytes
from .failures import refusal

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MIB = 1 << 20
LIMITS: Sequence[tuple[str, int]] = (
    ("/v1/", 64 * MIB),
    ("/sdapi/", 64 * MIB),
    ("/gradio_api/upload", 64 * MIB),
    ("/gradio_api/", 4 * MIB),
    ("/", 64 * 1024),
)
"""Bytes of a body, by how the path begins: pictures come to the API inside JSON or forms, to the page as uploads."""
IN_FLIGHT = 256 * MIB
"""Bytes of all bodies whose requests are not answered yet."""
BODY_SECONDS = 300.0
"""For a body to arrive whole."""
BUSY_SECONDS = 5
LAST_SECONDS = 5.0
"""For what a client still sends of a body that is refused: many listen to the answer only when they have sent all."""


@dataclass
class Bodies:
    """Passes requests on, and counts their bodies as they come."""

    app: ASGIApp
    held: int = 0
    """Bytes of requests that are not answered yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reading = _Reading(self, limit_of(scope["path"]), receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > reading.limit:
            await answered_after_body(reading.too_large(), scope, receive, send)
            return
        try:
            await self.app(scope, reading.receive, reading.send)
        except Exception:
            if reading.refused is None:
                raise
        finally:
            self.held -= reading.count
        if reading.refused is not None and not reading.begun:
            if reading.whole:
                await reading.refused(scope, receive, send)
            else:
                await answered_after_body(reading.refused, scope, receive, send)


async def answered_after_body(answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an answer that did not wait for the body, once that has come and gone; at once where the client waits."""
    if "expect" not in Headers(scope=scope):
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                while (await receive()).get("more_body", False):
                    pass
    await answer(scope, receive, send)


class _Reading:
    """One request's body. Once it is refused, what the application makes of that is not heard."""

    def __init__(self, bodies: Bodies, limit: int, receive: Receive, send: Send) -> None:
        self.bodies, self.limit, self._receive, self._send = bodies, limit, receive, send
        self.count = 0
        self.whole = self.begun = False
        self.refused: Response | None = None
        self.deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive(self) -> Message:
        if self.whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self._receive()
        except TimeoutError:
            raise self._refuse(refusal(408, "the request's body took too long")) from None
        self.whole = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self.count += size
        self.bodies.held += size
        if self.count > self.limit:
            raise self._refuse(self.too_large())
        if self.bodies.held > IN_FLIGHT:
            said = "too many large requests at once; ask again later"
            raise self._refuse(refusal(503, said, retry_after=str(BUSY_SECONDS)))
        return message

    async def send(self, message: Message) -> None:
        if self.refused is None:
            self.begun = True
            await self._send(message)

    def too_large(self) -> Response:
        return refusal(413, f"the request's body is too large; this route takes {format_bytes(self.limit)}")

    def _refuse(self, answer: Response) -> HTTPException:
        self.refused = answer
        return HTTPException(answer.status_code)


def limit_of(path: str) -> int:
    """Bytes that a body may have."""
    return next(limit for beginning, limit in LIMITS if path.startswith(beginning) or beginning == "/")

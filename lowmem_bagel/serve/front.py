"""What answers from the first moment on, until the application is made, which then takes over.

Only then does the model load. Both at a time would take turns at Python's one lock: the page would be there in twice
the time, and the model no sooner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import HTMLResponse, JSONResponse, Response

from ..errors import UnavailableError
from .failures import answer_to
from .health import health
from .safety import Safety
from .service import Service

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

STARTING = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="1">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>lowmem-bagel</title><style>
:root{color-scheme:light dark}body{font:1.1rem system-ui;display:grid;place-content:center;height:90vh}</style>
<main role="status"><p>lowmem-bagel is starting; this page follows by itself.</p>
<p lang="zh">lowmem-bagel 正在启动，页面会自动打开。</p></main></html>
"""
STARTING_SECONDS = 3.0


class Front:
    """An ASGI application.

    Args:
        make: makes the application that takes over; called in a thread, since it imports what takes seconds.
    """

    def __init__(self, service: Service, make: Callable[[Service], Any]) -> None:
        self.service, self.make = service, make
        self.app: ASGIApp | None = None
        self._before = Safety(self._starting, service.options, open_paths=("/", "/health"))
        self._leaving = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self.app is not None:
            await self.app(scope, receive, send)
        else:
            await self._before(scope, receive, send)

    def end_streams(self) -> None:
        """Those of the page, which have no end of their own; once nothing more is to come."""
        end = getattr(getattr(self.app, "state", None), "end_streams", None)
        if end is not None:
            end()

    async def _starting(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response:
        if scope["path"] == "/health":
            status, headers, body = health(self.service)
            return JSONResponse(body, status, headers)
        if scope["path"] == "/":
            return HTMLResponse(STARTING, 503, {"retry-after": "1"})
        return answer_to(UnavailableError("the server is starting; ask again in some seconds", STARTING_SECONDS))

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        living = asyncio.create_task(self._take_over())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._leaving.set()
        await living
        await send({"type": "lifespan.shutdown.complete"})

    async def _take_over(self) -> None:
        """The application made, its own beginning and end around its life, and the model loaded in it."""
        try:
            app = await asyncio.to_thread(self.make, self.service)
            async with app.router.lifespan_context(app):
                self.app = app
                if not self.service.closing:
                    self.service.start()
                await self._leaving.wait()
        except Exception as error:
            self.service.failure = self.service.failure or error
            self.service.when_failed()

"""What of Gradio is reachable: the routes that the page itself uses, and files that were uploaded to it.

Gradio serves more: addresses on the web fetched for whoever asks, other applications relayed, functions called by name,
its own monitoring. Left alone, a mounted application would also take any path of this machine for an uploaded file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..failures import refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

API = "/gradio_api"
GET = re.compile(
    r"/|/config/?|/(?:assets|static|svelte)/.+|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(?:/\d+)?"
    rf"|{API}/(?:app_id|startup-events|theme\.css|upload_progress|queue/data|heartbeat/\w+|file=(?!\w+:).+)"
)
POST = re.compile(rf"{API}/(?:queue/join|upload|cancel|reset)/?")
JOIN = f"{API}/queue/join"
MAX_BODY = 1 << 20
"""Bytes of what an event brings; pictures are uploaded beforehand."""


class Guard:
    """An ASGI application before Gradio's.

    Args:
        uploads: the folder that uploaded files lie in.
    """

    def __init__(self, app: ASGIApp, uploads: str) -> None:
        self.app, self.uploads = app, os.path.realpath(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = route_path(scope)
        if scope["type"] != "http" or not allowed(scope["method"], path):
            await refusal(404, "there is nothing here")(scope, receive, send)
        elif path.rstrip("/") == JOIN:
            await self._event(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _event(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let an event through whose files are uploaded ones."""
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
            if len(body) > MAX_BODY:
                await refusal(413, "too much for one event; write less")(scope, receive, send)
                return
        try:
            foreign = [path for path in files_in(json.loads(body)) if not self._uploaded(path)]
        except (ValueError, RecursionError):
            await refusal(400, "the body is not JSON")(scope, receive, send)
            return
        if foreign:
            await refusal(403, "only files that were uploaded here can be used")(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, again, send)

    def _uploaded(self, path: object) -> bool:
        if not isinstance(path, str) or "\0" in path:
            return False
        return os.path.realpath(path).startswith(self.uploads + os.sep)


def route_path(scope: Scope) -> str:
    """The path below where the page is mounted."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) or "/"


def allowed(method: str, path: str) -> bool:
    wanted = {"GET": GET, "HEAD": GET, "POST": POST}.get(method)
    return wanted is not None and wanted.fullmatch(path) is not None


def files_in(data: Any) -> Iterator[object]:
    """Whatever Gradio would take for a file's place: the paths and addresses of all objects, however deep."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("path") is not None:
                yield value["path"]
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)

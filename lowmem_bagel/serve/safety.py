"""Who may in, before any route is reached. `docs/serving.md` says why this is enough.

Without a key the server listens on loopback alone, and two kinds of strangers are left: pages of other sites in a
browser of this machine, which the `Origin` and `Sec-Fetch-Site` of what changes something give away; and pages whose
own name was made to lead here, which the `Host` gives away. With a key, neither of them has it, by whatever name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

from . import login
from .body_limits import Bodies, answered_after_body
from .failures import refusal
from .keys import Keys
from .options import LOOPBACK, ServeOptions

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CHANGING_NOTHING = ("GET", "HEAD", "OPTIONS")
OPEN = ("/health",)
"""Paths for which no key is asked: they tell nothing of anybody's."""
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::\d{1,5})?")
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": "frame-ancestors 'none'; object-src 'none'; base-uri 'self'",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""Of every answer, where it has not its own."""


class Safety:
    """An ASGI application around another.

    Args:
        open_paths: where no key is asked for.
        answered: told the status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServeOptions,
        open_paths: tuple[str, ...] = OPEN,
        answered: Callable[[int], None] = lambda status: None,
    ) -> None:
        self.app = Bodies(app)
        self.keys, self.open_paths, self.answered = Keys(options.api_key), open_paths, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer(scope, receive, self._marked(send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        refused = self._refusal(scope, headers)
        if refused is not None:
            await answered_after_body(refused, scope, receive, send)
        elif self.keys.key and scope["path"] == login.PATH:
            await Bodies(self._login)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer = await login.log_in(request, self.keys) if request.method == "POST" else login.form()
        await answer(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """What is answered to who may not in; None for all others."""
        if not self.keys.key and host_name(headers.get("host", "")) not in LOOPBACK:
            return refusal(403, "this server answers to localhost alone; to give it other names, set an API key")
        if self.keys.key and self.keys.in_header(headers):
            return None
        if scope["method"] not in CHANGING_NOTHING and is_from_elsewhere(headers):
            return refusal(403, "a page of another site sent this; only this server's own page may")
        if not self.keys.key or scope["path"] in (*self.open_paths, login.PATH):
            return None
        session = self.keys.session_of(headers)
        if session is not None:
            scope.setdefault("state", {})["session"] = session
            return None
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return login.form()
        return refusal(401, "an API key is needed: send it as 'Authorization: Bearer KEY'", www_authenticate="Bearer")

    def _marked(self, send: Send) -> Send:
        """What is sent, with the headers that every answer has, and without any that open it to other sites."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered(message["status"])
                headers = MutableHeaders(raw=list(message.get("headers", [])))
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                message = {**message, "headers": headers.raw}
            await send(message)

        return sending


def host_name(header: str) -> str:
    """The name or address in a `Host`, as browsers may write it; "" where it is none."""
    found = HOST.fullmatch(header.strip().lower())
    return (found[1] or found[2]).rstrip(".") if found else ""


def is_from_elsewhere(headers: Headers) -> bool:
    """Whether a browser says that another site's page sent this; programs say nothing of the kind."""
    if headers.get("sec-fetch-site", "same-origin").lower() not in ("same-origin", "none"):
        return True
    origin = headers.get("origin")
    return origin is not None and _place(origin.partition("://")[2]) != _place(headers.get("host", ""))


def _place(host: str) -> str:
    """Host and port; the scheme's own port is not written."""
    return re.sub(r":(80|443)$", "", host.strip().lower())

"""A page that answers wherever no route does, and still not in the API's own places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.routing import BaseRoute, Match

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Receive, Scope, Send

PLACES = frozenset({"v1", "sdapi", "health", "metrics", "docs", "openapi.json"})
"""How paths begin that are the API's."""


class Elsewhere(BaseRoute):
    """A route that matches nothing below some places: there it would answer 404 to a wrong method, and with a page."""

    def __init__(self, route: BaseRoute, places: frozenset[str]) -> None:
        self.route, self.places = route, places

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if first_part(scope["path"]) in self.places:
            return Match.NONE, {}
        return self.route.matches(scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.route.handle(scope, receive, send)


def keep_last_elsewhere(app: FastAPI) -> None:
    """Keep the app's last route out of the API's places."""
    app.router.routes[-1] = Elsewhere(app.router.routes[-1], PLACES)


def first_part(path: str) -> str:
    return path.lstrip("/").partition("/")[0]

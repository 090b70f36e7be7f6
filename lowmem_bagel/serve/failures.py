"""What a client is told when something fails: one JSON shape, OpenAI's, for every exception and every route."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from ..errors import (
    BusyError,
    Cancelled,
    LowmemBagelError,
    PipelineClosedError,
    TimeLimitError,
    UnavailableError,
    UserError,
    printable,
)

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger(__name__)
MAX_MESSAGE = 500
"""Characters of what is wrong with one field."""
MAX_FIELDS = 5
"""Wrong fields that are named."""


class Trouble(BaseModel):
    """What is wrong: for people in `message`; `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    """The body of every answer that is no success."""

    error: Trouble


class Kind(NamedTuple):
    status: int
    type: str
    code: str | None


REQUEST, SERVER = "invalid_request_error", "server_error"
KINDS: Sequence[tuple[type[BaseException], Kind]] = (
    (UnavailableError, Kind(503, SERVER, "unavailable")),
    (BusyError, Kind(429, "rate_limit_error", "queue_full")),
    (TimeLimitError, Kind(504, SERVER, "time_limit")),
    (PipelineClosedError, Kind(503, SERVER, "unavailable")),
    (Cancelled, Kind(503, SERVER, "cancelled")),
    (UserError, Kind(400, REQUEST, None)),
)
"""The first class that fits says what a failure is; all else is a fault of ours."""
OF_STATUS: Mapping[int, tuple[str, str | None]] = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: (REQUEST, "not_found"),
    405: (REQUEST, "method_not_allowed"),
    413: (REQUEST, "too_large"),
}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request cannot be done; `error.message` says why."},
    "5XX": {"model": Failure, "description": "The server cannot do it; `Retry-After` where it may later."},
}
"""Of every route, for OpenAPI."""


def failure_of(error: BaseException) -> tuple[int, dict[str, str], Trouble]:
    """Status, headers and what is said. Of a fault of ours, an id alone, under which the log has the rest."""
    kind = next((kind for known, kind in KINDS if isinstance(error, known)), None)
    if kind is None:
        number = secrets.token_hex(4)
        LOG.error("fault %s", number, exc_info=error)
        return 500, {}, Trouble(message=f"the server failed; its log says why under {number}", type=SERVER, code=number)
    headers = {"retry-after": str(max(1, math.ceil(error.retry_after)))} if isinstance(error, BusyError) else {}
    return kind.status, headers, Trouble(message=str(error), type=kind.type, code=kind.code)


def answer(status: int, headers: Mapping[str, str], trouble: Trouble) -> JSONResponse:
    from starlette.responses import JSONResponse

    return JSONResponse(Failure(error=trouble).model_dump(), status, dict(headers))


def answer_to(error: BaseException) -> JSONResponse:
    """The answer to a request that failed so."""
    return answer(*failure_of(error))


def refusal(status: int, message: str, **headers: str) -> JSONResponse:
    """The answer to a request that got no further; `_` in a header's name stands for `-`."""
    type, code = OF_STATUS.get(status, (SERVER if status >= 500 else REQUEST, None))
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return answer(status, named, Trouble(message=printable(message), type=type, code=code))


def catch_failures(app: FastAPI) -> None:
    """Have everything that the app's routes raise answered in the one shape."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    app.add_exception_handler(LowmemBagelError, _expected)
    app.add_exception_handler(HTTPException, _of_framework)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(Unexpected)


class Unexpected:
    """Answers faults of ours, where the answer has not begun; elsewhere the connection ends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await answer_to(error)(scope, receive, send)


async def _expected(_: Request, error: Exception) -> Response:
    return answer_to(error)


async def _of_framework(_: Request, error: Exception) -> Response:
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException)
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    type, code = OF_STATUS.get(error.status_code, (SERVER if error.status_code >= 500 else REQUEST, None))
    return answer(error.status_code, headers, Trouble(message=printable(str(error.detail)), type=type, code=code))


async def _invalid(_: Request, error: Exception) -> Response:
    from fastapi.exceptions import RequestValidationError

    assert isinstance(error, RequestValidationError)
    wrong = [(_field(found["loc"]), found["msg"]) for found in error.errors()]
    said = "; ".join(printable(f"{field}: {what}", MAX_MESSAGE) for field, what in wrong[:MAX_FIELDS])
    left = len(wrong) - MAX_FIELDS
    message = f"{said}; and {left} more" if left > 0 else said
    return answer(400, {}, Trouble(message=message, type=REQUEST, param=printable(wrong[0][0], MAX_MESSAGE)))


def _field(place: Sequence[Any]) -> str:
    """A field's place as a client knows it: without the "body" or "query" that the framework puts before it."""
    inner = place[1:] if len(place) > 1 else place
    return ".".join(map(str, inner))

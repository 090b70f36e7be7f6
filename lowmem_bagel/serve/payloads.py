"""Bodies of requests: JSON that is stricter than Python's, and forms whose texts become what a schema wants."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from ..errors import first_line
from ..files import parse_json
from ..values import shown
from .service import MAX_PICTURES

MAX_JSON_BYTES = 64 << 20
"""Of a body: several pictures in base64."""
SMALL = 1 << 16
"""Bytes that are parsed at once, without a thread."""
MAX_FIELDS = 100
"""Of a form."""
Schema = TypeVar("Schema", bound=BaseModel)


class StrictRequest(Request):
    """A request whose JSON holds no NaN, no key twice, no half characters and no towers of brackets."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            if len(body) <= SMALL:
                return parse_json(body, MAX_JSON_BYTES)
            return await asyncio.to_thread(parse_json, body, MAX_JSON_BYTES)
        except ValueError as error:
            raise HTTPException(400, f"the body is no JSON that can be read ({first_line(error)})") from error


class StrictRoute(APIRoute):
    """A route whose requests are strict."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


def strict_router(**about: Any) -> APIRouter:
    return APIRouter(route_class=StrictRoute, **about)


def post(
    router: APIRouter,
    path: str,
    schema: type[Schema],
    handle: Callable[[Request, Schema], Awaitable[Response | BaseModel | None]],
    **about: Any,
) -> None:
    """Add a route whose JSON body is of a schema that was made while the program runs.

    Args:
        handle: gets the request and the checked body.
        about: what else the framework takes of a route: its answer's schema, a summary, a description.
    """

    async def endpoint(request: Request, body: Any) -> Response | None:
        found = await handle(request, body)
        return answered_with(found) if isinstance(found, BaseModel) else found

    endpoint.__annotations__ = {"request": Request, "body": schema}
    router.add_api_route(path, endpoint, methods=["POST"], name=handle.__name__, response_model=None, **about)


def answered_with(answer: BaseModel) -> Response:
    """An answer's JSON, written in one go: it may hold pictures, over which the framework would go three times."""
    return Response(answer.__pydantic_serializer__.to_json(answer, by_alias=True), media_type="application/json")


async def form_of(
    request: Request, schema: type[Schema], file_fields: Collection[str]
) -> tuple[Schema, dict[str, list[bytes | str]]]:
    """A multipart form: its fields checked by a schema, and its files by field; one may also be written as a URL.

    Raises:
        HTTPException, RequestValidationError: it is damaged, or not of the schema.
    """
    values: dict[str, Any] = {}
    files: dict[str, list[bytes | str]] = {}
    async with request.form(max_files=MAX_PICTURES + 1, max_fields=MAX_FIELDS) as form:
        for name, value in form.multi_items():
            plain = re.sub(r"\[[0-9]*\]$", "", name)
            if plain in file_fields:
                content = await value.read() if isinstance(value, UploadFile) else value
                files.setdefault(plain, []).append(content)
            elif isinstance(value, UploadFile):
                raise HTTPException(400, f"{shown(name)} is no field for a file")
            else:
                _add(values, name, value, schema)
    return checked(schema, values), files


def checked(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """Values as the schema has them. Raises RequestValidationError."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in wrong]) from error


def _add(values: dict[str, Any], name: str, text: str, schema: type[BaseModel]) -> None:
    """One field of a form; `name[]` adds to a list."""
    plain = name.removesuffix("[]")
    field = schema.model_fields.get(plain)
    value = text if field is None or _takes_text(field.annotation) else _of_text(text)
    if name == plain:
        values[name] = value
        return
    others = values.setdefault(plain, [])
    if isinstance(others, list):
        others.append(value)


def _takes_text(annotation: Any) -> bool:
    return annotation is str or get_origin(annotation) is Literal or any(map(_takes_text, get_args(annotation)))


def _of_text(text: str) -> Any:
    """A number, a flag or a list as forms have them; what is none of them is left for the schema to refuse."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if not text.strip():
        return None
    try:
        return parse_json(text.encode())
    except ValueError:
        return text

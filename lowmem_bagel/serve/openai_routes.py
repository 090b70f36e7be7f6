"""The API that OpenAI's clients speak: pictures, chats, and the model's name."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import BaseModel

from ..errors import SettingError
from ..values import shown
from .intake import Given, Intake, Link
from .openai_chat import DRAWN, chat, refuse_what_is_not_done
from .openai_images import pictures
from .openai_interleaved import interleaved
from .openai_schemas import (
    ChatAnswer,
    ChatFields,
    Model,
    Models,
    PictureFields,
    PicturesAnswer,
    chat_request,
    picture_request,
)
from .payloads import answered_with, form_of, post, strict_router
from .remote_pictures import RemotePictures
from .service import MAX_PICTURES, Service

FILES = ("image", "mask", "markup")
"""Fields of OpenAI's form that hold files."""
STREAM: dict[str, Any] = {"text/event-stream": {}}


def answered(schema: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The answers of a route, for OpenAPI."""
    return {200: {"model": schema, "content": STREAM, "description": "The answer, or with `stream` its events."}}


def openai_router(service: Service, remote: RemotePictures | None = None) -> APIRouter:
    """Routes below /v1."""
    router, intake, since = strict_router(prefix="/v1"), Intake(service, remote), int(time.time())
    editing = picture_request(editing=True)

    async def draw(request: Request, body: PictureFields) -> Response | PicturesAnswer:
        return await pictures(intake, request, body, [], "image_generation")

    async def talk(request: Request, body: ChatFields) -> Response | ChatAnswer:
        if body.modalities is not None and set(body.modalities) == DRAWN:
            refuse_what_is_not_done(body)
            return await interleaved(intake, request, body)
        return await chat(intake, request, body)

    post(
        router,
        "/images/generations",
        picture_request(editing=False),
        draw,
        tags=["pictures"],
        summary="Draw pictures",
        description="The sampler settings stand beside OpenAI's fields; with its Python client they are `extra_body`.",
        responses=answered(PicturesAnswer),
    )

    @router.post(
        "/images/edits",
        tags=["pictures"],
        summary="Change a picture",
        description="A multipart form, as OpenAI's clients send it. Of several pictures the last gives the size.",
        response_model=None,
        responses=answered(PicturesAnswer),
        openapi_extra=_form(editing),
    )
    async def edit(request: Request) -> Response:
        body, files = await form_of(request, editing, FILES)
        if files.keys() - {"image"}:
            raise SettingError("masks are not supported: the whole picture is seen; the prompt says what is to change")
        inputs: list[Given] = [Link(file) if isinstance(file, str) else file for file in files.get("image", [])]
        if not inputs:
            raise SettingError("no picture to change; send one as image")
        found = await pictures(intake, request, body, inputs, "image_edit")
        return found if isinstance(found, Response) else answered_with(found)

    post(
        router,
        "/chat/completions",
        chat_request(),
        talk,
        tags=["chat"],
        summary="Answer a chat, and look at its pictures",
        responses=answered(ChatAnswer),
    )

    def model() -> Model:
        return Model(id=service.name, created=since)

    @router.get("/models", tags=["models"], summary="The model that is served")
    async def models() -> Models:
        return Models(data=[model()])

    @router.get("/models/{name}", tags=["models"], summary="A model by its name")
    async def model_by_name(name: str) -> Model:
        if name != service.name:
            raise HTTPException(404, f"there is no model {shown(name)} here; the one served is {service.name}")
        return model()

    return router


def _form(schema: type[BaseModel]) -> dict[str, Any]:
    """A multipart body for OpenAPI: the schema's fields, and files."""
    fields = schema.model_json_schema()
    file = {"type": "string", "format": "binary"}
    about = "A picture, or several as `image[]`. A mask is refused: say in the prompt what is to change."
    fields["properties"] |= {
        "image": {"anyOf": [file, {"type": "array", "items": file, "maxItems": MAX_PICTURES}], "description": about}
    }
    fields["required"] = [*fields.get("required", []), "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": fields}}}}

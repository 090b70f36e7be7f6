"""The API of A1111's web UI, which picture tools speak: drawing, editing, how far it is, and stopping."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request

from ..errors import SettingError
from ..values import shown
from .following import client_of
from .intake import Intake
from .payloads import post, strict_router
from .remote_pictures import RemotePictures
from .sdapi_desk import Desk
from .sdapi_schemas import SdModel, SdOptions, SdPictures, SdProgress, Txt2Img, sd_request
from .service import Service

SAMPLER = {"name": "Euler", "aliases": ["euler"], "options": {}}
SCHEDULER = {"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1.0, "need_inner_model": False}
FIXED: Mapping[str, Any] = {
    "samplers": [SAMPLER],
    "schedulers": [SCHEDULER],
    "upscalers": [],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "loras": [],
    "hypernetworks": [],
    "face-restorers": [],
    "prompt-styles": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "scripts": {"txt2img": [], "img2img": []},
    "cmd-flags": {},
}
"""What tools ask for when they start, and what it is here."""


def sdapi_router(service: Service, remote: RemotePictures | None = None) -> APIRouter:
    """Routes below /sdapi/v1."""
    router, desk = strict_router(prefix="/sdapi/v1", tags=["A1111"]), Desk(Intake(service, remote))

    async def txt2img(request: Request, body: Txt2Img) -> SdPictures:
        return await desk.draw(request, body)

    async def img2img(request: Request, body: Txt2Img) -> SdPictures:
        return await desk.draw(request, body)

    answers: dict[int | str, dict[str, Any]] = {200: {"model": SdPictures}}
    post(router, "/txt2img", sd_request(editing=False), txt2img, summary="Draw pictures", responses=answers)
    post(router, "/img2img", sd_request(editing=True), img2img, summary="Change a picture", responses=answers)

    @router.get("/progress", summary="How far this client's pictures are")
    async def progress(request: Request, skip_current_image: bool = False) -> SdProgress:
        return await desk.progress(client_of(request), not skip_current_image)

    @router.post("/interrupt", summary="Stop this client's pictures")
    async def interrupt(request: Request) -> dict[str, Any]:
        desk.interrupt(client_of(request))
        return {}

    @router.post("/skip", summary="Stop this client's pictures")
    async def skip(request: Request) -> dict[str, Any]:
        desk.interrupt(client_of(request))
        return {}

    @router.get("/options", summary="Which model there is")
    async def options() -> dict[str, Any]:
        return {"sd_model_checkpoint": service.name, "samples_format": "png", "sd_vae": "Automatic"}

    async def set_options(request: Request, body: SdOptions) -> None:
        wanted = body.sd_model_checkpoint
        if wanted and wanted != service.name:
            raise SettingError(f"{shown(wanted)} is not served here; the model is {service.name}")

    post(router, "/options", SdOptions, set_options, summary="Accepted; another model is refused")

    @router.get("/sd-models", summary="Which model there is")
    async def sd_models() -> list[SdModel]:
        return [SdModel(title=service.name, model_name=service.name, filename=service.name)]

    for name, content in FIXED.items():
        router.add_api_route(
            f"/{name}", _fixed(content), methods=["GET"], name=name, summary=f"For tools that ask for {name}"
        )
    return router


def _fixed(content: Any) -> Callable[[], Awaitable[Any]]:
    async def fixed() -> Any:
        return content

    return fixed

"""All routes of one service, in one application."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import JSONResponse

from .. import __version__
from .failures import DOCUMENTED, catch_failures
from .health import health
from .service import Service


def create_app(service: Service) -> FastAPI:
    """The API, and the page where it is wanted and its packages are there. Takes seconds: gradio is imported."""
    app = FastAPI(
        title="lowmem-bagel", version=__version__, summary="BAGEL draws, edits and answers.", responses=DOCUMENTED
    )
    catch_failures(app)

    @app.get("/health", tags=["server"], summary="Whether requests are taken in")
    async def get_health() -> JSONResponse:
        status, headers, body = health(service)
        return JSONResponse(body, status, headers)

    return app

"""All routes of one service, in one application, and who may reach them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import HTMLResponse, JSONResponse, Response

from .. import __version__
from .docs_page import docs_page
from .extras import has_page
from .failures import DOCUMENTED, catch_failures
from .health import health
from .metrics import Metrics
from .openai_routes import openai_router
from .routing import keep_last_elsewhere
from .safety import Safety
from .sdapi_routes import sdapi_router
from .service import Service

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(service: Service) -> FastAPI:
    """The API, and the page where it is wanted and its packages are there. Takes seconds: gradio is imported."""
    app = FastAPI(
        title="lowmem-bagel", version=__version__, summary="BAGEL draws, edits and answers.", responses=DOCUMENTED,
        docs_url=None, redoc_url=None,  # whose pages are nothing without scripts from a public network
    )  # fmt: skip
    metrics = Metrics(service)
    catch_failures(app)
    app.add_middleware(Safety, options=service.options, answered=metrics.answered)

    @app.get("/health", tags=["server"], summary="Whether requests are taken in")
    async def get_health() -> JSONResponse:
        status, headers, body = health(service)
        return JSONResponse(body, status, headers)

    @app.get("/metrics", tags=["server"], summary="For Prometheus", response_class=Response)
    async def get_metrics() -> Response:
        return Response(metrics.text(), media_type=PROMETHEUS)

    @app.get("/docs", include_in_schema=False)
    async def get_docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    app.include_router(openai_router(service))
    app.include_router(sdapi_router(service))
    if service.options.page and has_page():
        from .page import mount_page

        app.state.end_streams = mount_page(app, service)
        keep_last_elsewhere(app)
    return app

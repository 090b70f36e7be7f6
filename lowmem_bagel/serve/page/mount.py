"""Gradio's application inside ours: closed to all but the page, and without anything from or to the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradio.utils import get_upload_folder
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.routing import Mount

from ...pictures.encoded import MAX_FILE_BYTES
from .guard import Guard, route_path
from .imported import gradio as gr

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

STYLE = Path(__file__).with_name("style.css")
ICON = Path(__file__).with_name("icon.svg")
FIRST_SCRIPT = b"""<script>{
  const frame = window.requestAnimationFrame;
  window.requestAnimationFrame = (then) => /performance\\.now\\(\\) *-.*\\/ *1e3/.test(then) ? 0 : frame(then);
}</script>"""
"""Gradio's sign of loading measures with every frame how long it has been shown, and goes on with that when it is gone,
as long as the page is open: such frames are not given. Scripts that Gradio is told of come too late for it."""


def mounted(app: FastAPI, blocks: Any) -> Callable[[], None]:
    """Mount the page at / of an application. Returns what ends its streams."""
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        max_file_size=MAX_FILE_BYTES,
        favicon_path=str(ICON),
        theme=theme(),
        css_paths=[STYLE],
    )
    # Gradio checks where files come from only in what was launched, which a mounted page never is.
    blocks.has_launched = True
    route = app.routes[-1]
    assert isinstance(route, Mount) and isinstance(route.app, Starlette)
    end_streams: Callable[[], None] = route.app.stop_event.set  # type: ignore[attr-defined]
    route.app.user_middleware.append(Middleware(WithFirstScript))
    route.app = Guard(route.app, get_upload_folder())
    return end_streams


class WithFirstScript:
    """An ASGI application whose page runs our script before its own; innermost, where nothing is compressed yet."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun: list[Message] = []

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.append(message)
                return
            if begun:
                body = message.get("body", b"")
                if b"<head>" in body:
                    message["body"] = body.replace(b"<head>", b"<head>" + FIRST_SCRIPT, 1)
                    headers = MutableHeaders(scope=begun[0])
                    headers["content-length"] = str(int(headers["content-length"]) + len(FIRST_SCRIPT))
                await send(begun.pop())
            await send(message)

        page = scope["type"] == "http" and scope["method"] == "GET" and route_path(scope) == "/"
        await self.app(scope, receive, sent if page else send)


def theme() -> Any:
    """The system's fonts: none is fetched."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "PingFang SC",
             "Microsoft YaHei", "sans-serif"]  # fmt: skip
    return gr.themes.Default(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        font=fonts,
        font_mono=["ui-monospace", "Consolas", "monospace"],
        radius_size=gr.themes.sizes.radius_md,
    ).set(block_info_text_color="*neutral_500", input_placeholder_color="*neutral_500")

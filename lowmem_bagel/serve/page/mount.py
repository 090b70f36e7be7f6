"""Gradio's application inside ours: closed to all but the page, and without anything from or to the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.utils import get_upload_folder

from ...pictures.encoded import MAX_FILE_BYTES
from .guard import Guard

if TYPE_CHECKING:
    from fastapi import FastAPI

STYLE = Path(__file__).with_name("style.css")
ICON = Path(__file__).with_name("icon.svg")


def mounted(app: FastAPI, blocks: Any) -> None:
    """Mount the page at / of an application."""
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
    route.app = Guard(route.app, get_upload_folder())  # type: ignore[attr-defined]


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

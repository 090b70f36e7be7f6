"""The web page: what it says (`texts`), what is on it (`layout`, `desk`), what its buttons do (`actions`).

Made with Gradio, which only `mount_page` and `build_page` import; `controls`, `actions`, `history` and `markup` know
nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..service import Service


def build_page(service: Service) -> Any:
    """The page of a service, as gr.Blocks.

    Raises:
        MissingExtraError: Gradio is not installed.
    """
    _check_gradio()
    from .layout import page

    return page(service)


def mount_page(app: FastAPI, service: Service) -> Callable[[], None]:
    """Put the page at / of an application; routes that the application has come first.

    Returns:
        What ends its streams, in the event loop: a page holds one open as long as it is shown.

    Raises:
        MissingExtraError: Gradio is not installed.
    """
    _check_gradio()
    from .mount import mounted

    return mounted(app, build_page(service))


def _check_gradio() -> None:
    from importlib.util import find_spec

    from ...errors import MissingExtraError

    if find_spec("gradio") is None:
        raise MissingExtraError('the page needs Gradio: pip install "lowmem-bagel[webui]"')

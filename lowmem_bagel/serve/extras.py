"""Whether the packages are there that a server is made of; they come with extras of the distribution."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from ..errors import MissingExtraError
from .options import ServeOptions

OF_SERVER = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}
"""Modules, and the packages that they come with."""
PAGE = "gradio"


def check_extras(options: ServeOptions, note: Callable[[str], None]) -> None:
    """Refuse to begin without the server's packages; without the page's, go on with the API alone, and say so.

    Raises:
        MissingExtraError: one of the server's is not installed.
    """
    for module, package in OF_SERVER.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(f'{package} is not installed: pip install "lowmem-bagel[serve]"')
    if options.share and not has_page():
        raise MissingExtraError(f'a public link needs {PAGE}: pip install "lowmem-bagel[webui]"')
    if options.page and not has_page():
        note(f'note: no web page, because {PAGE} is not installed: pip install "lowmem-bagel[webui]"')


def has_page() -> bool:
    return importlib.util.find_spec(PAGE) is not None

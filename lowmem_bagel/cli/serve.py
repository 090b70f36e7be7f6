"""`lowmem-bagel serve`: a web page and an HTTP API."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import byte_bars, notes_shown, opening
from .options import Values, takes
from .plan import load_flags
from .terminal import note, say

if TYPE_CHECKING:
    from ..settings import Option


def serve_options() -> tuple[Option, ...]:
    from ..serve.options import ServeOptions
    from ..settings import options_of

    return options_of(ServeOptions)


@takes(serving=serve_options, loading=load_flags)
def serve_command(
    serving: Values,
    loading: Values,
    path: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint or variant folder, or a file of weights; default: the demo checkpoint."),
    ] = None,
) -> None:
    """Serve a web page and an HTTP API.

    It listens at once and shows how loading goes. Ctrl+C and SIGTERM let the running request end; a second stops it.
    Contexts that repeat are kept: --context-store is auto where it is not given.
    """
    from ..checkpoint.folder import ModelFolder
    from ..demo_checkpoint import FOLDER
    from ..errors import Cancelled
    from ..planner.load_options import options_from
    from ..serve.extras import check_extras
    from ..serve.options import KEY_VARIABLE, ServeOptions
    from ..serve.service import Service
    from ..serve.sharing import share

    options = ServeOptions(**{"api_key": os.environ.get(KEY_VARIABLE, ""), **serving})
    check_extras(options, note)
    if path is None:
        note("Using the embedded demo checkpoint (coloured shapes); name another folder to serve it.")
    folder = ModelFolder.open(path or FOLDER, **opening(loading))  # opened again for loading: what is none ends here
    if "limits" in folder.reading.lines:
        note(f"note: {folder.reading.lines['limits']}")
    with notes_shown(), ExitStack() as bars:
        show = bars.enter_context(byte_bars())
        told = {"context_store": "auto", **loading, "progress": lambda done, total: show("Loading", done, total)}
        # The demo's matrices are so small that more threads would only wait for each other.
        service = Service(path or FOLDER, options_from(told), options, threads=None if path else 1)

        ports: list[int] = []

        def loaded() -> None:
            bars.close()
            note(f"{service.name} is loaded")
            if options.share:
                share(ports[0], note)

        def listening(url: str, port: int) -> None:
            say(f"Listening at {url}")
            ports.append(port)

        service.when_loaded = loaded
        from ..serve.server import serve

        serve(service, _app, listening)
    if service.failure is not None and not isinstance(service.failure, Cancelled):
        raise service.failure


def _app(service: object) -> object:
    from ..serve.app import create_app

    return create_app(service)  # type: ignore[arg-type]

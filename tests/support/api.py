"""The API on a port of this machine, in this process, as clients find it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import uvicorn
from PIL import Image

from lowmem_bagel.generation.inputs import Prepared
from lowmem_bagel.generation.results import Result, Stats
from lowmem_bagel.serve.app import create_app
from lowmem_bagel.serve.service import Service
from lowmem_bagel.settings import TextSettings
from support.serving import until


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """Serve, and give the URL."""
    config = uvicorn.Config(create_app(service), port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    (socket,) = server.servers[0].sockets
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def instant(service: Service) -> None:
    """From here on requests are checked as ever, and what they are answered with costs nothing."""
    assert service.loaded is not None
    service.loaded.pipeline.carry_out = _carried_out  # type: ignore[method-assign]


def _carried_out(prepared: Prepared, callback: object = None) -> Result:
    settings = prepared.settings
    prompt = "\n".join(term for term in prepared.terms if isinstance(term, str))
    used = {"prompt": prompt, **settings.to_json()}
    stats = Stats(torch.device("cpu"))
    if isinstance(settings, TextSettings):
        return Result(None, "an answer", settings.seed, None, [0, 1, 2], stats, used)
    used |= {"height": 16, "width": 16}
    picture = Image.new("RGB", (16, 16))
    return Result(picture, "", settings.seed, torch.zeros(1, 64), [], stats, used)

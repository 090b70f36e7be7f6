"""The process: listens at once, loads then, and leaves when it is told to, with the running request done."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from .connection import HEAD_SECONDS, Connection
from .front import Front
from .listening import listen, url_of
from .service import Service

LAST_BYTES_SECONDS = 5.0
"""For clients to take what is theirs, once the last request is done."""


ABORTED_SECONDS = 1.0
"""For what answers a client to see that its connection is gone."""


class Server(uvicorn.Server):
    """uvicorn, which knows of one service that it must not leave in the middle of a picture."""

    def __init__(self, service: Service, front: Front) -> None:
        super().__init__(
            uvicorn.Config(
                front,
                http=Connection,
                loop="asyncio",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="error",
                access_log=False,  # paths and queries are the clients' own affair
                server_header=False,
                timeout_keep_alive=HEAD_SECONDS,
            )
        )
        self.service, self.front = service, front

    def leave(self) -> None:
        """From any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets the running request end; the second ends it at its next step."""
        if self.should_exit:
            self.service.stop_running()
        self.leave()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        leaving = asyncio.create_task(super().shutdown(sockets))
        await asyncio.to_thread(self.service.close)
        self.front.end_streams()
        await asyncio.wait({leaving}, timeout=LAST_BYTES_SECONDS)
        while not leaving.done():
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            await asyncio.wait({leaving}, timeout=ABORTED_SECONDS)
            self.force_exit = True  # what does not end without its client either, ends with the loop
        await leaving
        if self.force_exit:  # uvicorn leaves this out then, and the application would end in a traceback
            await self.lifespan.shutdown()


def serve(
    service: Service,
    make_app: Callable[[Service], Any],
    listening: Callable[[str, int], None],
    server_class: type[Server] = Server,
) -> None:
    """Serve until a signal or a failure to load, which is then the service's `failure`.

    Args:
        make_app: makes the application, in a thread, while the server already answers.
        listening: told the address and the port, as soon as it can be opened in a browser.

    Raises:
        SettingError: it cannot listen there.
    """
    opened = listen(service.options)
    server = server_class(service, Front(service, make_app))
    service.when_failed = server.leave
    listening(url_of(service.options, opened), opened[0].getsockname()[1])
    try:
        server.run(opened)
    finally:
        service.close(finish=False)

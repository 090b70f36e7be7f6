"""A public link to the server, through Gradio's servers, for who asks for one."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

from ..errors import first_line

TOKEN_BYTES = 32


def share(port: int, said: Callable[[str], None]) -> threading.Thread:
    """Ask for a link, in a thread, since that takes seconds; tells the address, or why there is none."""
    thread = threading.Thread(target=lambda: said(_link(port)), name="lowmem-bagel share", daemon=True)
    thread.start()
    return thread


def _link(port: int) -> str:
    try:
        from gradio.networking import setup_tunnel

        link = setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(TOKEN_BYTES), None, None)
    except Exception as error:  # another's, over a network, and the server is none the worse for it
        return f"note: no public link: {first_line(error)}"
    return f"Shared at {link}, for whoever has the API key"

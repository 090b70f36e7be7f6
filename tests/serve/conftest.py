"""Where the page is served to a browser, and what is drawn while a test waits for something else."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from support.unhurried import pause_in_long_pictures


@pytest.fixture(scope="module", autouse=True)
def unhurried() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        pause_in_long_pictures(patch)
        yield


@pytest.fixture(scope="session")
def page_port() -> Iterator[int]:
    """For one server after the other: a browser compiles the scripts of another address anew, which takes it longer
    than most tests. Nobody else gets it meanwhile, for it is bound all the time."""
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]

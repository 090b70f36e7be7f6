"""What can be asked of the server itself, beside how its model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SettingError
from ..settings import option, options_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""What listens there is reached from this machine alone."""
KEY_VARIABLE = "LOWMEM_BAGEL_API_KEY"
SHORTEST_KEY = 16
"""Characters of an API key."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where the server listens, whom it lets in, and how much it takes on. Checked when made."""

    host: str = option("127.0.0.1", "Address to listen at; beyond this machine only with an API key")
    port: int = option(7860, "Port to listen at; 0 for any that is free", low=0, high=65535)
    share: bool = option(False, "Make a public link to the page, through Gradio's servers; needs an API key")
    api_key: str = option(
        "", f"Key that requests must bring; better given as {KEY_VARIABLE}, which no list shows", secret=True
    )
    queue: int = option(16, "Requests that may wait", low=1, high=10_000)
    time_limit: float = option(3600.0, "Seconds that one request may run", low=1.0, high=1e6)
    remote_images: bool = option(False, "Fetch pictures that requests name by an http(s) address")
    page: bool = option(True, "Serve the web page beside the API")

    def __post_init__(self) -> None:
        for known in options_of(ServeOptions):
            object.__setattr__(self, known.name, known.checked(getattr(self, known.name)))
        if self.api_key and (len(self.api_key) < SHORTEST_KEY or not self.api_key.isascii()):
            raise SettingError(f"an API key needs {SHORTEST_KEY} ASCII characters or more")
        if not self.api_key and (self.host not in LOOPBACK or self.share):
            where = "a public link" if self.share else f"listening at {self.host}"
            raise SettingError(f"{where} lets others in: set an API key as {KEY_VARIABLE} or with --api-key")

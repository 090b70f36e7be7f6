"""From a request's texts and pictures to jobs: fetched, opened and checked in a few threads, never on an event loop."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from ..errors import ImageError, SettingError
from ..pictures.callers import is_data_url, is_url
from ..pictures.opening import Picture, open_picture
from ..pictures.saving import picture_bytes
from ..values import shown
from .following import client_of
from .jobs import Job
from .remote_pictures import RemotePictures
from .service import Output, Service, check_bounds

if TYPE_CHECKING:
    from PIL import Image

Jobs = TypeVar("Jobs", Job, list[Job])
OPENING = 1
"""Pictures that are decoded at a time: one may take most of a gigabyte."""
FETCHING = 4
"""Pictures that are fetched at a time."""
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True)
class Link:
    """A picture as a URL: what it holds (data:), or where it is (http, https)."""

    url: str


Given = str | bytes | Link
"""A text, a picture's file, or a picture's URL."""


class Intake:
    """Takes requests in for a service. `remote` fetches pictures; as the service's options say where it is None."""

    def __init__(self, service: Service, remote: RemotePictures | None = None) -> None:
        self.service = service
        self._remote = remote or RemotePictures(service.options.remote_images)
        self._opening, self._fetching = CapacityLimiter(OPENING), CapacityLimiter(FETCHING)

    async def submit(
        self,
        request: Request,
        terms: Sequence[Given],
        output: Output,
        settings: Sequence[Mapping[str, Any]],
        previews: bool = False,
    ) -> list[Job]:
        """A job for each of the settings, or none at all.

        Raises:
            BusyError: as of `Service.submit`.
            UserError: the request is impossible, a picture cannot be used or may not be fetched.
        """
        client = client_of(request)

        def submit(opened: Sequence[str | Picture]) -> list[Job]:
            jobs: list[Job] = []
            try:
                for each in settings:
                    jobs.append(self.service.submit(opened, output, each, client, previews))
            except BaseException:
                cancel(self.service, jobs)
                raise
            return jobs

        return await self._with_opened(terms, submit)

    async def converse(self, request: Request, terms: Sequence[Given], settings: Mapping[str, Any]) -> Job:
        """A job for an answer in texts and pictures. Raises as `submit`."""
        client = client_of(request)

        def submit(opened: Sequence[str | Picture]) -> Job:
            return self.service.say(self.service.chat(settings), opened, {}, client)

        return await self._with_opened(terms, submit)

    async def _with_opened(self, terms: Sequence[Given], submit: Callable[[Sequence[str | Picture]], Jobs]) -> Jobs:
        """What becomes of the terms, in a thread, once they are fetched and opened."""
        self.service.ready()
        if any(isinstance(term, str) and is_data_url(term) for term in terms):
            raise SettingError("a picture stands where a text belongs; send it as a picture")
        check_bounds(list(terms))
        contents = await asyncio.gather(*map(self._content, terms))

        def opened() -> Jobs:
            return submit([
                term if isinstance(term, str) else open_picture(content)
                for term, content in zip(terms, contents, strict=True)
            ])  # fmt: skip

        pictured = any(not isinstance(term, str) for term in terms)
        # A text waits for nobody's picture.
        return await to_thread.run_sync(opened, limiter=self._opening if pictured else None)

    async def _content(self, term: Given) -> str | bytes:
        """What holds the picture, or the text itself."""
        if not isinstance(term, Link):
            return term
        if is_url(term.url):
            return term.url
        if term.url[:5].lower() != "http:" and term.url[:6].lower() != "https:":
            raise ImageError(f"{shown(term.url)} is no picture; give it as data:image/png;base64,...")
        return await to_thread.run_sync(self._remote.fetch, term.url, limiter=self._fetching)


def cancel(service: Service, jobs: Sequence[Job]) -> None:
    """End what is not over of these jobs."""
    for job in jobs:
        service.cancel(job)


async def base64_of(image: Image.Image, output_format: str, metadata: Mapping[str, Any]) -> str:
    """A picture's file in base64 ("png", "jpeg" or "webp"), with metadata as such files carry it; made in a thread."""
    return await to_thread.run_sync(
        lambda: base64.b64encode(picture_bytes(image, SUFFIXES[output_format], metadata)).decode()
    )

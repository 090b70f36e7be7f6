"""A look into files of a repository before they are fetched: a short text, the names of a file's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, DownloadError
from ..files import parse_json
from .hubs import Listing, RemoteFile, new_digest
from .web import Answer, Web

TEXT_BYTES = 16 * 2**20
"""The longest text that is looked into: an index of every tensor is far below."""


@dataclass(frozen=True)
class Remote:
    """A repository at one revision, and the way to it."""

    web: Web
    repo: str
    listing: Listing

    def json(self, name: str) -> Mapping[str, Any]:
        """The JSON object that a short file holds.

        Raises:
            DownloadError: it cannot be had, or its checksum is wrong.
            CheckpointError: it is long, or no JSON object.
        """
        file = self.listing.files[name]
        if file.size > TEXT_BYTES:
            raise CheckpointError(f"{self.repo}: {name} is too long ({file.size / 1e6:.0f} MB) for what it should hold")
        with self._open(file) as answer:
            data = answer.read(file.size)
        digest = new_digest(file)
        digest.update(data)
        if digest.hexdigest() != file.digest:
            raise DownloadError(f"{self.repo}: {name} arrived damaged; run the same command again")
        return _object(data, f"{self.repo}: {name} is no JSON object; take the model's own file")

    def tensors(self, name: str) -> tuple[str, ...]:
        """The names of a safetensors file's tensors, from its head alone.

        Raises:
            DownloadError: it cannot be had.
            CheckpointError: it is no such file.
        """
        head, wanted = bytearray(), 8
        with self._open(self.listing.files[name]) as answer:
            for chunk in answer.body:
                head += chunk
                if len(head) >= 8:
                    wanted = 8 + min(int.from_bytes(head[:8], "little"), TEXT_BYTES)
                if len(head) >= wanted:
                    break
        entries = _object(bytes(head[8:wanted]), f"{self.repo}: {name} is no safetensors file; give another repository")
        return tuple(key for key in entries if key != "__metadata__")

    @contextmanager
    def _open(self, file: RemoteFile) -> Iterator[Answer]:
        with self.web.get(file.url, self.listing.headers, whole=True) as answer:
            if answer.status != 200:
                raise DownloadError(self.listing.explain(answer, file.name))
            yield answer


def _object(data: bytes, otherwise: str) -> Mapping[str, Any]:
    try:
        values = parse_json(data)
    except ValueError as error:
        raise CheckpointError(otherwise) from error
    if not isinstance(values, dict):
        raise CheckpointError(otherwise)
    return values

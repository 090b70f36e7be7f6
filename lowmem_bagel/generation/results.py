"""What a request gives back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SettingError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Phase:
    """Time and memory of one phase; peak_bytes is what torch had allocated on the device at most, None on a CPU."""

    seconds: float
    peak_bytes: int | None


@dataclass
class Stats:
    """Phases in the order they ran: prefill, think, denoise, decode, or answer."""

    device: torch.device
    phases: dict[str, Phase] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def peak_bytes(self) -> int | None:
        peaks = [phase.peak_bytes for phase in self.phases.values() if phase.peak_bytes is not None]
        return max(peaks) if peaks else None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase, waiting for what it launched at both ends; a repeated name adds up."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.current_stream(self.device).synchronize()
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.current_stream(self.device).synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else None
        before = self.phases.get(name)
        if before is not None:
            seconds += before.seconds
            peak = None if peak is None else max(peak, before.peak_bytes or 0)
        self.phases[name] = Phase(seconds, peak)

    def to_json(self) -> dict[str, Any]:
        return {name: {"seconds": p.seconds, "peak_bytes": p.peak_bytes} for name, p in self.phases.items()}


@dataclass(frozen=True)
class Result:
    """A picture, an answer, or a picture with the plan that was thought out for it.

    Attributes:
        image: the picture, or the first of several frames; None for an answer.
        text: the answer, or the plan; empty where there is neither.
        seed: the seed used, also where none was given.
        latent: float32 [tokens, latent_values] on the CPU, frame after frame; None for an answer.
        token_ids: generated ids, im_start first.
        stats: seconds and peak memory of each phase.
        settings: every setting used, and the prompt.
        more: frames after the first.
    """

    image: Image.Image | None
    text: str
    seed: int
    latent: Tensor | None
    token_ids: list[int]
    stats: Stats
    settings: Mapping[str, Any]
    more: tuple[Image.Image, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        """All frames in their order; the picture alone where there is one, and none of an answer."""
        return [] if self.image is None else [self.image, *self.more]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture, as PNG, JPEG or WebP by the suffix; it carries its prompt, seed and settings.

        Of several frames a WebP shows one after the other, and the others show all on one sheet.

        Raises:
            SettingError: the result has no picture.
            OutputError: another suffix, or the file cannot be written.
        """
        from ..pictures.saving import save_picture

        if self.image is None:
            raise SettingError("this result is an answer and has no picture to save")
        return save_picture(self.image, path, self.settings, self.more)

    def save_frames(self, path: str | os.PathLike[str], fps: float = 8.0) -> list[Path]:
        """Write each frame, a sheet of all, an animated WebP and, with the extra `video`, an MP4: out-01.png and so on,
        out-sheet.png, out.webp and out.mp4 for out.png.

        Raises:
            SettingError, OutputError: as of `save`.
        """
        from ..pictures.frame_files import save_frames

        if self.image is None:
            raise SettingError("this result is an answer and has no picture to save")
        return save_frames(self.images, path, self.settings, fps)

"""The model of a batch: loaded for what its jobs ask, here or in another process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .jobs import Job

if TYPE_CHECKING:
    from ..checkpoint.folder import ModelFolder
    from ..pipeline import BagelPipeline


@dataclass(frozen=True)
class Recipe:
    """How a pipeline is made; plain data, so that another process can.

    Attributes:
        path: of the model; None for the embedded one.
        options: keywords of `from_pretrained`.
        threads: of the processor, for arithmetic; None for PyTorch's choice.
        sharers: workers that share the machine's memory, which each has its part of.
    """

    path: Path | None
    options: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    sharers: int = 1

    def load(self, progress: Callable[[int, int], None] | None = None) -> BagelPipeline:
        """The pipeline.

        Raises:
            UserError: as `BagelPipeline.from_pretrained`.
        """
        import torch

        from ..demo_checkpoint import FOLDER
        from ..pipeline import BagelPipeline

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        options = {**self.options, **self._part()}
        return BagelPipeline.from_pretrained(self.path or FOLDER, progress=progress, **options)

    def _part(self) -> dict[str, int]:
        from ..hardware.host import memory
        from ..units import parse_bytes

        if self.sharers == 1:
            return {}
        limit = parse_bytes(self.options.get("max_ram"), "max_ram") or memory().available
        return {"max_ram": limit // self.sharers}


def told_by(jobs: Sequence[Job]) -> dict[str, Any]:
    """The options of loading that jobs tell: what most of them do comes first, and the largest picture counts."""
    from ..settings import LoadOptions

    tasks = [task for task, _ in Counter(job.task for job in jobs).most_common()]
    drawn = [job for job in jobs if job.task != "ask"]
    sizes = [job.size or LoadOptions().size for job in drawn]
    told: dict[str, Any] = {"tasks": tuple(tasks), "context_store": "auto"}
    if drawn:
        told["step_cache"] = Counter(job.step_cache for job in drawn).most_common(1)[0][0]
        longest = max(drawn, key=lambda job: job.frames)
        told |= {"frames": longest.frames, "frame_mode": longest.frame_mode}
        told["size"] = (max(height for height, _ in sizes), max(width for _, width in sizes))
    return told


def named(folder: ModelFolder) -> str:
    """Which model it is, wherever it lies."""
    lines = folder.reading.lines
    more = [lines[topic] for topic in ("weights", "adapters") if topic in lines]
    return "; ".join([f"{folder.path.resolve().name} ({folder.format})", *more])

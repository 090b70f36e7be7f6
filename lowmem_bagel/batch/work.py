"""One job carried out, from the bytes of its pictures to those of its own; what it fails by is its result."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ImageError, UserError, first_line
from ..pictures.callers import content_of, is_data_url
from ..pictures.encoded import MAX_FILE_BYTES
from ..pictures.opening import open_picture, opened
from .jobs import Job
from .results import Result

if TYPE_CHECKING:
    from ..generation.results import Result as Made
    from ..pipeline import BagelPipeline


@dataclass(frozen=True)
class Work:
    """A job and all that it takes: its pictures, each as a name and what is in it."""

    job: Job
    model: str
    pictures: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Outcome:
    """What became of it, and what is in its file."""

    result: Result
    content: bytes = b""


def fetched(job: Job, model: str) -> Work:
    """With the pictures read, where they are.

    Raises:
        ImageError: one cannot be read.
    """
    return Work(job, model, tuple(map(_content, job.pictures)))


def _content(picture: str) -> tuple[str, bytes]:
    if is_data_url(picture):
        return "the picture", bytes(content_of(picture, "the picture"))
    with opened(Path(picture)) as source:
        content = source.file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ImageError(f"{picture}: too large; give one of {MAX_FILE_BYTES >> 20} MB or fewer")
    return picture, content


def failed(job: Job, model: str, why: str, seconds: float = 0.0, traceback: str = "") -> Outcome:
    """What becomes of a job that cannot be done."""
    result = Result(
        id=job.id, line=job.line, digest=job.digest, model=model, task=job.task, state="failed", why=why,
        seconds=round(seconds, 3), settings=dict(job.settings), traceback=traceback,
    )  # fmt: skip
    return Outcome(result)


def carried_out(pipeline: BagelPipeline, work: Work, callback: Callable[[Any], object] | None = None) -> Outcome:
    """A job done, or why not. Only what ends the program is raised."""
    job, begun = work.job, time.perf_counter()
    try:
        with _warnings_kept() as notes:
            made = _made(pipeline, work, callback)
        content = _encoded(made, job.output)
    except UserError as error:
        return failed(job, work.model, str(error), time.perf_counter() - begun)
    except MemoryError:
        return failed(job, work.model, "the machine's memory ran out; ask for a smaller picture")
    except Exception as error:
        why = f"a fault of the program: {type(error).__name__}: {first_line(error)}"
        return failed(job, work.model, why, time.perf_counter() - begun, traceback.format_exc())
    done = Result(
        id=job.id, line=job.line, digest=job.digest, model=work.model, task=job.task, state="done",
        files=(job.output,) if job.output else (), text=made.text, seconds=round(time.perf_counter() - begun, 3),
        seed=made.seed, settings=dict(made.settings), notes=tuple(notes),
    )  # fmt: skip
    return Outcome(done, content)


def _made(pipeline: BagelPipeline, work: Work, callback: Callable[[Any], object] | None) -> Made:
    job = work.job
    terms = [*(open_picture(content, name) for name, content in work.pictures), job.prompt]
    output: Any = "text" if job.task == "ask" else "image"
    return pipeline.run(terms, output=output, callback=callback, **job.settings)


def _encoded(made: Made, output: str) -> bytes:
    from ..pictures.saving import file_bytes

    return b"" if made.image is None else file_bytes(made.image, Path(output).suffix.lower(), made.settings, made.more)


@contextmanager
def _warnings_kept() -> Iterator[list[str]]:
    """What the pipeline warns of meanwhile; there once it is over."""
    kept: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        yield kept
    kept += [str(warning.message) for warning in found if issubclass(warning.category, UserWarning)]


def check_card(pipeline: BagelPipeline) -> None:
    """After a fault: raises what PyTorch does where the card will answer to nothing more in this process."""
    import torch

    device = pipeline.model.bagel.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What the commands share: loading a pipeline with a bar, step bars, tables and JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ..folder import ModelFolder
    from ..pipeline import BagelPipeline
    from ..plan import Task

ModelOption = Annotated[
    Path | None, typer.Option("--model", "-m", help="Checkpoint or variant folder; default: the demo checkpoint.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, or a CUDA device such as cuda:0.")]
DtypeOption = Annotated[str, typer.Option(help="Arithmetic: auto, float32, bfloat16 or float16.")]
BackendOption = Annotated[str, typer.Option(help="What runs quantised linears: auto, native, bitsandbytes, quanto...")]
AttentionOption = Annotated[str, typer.Option(help="Attention backend, or auto.")]
OffloadOption = Annotated[
    str, typer.Option(help="What moves weights that do not stay on the GPU: native, or accelerate to compare with it.")
]
MaxVramOption = Annotated[str | None, typer.Option(help="Limit on GPU memory, such as 8GB.")]
MaxRamOption = Annotated[str | None, typer.Option(help="Limit on host memory, such as 16GB.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed; default: a random one, which is reported.")]


def messages() -> Console:
    """Where notes and bars go: stderr, so that stdout stays clean for answers and JSON."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


@contextmanager
def notes_shown(console: Console) -> Iterator[None]:
    """Warnings as one line each."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: console.print(f"note: {message}", markup=False)
        yield


def load_pipeline(
    model: Path | None,
    tasks: tuple[Task, ...],
    console: Console,
    check: Callable[[ModelFolder], object] = lambda folder: None,
    **options: Any,
) -> BagelPipeline:
    """Load a folder, or the demo checkpoint, with a bar of bytes.

    `check` gets the opened folder before gigabytes are read, to refuse what cannot be done with it.
    """
    from ..demo_checkpoint import FOLDER
    from ..folder import ModelFolder

    if model is None:
        import torch

        console.print("Using the embedded demo checkpoint (coloured shapes); --model chooses another.")
        # Its matrices are so small that more threads would only wait for each other, the longer the busier the machine.
        torch.set_num_threads(1)
    folder = ModelFolder.open(model or FOLDER)
    check(folder)
    from ..pipeline import BagelPipeline

    with _byte_bar(console, "Loading") as progress:
        return BagelPipeline.from_folder(folder, tasks=tasks, progress=progress, **options)


@contextmanager
def _byte_bar(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def step_bar(console: Console) -> Iterator[Callable[[Any], None]]:
    """A callback for a pipeline's requests that shows steps and tokens, with the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _EventBar(bar)


class _EventBar:
    """One line for tokens and one for steps, each made when its first event comes."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, Any] = {}

    def __call__(self, event: Any) -> None:
        name, done = ("Drawing", event.index + 1) if hasattr(event, "x_t") else ("Writing", event.index)
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=event.total)
        self.bar.update(self.tasks[name], completed=done)


def check_output(path: Path) -> Path:
    """Refuse an output that cannot be written before any work is done; leaves nothing behind.

    Raises:
        OutputError: its folder is missing or not writable, it is something else than a file, or not called PNG.
    """
    import os
    import tempfile

    from ..errors import OutputError

    path = path.expanduser()
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder; name a file, such as {path / 'out.png'}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(f"{path} is not an ordinary file; choose another place with -o")
    if path.suffix.lower() not in ("", ".png"):
        raise OutputError(f"{path}: pictures are saved as PNG; call it {path.with_suffix('.png').name}")
    folder = path.absolute().parent
    if not os.path.isdir(folder):
        raise OutputError(f"no such folder: {folder}; make it, or choose another place with -o")
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # fails for a name that is too long
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror}); choose another place with -o") from error
    return path

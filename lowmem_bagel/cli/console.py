"""What the commands share: loading a pipeline with a bar, step bars, tables and JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ..checkpoint.folder import ModelFolder
    from ..pipeline import BagelPipeline
    from ..planner.estimate import PlanInputs
    from ..planner.memory import Load
    from ..planner.plan import Plan, Task

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


class Asked(NamedTuple):
    """One request as the planner counts it, and in words."""

    load: Load
    words: str


ANNOUNCED_SECONDS = 60
"""A request that a card is expected to finish sooner is not announced."""
BYTES_A_TOKEN = 4
"""Of English, which is near enough for an estimate."""


def load_pipeline(
    model: Path | None,
    tasks: tuple[Task, ...],
    console: Console,
    check: Callable[[ModelFolder], Asked | None] = lambda folder: None,
    **options: Any,
) -> BagelPipeline:
    """Load a folder, or the demo checkpoint, with a bar of bytes.

    `check` gets the opened folder before gigabytes are read, to refuse what cannot be done with it. How long the
    request that it returns will take is said then too, where that may be long: it is the time to think better of it.
    """
    from ..checkpoint.folder import ModelFolder
    from ..demo_checkpoint import FOLDER

    if model is None:
        import torch

        console.print(
            "Using the embedded demo checkpoint (coloured shapes); generate, edit and ask take another with --model."
        )
        # Its matrices are so small that more threads would only wait for each other, the longer the busier the machine.
        torch.set_num_threads(1)
    folder = ModelFolder.open(model or FOLDER)
    asked = check(folder)
    if asked is not None and asked.load.picture_tokens:
        rows, columns = asked.load.grid
        options["size"] = (rows * folder.config.token_pixels, columns * folder.config.token_pixels)
    from ..pipeline import BagelPipeline
    from ..planner.estimate import plan_inputs
    from ..planner.solve import make_plan

    inputs = plan_inputs(folder, tasks=tasks, **{name: options[name] for name in options if name != "offload"})
    if asked is not None and options.get("offload") != "accelerate":  # whose time is not predicted
        line = announcement(make_plan(*inputs), inputs, asked)
        if line is not None:
            console.print(line, markup=False)
    options["profile"] = inputs.profile  # a machine is probed once
    with _byte_bar(console, "Loading") as progress:
        return BagelPipeline.from_folder(folder, tasks=tasks, progress=progress, **options)


def announcement(plan: Plan, inputs: PlanInputs, asked: Asked) -> str | None:
    """How long a request is expected to take, in one line; None on a card that is quick about it."""
    from ..planner.estimate import predicted_seconds

    seconds = predicted_seconds(plan, inputs, asked.load)
    text, rest = seconds["text"], sum(seconds.values()) - seconds["text"]
    on_card = plan.device != "cpu"
    if on_card and text + rest < ANNOUNCED_SECONDS:
        return None
    where = inputs.profile.device_name if on_card else "this processor"
    # How long a text becomes, and what such a cache skips, is known only afterwards.
    most = "at most " if asked.load.step_cache.depends_on_picture else ""
    line = f"note: {most}about {duration(rest)} on {where}"
    if plan.tasks == ("ask",):
        rate = asked.load.new_tokens / text
        shown = f"{rate:.0f}" if rate > 9.95 else f"{rate:.2g}"
        return f"{line} until the answer begins, then {shown} tokens a second, {asked.words}"
    plan_first = f", and at most {duration(text)} for the plan before it" if text else ""
    return f"{line}, {asked.words}{plan_first}"


def text_tokens(prompt: str) -> int:
    """About how many tokens a prompt has with its markers, before the tokenizer is loaded."""
    return 2 + -(-len(prompt.encode()) // BYTES_A_TOKEN)


def duration(seconds: float) -> str:
    """Seconds for people: "2.5 s", "40 s", "12 min", "3.1 h"; none are so few that they are nothing."""
    if seconds < 120:
        return f"{max(seconds, 0.1):.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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

"""What the commands share: loading a pipeline with a bar, step bars, and outputs that are checked beforehand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import printable
from ..timeline import Timeline
from .terminal import note

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from ..checkpoint.folder import ModelFolder
    from ..pipeline import BagelPipeline
    from ..planner.estimate import PlanInputs
    from ..planner.memory import Workload
    from ..planner.plan import Plan
    from ..settings import Option
    from .options import Values

ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", help="Checkpoint or variant folder, or a file of weights; default: the demo checkpoint."
    ),
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="Which weights of a folder that holds several: their file.")
]
BaseOption = Annotated[
    Path | None, typer.Option("--base", help="Checkpoint folder that completes what the folder lacks.")
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option("--lora", help="LoRA adapter to add, as FOLDER or FOLDER:WEIGHT; again for one more."),
]
ClipOption = Annotated[
    int, typer.Option("--clip-count", help="Pictures taken of a video or a folder, evenly spaced.", min=1)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def load_flags() -> tuple[Option, ...]:
    """Options of the commands that load a model for one request."""
    from ..planner.load_options import load_options

    return load_options()


@contextmanager
def notes_shown() -> Iterator[None]:
    """Warnings as one line each."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: note(f"note: {message}")
        yield


class Asked(NamedTuple):
    """One request as the planner counts it, and in words."""

    workload: Workload
    words: str


ANNOUNCED_SECONDS = 60
"""A request that a card is expected to finish sooner is not announced."""
ROOM = 8 << 20
"""Bytes that must be free for an output: twice the largest picture's pixels."""
MAX_LABEL = 80
"""Characters of what a bar shows of the work."""
BYTES_A_TOKEN = 4
"""Of English, which is near enough for an estimate."""


def load_pipeline(
    model: Path | None,
    loading: Values,
    check: Callable[[ModelFolder], Asked | Values | None],
    timeline: Timeline | None = None,
    frames: bool = False,
) -> BagelPipeline:
    """Load a folder, or a demo checkpoint, with a bar of bytes; frames: the one that has learnt them.

    `check` gets the opened folder before gigabytes are read, to refuse what cannot be done with it, and returns what is
    planned for: a request, or options of loading. How long the request will take is said then too, where that may be
    long: it is the time to think better of it. `timeline` is gone on with.
    """
    from ..checkpoint.folder import ModelFolder
    from ..demo_checkpoint import FOLDER, FRAMES
    from ..planner.load_options import options_from

    if model is None:
        import torch

        what = "of frames (coloured shapes that move)" if frames else "(coloured shapes)"
        note(f"Using the embedded demo checkpoint {what}; take another with --model.")
        # Its matrices are so small that more threads would only wait for each other, the longer the busier the machine.
        torch.set_num_threads(1)
    timeline = timeline or Timeline()
    with timeline.phase("opening"):
        folder = ModelFolder.open(model or (FRAMES if frames else FOLDER), **opening(loading))
        if "limits" in folder.reading.lines:
            note(f"note: {folder.reading.lines['limits']}")
        asked = check(folder)
    planned = told(asked.workload, folder) if isinstance(asked, Asked) else asked or {}
    options = options_from({**loading, **planned})
    with timeline.phase("imports"):
        from ..pipeline import BagelPipeline
        from ..planner.estimate import plan_from, plan_inputs
        from ..runtime.loader import load_model
    with timeline.phase("probing"):
        inputs = plan_inputs(folder, options)
    with timeline.phase("planning"):
        plan = plan_from(inputs, options)
    if isinstance(asked, Asked) and plan.prediction is not None:
        line = announcement(plan, inputs, asked)
        if line is not None:
            note(line)
    with byte_bars() as show:
        loaded = load_model(folder, plan, lambda done, total: show("Loading", done, total), timeline)
    return BagelPipeline(loaded, inputs)


def opening(loading: Values) -> dict[str, Any]:
    """Those of the options of loading that say how a folder is opened."""
    return {name: loading[name] for name in ("weights", "base", "lora") if name in loading}


def told(workload: Workload, folder: ModelFolder) -> dict[str, Any]:
    """The options of loading that a request tells."""
    size: dict[str, Any] = {}
    if workload.picture_tokens:
        rows, columns = workload.grid
        size = {"size": (rows * folder.config.token_pixels, columns * folder.config.token_pixels)}
        size |= {
            "frames": max(workload.frames, workload.turns),
            "frame_mode": "turn" if workload.turns > 1 else "together",
        }
    pictures = max(workload.given, 1)
    return {"tasks": (workload.task,), "step_cache": workload.step_cache.name, "pictures": pictures, **size}


def announcement(plan: Plan, inputs: PlanInputs, asked: Asked) -> str | None:
    """How long a request is expected to take, in one line; None on a card that is quick about it."""
    from ..planner.estimate import predicted_seconds

    seconds = predicted_seconds(plan, inputs, asked.workload)
    text, rest = seconds["text"], sum(seconds.values()) - seconds["text"]
    on_card = plan.device != "cpu"
    if on_card and text + rest < ANNOUNCED_SECONDS:
        return None
    where = inputs.profile.device_name if on_card else "this processor"
    # How long a text becomes, and what such a cache skips, is known only afterwards.
    most = "at most " if asked.workload.step_cache.depends_on_picture else ""
    line = f"note: {most}about {duration(rest)} on {where}"
    if plan.tasks == ("ask",):
        rate = asked.workload.new_tokens / text
        shown = f"{rate:.0f}" if rate > 9.95 else f"{rate:.2g}"
        return f"{line} until the answer begins, then {shown} tokens a second, {asked.words}"
    plan_first = f", and at most {duration(text)} for the plan before it" if text else ""
    return f"{line}, {asked.words}{plan_first}"


def typed(text: str) -> str:
    """A prompt as it was typed: where the locale has ASCII alone, Python hands on the bytes of other characters."""
    import os

    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        with suppress(UnicodeError):
            return os.fsencode(text).decode()
        return text


def text_tokens(prompt: str) -> int:
    """About how many tokens a prompt has with its markers, before the tokenizer is loaded."""
    return 2 + -(-len(prompt.encode()) // BYTES_A_TOKEN)


def duration(seconds: float) -> str:
    """Seconds for people: "2.5 s", "40 s", "12 min", "3.1 h"; none are so few that they are nothing."""
    if seconds < 120:
        return f"{max(seconds, 0.1):.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def byte_bars(transient: bool = True) -> Iterator[Callable[..., None]]:
    """Bars with bytes, speed and time left, by `show(label, done, total, now="")`; `now` is what is worked on."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _bars(transient, *columns, TextColumn("{task.fields[now]}", markup=False)) as show:
        yield show


@contextmanager
def step_bar() -> Iterator[Callable[[Any], None]]:
    """A callback for a pipeline's requests that shows tokens and steps, with the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    def tell(event: Any) -> None:
        label, done = ("Drawing", event.index + 1) if hasattr(event, "x_t") else ("Writing", event.index)
        show(label, done, event.total)

    with _bars(True, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as show:
        yield tell


@contextmanager
def job_bars() -> Iterator[Callable[..., None]]:
    """Bars with counts, by `show(label, done, total, now="")`; `now` is what is worked on."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    with _bars(True, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}", markup=False)) as show:
        yield show


@contextmanager
def _bars(transient: bool, *columns: ProgressColumn) -> Iterator[Callable[..., None]]:
    """One bar a label, which appears when it is first shown. Nothing is drawn where it would be no terminal."""
    from rich.console import Console
    from rich.progress import Progress, TaskID, TextColumn

    tasks: dict[str, TaskID] = {}

    def show(label: str, done: int, total: int, now: str = "") -> None:
        label, now = printable(label, MAX_LABEL), printable(now, MAX_LABEL)
        if label not in tasks:
            # What an earlier run has done is no measure of this run's speed, so the bar begins with it.
            tasks[label] = bars.add_task(label, total=total, completed=done, now=now)
        bars.update(tasks[label], completed=done, total=total, now=now)

    console = Console(stderr=True)
    off = not console.is_terminal or console.is_dumb_terminal
    label = TextColumn("{task.description}", markup=False)
    with Progress(label, *columns, console=console, transient=transient, disable=off) as bars:
        yield show


def check_output(path: Path, prompt: str = "") -> Path:
    """Refuse a picture that cannot be saved before any work is done; leaves nothing behind.

    Raises:
        OutputError: as of `check_place`, or its suffix is no format's, or the format has no room for the prompt.
    """
    from ..pictures.saving import check_room, check_suffix

    path = check_place(path)
    check_suffix(path)
    check_room(path, prompt)
    return path


def check_place(path: Path) -> Path:
    """Refuse a file that cannot be written; leaves nothing behind. Gives the path with the home that `~` stands for.

    Raises:
        OutputError: its folder is missing, not writable or on a full disk, or it is no ordinary file.
    """
    import os
    import shutil
    import tempfile

    from ..errors import OutputError
    from ..files import expanded
    from ..units import format_bytes

    path = expanded(path)
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder; name a file, such as {path / 'out.png'}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(f"{path} is not an ordinary file; choose another place with -o")
    folder = path.absolute().parent
    if not os.path.isdir(folder):
        raise OutputError(f"no such folder: {folder}; make it, or choose another place with -o")
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # fails for a name that is too long
        tempfile.TemporaryFile(dir=folder).close()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror}); choose another place with -o") from error
    if free < ROOM:
        raise OutputError(
            f"cannot write {path}: {format_bytes(free)} are free on its disk, and {format_bytes(ROOM)} are needed; "
            "free some space, or choose another place with -o"
        )
    return path

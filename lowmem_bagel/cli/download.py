"""`lowmem-bagel download`: a checkpoint from Hugging Face, a mirror of it, or ModelScope."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from ..hub.download import DownloadResult, Progress

DEFAULT_REPO = "ByteDance-Seed/BAGEL-7B-MoT"


class SourceName(StrEnum):
    """Hubs to download from."""

    huggingface = "huggingface"
    modelscope = "modelscope"


def download_command(
    repo: Annotated[str, typer.Argument(help="Repository, as owner/name.")] = DEFAULT_REPO,
    out: Annotated[Path | None, typer.Argument(help="Folder to fill; default: the repository's last name.")] = None,
    source: Annotated[SourceName, typer.Option(help="Hub to download from.")] = SourceName.huggingface,
    endpoint: Annotated[str | None, typer.Option(help="Address of a mirror; default: HF_ENDPOINT or the hub.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Files fetched at a time.")] = 4,
    file: Annotated[list[str] | None, typer.Option(help="Only this file; may be given several times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Download a checkpoint (29 GB for BAGEL-7B-MoT); the same command again resumes it."""
    from rich.console import Console

    from ..hub.download import download

    messages = Console(stderr=True)
    try:
        with _bars(messages) as show:
            result = download(
                repo,
                out,
                source=source.value,
                endpoint=endpoint,
                revision=revision,
                workers=workers,
                files=file or (),
                on_progress=show,
            )
    except KeyboardInterrupt:
        messages.print("Interrupted; the same command resumes the download.")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(_record(result), indent=2))
    else:
        typer.echo(_summary(result, whole=not file))


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[Progress], None]]:
    """One bar a file, with bytes, speed and time left; another appears where a file is checked."""
    from rich import progress as bars

    with bars.Progress(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        console=console,
    ) as display:
        tasks: dict[tuple[str, str], bars.TaskID] = {}

        def show(progress: Progress) -> None:
            key = progress.name, progress.phase
            if key not in tasks:
                label = progress.name if progress.phase == "download" else f"checking {progress.name}"
                # Bytes of an earlier run are no measure of this run's speed, so the bar begins with them.
                tasks[key] = display.add_task(label, total=progress.total, completed=progress.done)
            display.update(tasks[key], completed=progress.done)

        yield show


def _record(result: DownloadResult) -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(result), "folder": str(result.folder), "received": result.received}


def _summary(result: DownloadResult, whole: bool) -> str:
    """What was done, what was put right on the way, and the next command."""
    import shlex

    kept = sum(file.action == "present" for file in result.files)
    lines = [
        f"{result.folder}: {len(result.files)} files of {result.repo} at {result.revision}, sizes and checksums right; "
        f"{result.received / 1e6:.1f} MB received in {result.seconds:.1f} s, {kept} files were there already"
    ]
    for file in result.files:
        if file.action == "replaced":
            lines.append(f"  {file.name} did not have the published content and was replaced")
        if file.damaged:
            lines.append(f"  {file.name} arrived damaged and was fetched again")
    if whole:
        folder = shlex.quote(str(result.folder))
        lines += [
            "Next:",
            f"  lowmem-bagel inspect {folder}",
            f'  lowmem-bagel generate "a red circle left of a blue square" --model {folder}',
        ]
    return "\n".join(lines)

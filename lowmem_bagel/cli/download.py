"""`lowmem-bagel download`: a checkpoint from Hugging Face, a mirror of it, or ModelScope."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import byte_bars
from .terminal import note, print_json, quoted, say

if TYPE_CHECKING:
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
    from ..hub.download import download

    try:
        with byte_bars(transient=False) as show:
            result = download(
                repo,
                out,
                source=source.value,
                endpoint=endpoint,
                revision=revision,
                workers=workers,
                files=file or (),
                on_progress=lambda progress: show(_label(progress), progress.done, progress.total),
            )
    except KeyboardInterrupt:
        note("Interrupted; the same command resumes the download.")
        raise typer.Exit(130) from None
    if as_json:
        print_json(_record(result))
    else:
        say(_summary(result, whole=not file))


def _label(progress: Progress) -> str:
    """One bar a file; another appears where a file is checked."""
    return progress.name if progress.phase == "download" else f"checking {progress.name}"


def _record(result: DownloadResult) -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(result), "folder": str(result.folder), "received": result.received}


def _summary(result: DownloadResult, whole: bool) -> str:
    """What was done, what was put right on the way, and the next command."""
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
        folder = quoted(result.folder)
        lines += [
            "Next:",
            f"  lowmem-bagel inspect {folder}",
            f'  lowmem-bagel generate "a red circle left of a blue square" --model {folder}',
        ]
    return "\n".join(lines)

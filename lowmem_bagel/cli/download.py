"""`lowmem-bagel download`: a checkpoint from Hugging Face, a mirror of it, or ModelScope."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import byte_bars
from .terminal import note, print_json, print_table, quoted, say

if TYPE_CHECKING:
    from ..hub.download import DownloadResult, Progress

LISTED = 8
"""Files that are named one by one."""
DEFAULT_REPO = "ByteDance-Seed/BAGEL-7B-MoT"


class SourceName(StrEnum):
    """Hubs to download from."""

    huggingface = "huggingface"
    modelscope = "modelscope"


def download_command(
    repo: Annotated[
        str, typer.Argument(help="Repository, as owner/name[/folder][@revision], or a short name of --list.")
    ] = DEFAULT_REPO,
    out: Annotated[Path | None, typer.Argument(help="Folder to fill; default: the repository's last name.")] = None,
    source: Annotated[SourceName, typer.Option(help="Hub to download from.")] = SourceName.huggingface,
    endpoint: Annotated[str | None, typer.Option(help="Address of a mirror; default: HF_ENDPOINT or the hub.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    subfolder: Annotated[str, typer.Option(help="Folder in the repository that holds the checkpoint.")] = "",
    weights: Annotated[
        str | None, typer.Option(help="Which weights, by their file; default: those read first.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="What completes configs, tokenizer and VAE: a repository, a folder or none; default: BAGEL's."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Files fetched at a time.")] = 4,
    file: Annotated[list[str] | None, typer.Option(help="Only this file; may be given several times.")] = None,
    show_known: Annotated[bool, typer.Option("--list", help="List known models by short name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Download a checkpoint; the same command again resumes it.

    BAGEL-7B-MoT is 29 GB.
    """
    if show_known:
        return _show_known(as_json)
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
                subfolder=subfolder,
                weights=weights,
                base=base,
                on_progress=lambda progress: show(_label(progress), progress.done, progress.total),
            )
    except KeyboardInterrupt:
        note("Interrupted; the same command resumes the download.")
        raise typer.Exit(130) from None
    if as_json:
        print_json(_record(result))
    else:
        say(_summary(result, whole=not file))
    return None


def _show_known(as_json: bool) -> None:
    from dataclasses import asdict

    from ..hub.known import KNOWN

    if as_json:
        return print_json({name: asdict(known) for name, known in KNOWN.items()})
    rows = [("name", "repository", "weights", "license", "for")]
    for name, known in KNOWN.items():
        use = f"{known.use} (completed from the base)" if known.needs_base else known.use
        rows.append((name, known.place("huggingface"), known.weights, known.license, use))
    return print_table(rows)


def _label(progress: Progress) -> str:
    """One bar a file; another appears where a file is checked."""
    return progress.name if progress.phase == "download" else f"checking {progress.name}"


def _record(result: DownloadResult) -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(result), "folder": str(result.folder), "received": result.received}


def _which(result: DownloadResult) -> str:
    """The option that says which weights are meant, where the folder holds others that are read before them."""
    from ..checkpoint.weight_sets import plain_sets

    first = next(iter(plain_sets({path.name for path in result.folder.iterdir()})), None)
    return "" if first is None or set(first.files) <= {*result.weights} else f" --weights {quoted(result.weights[0])}"


def _summary(result: DownloadResult, whole: bool) -> str:
    """What was done, what was put right on the way, and the next command."""
    kept = sum(file.action == "present" for file in result.files)
    lines = [
        f"{result.folder}: {len(result.files)} files of {result.repo} at {result.revision}, sizes and checksums right; "
        f"{result.received / 1e6:.1f} MB received in {result.seconds:.1f} s, {kept} files were there already"
    ]
    if len(result.weights) < LISTED and result.weights:
        lines.append(f"  weights: {', '.join(result.weights)}")
    if result.completed:
        lines.append(f"  from {result.base}: {', '.join(result.completed)}")
    if result.lacking:
        lines.append(f"  lacking: {', '.join(result.lacking)}; --base FOLDER completes it where it is opened")
    if result.left:
        more = f" and {len(result.left) - LISTED} more" if len(result.left) > LISTED else ""
        lines.append(f"  left there: {', '.join(result.left[:LISTED])}{more}; --weights or --file fetches others")
    for file in result.files:
        if file.action == "replaced":
            lines.append(f"  {file.name} did not have the published content and was replaced")
        if file.damaged:
            lines.append(f"  {file.name} arrived damaged and was fetched again")
    if whole:
        folder = f"{quoted(result.folder)}{_which(result)}"
        lines += [
            "Next:",
            f"  lowmem-bagel inspect {folder}",
            f'  lowmem-bagel generate "a red circle left of a blue square" --model {folder}',
        ]
    return "\n".join(lines)

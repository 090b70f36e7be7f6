"""`lowmem-bagel convert` and `lowmem-bagel verify`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError, SettingError

if TYPE_CHECKING:
    from ..checkpoint.manifest import Manifest

MAX_SHOWN_PROBLEMS = 20
Show = Callable[[int, int, str], None]


class KeptExperts(StrEnum):
    """What the variant can do afterwards."""

    all = "all"
    und = "und"


def convert_command(
    source: Annotated[Path, typer.Argument(help="Folder of the bf16 checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[str, typer.Option(help="Format: dfloat11, int8, fp16 or nf4.")],
    experts: Annotated[
        KeptExperts, typer.Option(help="'und' leaves out all that draws: such a variant only answers.")
    ] = KeptExperts.all,
    rotate: Annotated[bool, typer.Option("--rotate", help="int8: rotate inputs where that lowers the error.")] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="int8: quantise embedding and lm_head too.")] = False,
    activations: Annotated[
        Path | None, typer.Option(help="int8 --rotate: safetensors file of activations to measure on.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new one is complete.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work instead of resuming.")] = False,
    shard_size: Annotated[str, typer.Option(help="Source bytes per output file, as 1GB or 512MB.")] = "1GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert a checkpoint to a smaller format. The same command again resumes an interrupted conversion."""
    from rich.console import Console

    messages = Console(stderr=True)
    given = {"rotate": rotate, "embeddings": embeddings, "activations": activations and str(activations)}
    convert = _tool("convert")
    try:
        with _bar(messages, f"{to}") as show:
            manifest = convert(
                source,
                out,
                to,
                {name: value for name, value in given.items() if value},
                experts=("und",) if experts is KeptExperts.und else ("und", "gen"),
                overwrite=overwrite,
                restart=restart,
                shard_bytes=_bytes(shard_size),
                report=lambda progress: show(progress.done, progress.total, progress.now),
            )
    except KeyboardInterrupt:
        messages.print("Interrupted; the same command resumes the conversion.")
        raise typer.Exit(130) from None
    record = _record(out, manifest)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        typer.echo(
            f"{out}: {record['gigabytes']:.2f} GB in {len(manifest.shards)} files"
            f"\nNext: lowmem-bagel inspect {_quoted(out)}"
        )


def verify_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a variant.")],
    source: Annotated[Path | None, typer.Option(help="Compare with the checkpoint that it was made from.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check a variant's checksums; with --source, that it is exact, or within the errors that it records."""
    from dataclasses import asdict

    from rich.console import Console

    from ..checkpoint.verify import verify

    with _bar(Console(stderr=True), "verify") as show:
        result = verify(folder, source, show)
    if as_json:
        typer.echo(json.dumps({**asdict(result), "passed": result.passed}, indent=2))
    else:
        for problem in result.problems[:MAX_SHOWN_PROBLEMS]:
            typer.echo(problem)
    if not result.passed:
        raise CheckpointError(f"{folder}: {len(result.problems)} problems; convert or download it again")
    if not as_json:
        typer.echo(f"{folder}: {result.files} files and {result.tensors} tensors are as they were written")
        if source is not None:
            typer.echo(
                f"{result.exact} of {result.compared} tensors have the source's bits; "
                f"largest relative error of the others {result.largest_error:.2e}"
            )


@contextmanager
def _bar(messages: Any, title: str) -> Iterator[Show]:
    """A bar with bytes, speed and time left, and what is being worked on."""
    from rich import progress as bars

    with bars.Progress(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[now]}", markup=False),
        console=messages,
        transient=True,
        disable=not messages.is_terminal,
    ) as display:
        task: bars.TaskID | None = None

        def show(done: int, total: int, now: str) -> None:
            nonlocal task
            if task is None:
                # What an earlier run has done is no measure of this run's speed, so the bar begins with it.
                task = display.add_task(title, total=total, completed=done, now=now)
            display.update(task, completed=done, now=now)

        yield show


def _tool(name: str) -> Callable[..., Any]:
    """A tool outside the package proper, by its entry point."""
    from importlib.metadata import entry_points

    points = tuple(entry_points(group="lowmem_bagel.tools", name=name))
    if not points:
        raise SettingError(f"the tool {name!r} is not installed; reinstall lowmem-bagel")
    tool: Callable[..., Any] = points[0].load()
    return tool


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    number = text.strip().upper()
    unit = next((u for u in units if number.endswith(u)), "")
    digits = number.removesuffix(unit).strip()
    if not digits.isdecimal() or not 0 < int(digits) * units.get(unit, 1) <= 10**12:
        raise SettingError(f"--shard-size {text}: give a size such as 1GB or 512MB")
    return int(digits) * units.get(unit, 1)


def _record(out: Path, manifest: Manifest) -> dict[str, Any]:
    size = sum(shard.bytes for shard in manifest.shards.values())
    return {
        "folder": str(out),
        "format": manifest.format,
        "experts": list(manifest.experts),
        "options": dict(manifest.options),
        "source_sha256": manifest.source_sha256,
        "shards": len(manifest.shards),
        "tensors": len(manifest.tensors),
        "gigabytes": size / 1e9,
    }


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))

"""`lowmem-bagel convert` and `lowmem-bagel verify`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError
from ..extensions import registered_names, tool
from ..formats.registry import formats
from ..formats.spec import ConvertOption
from ..settings import Option
from .console import BaseOption, LoraOption, WeightsOption, byte_bars
from .options import Values, takes
from .terminal import note, print_json, quoted, say

if TYPE_CHECKING:
    from ..checkpoint.manifest import Manifest

MAX_SHOWN_PROBLEMS = 20


class KeptExperts(StrEnum):
    """What the variant can do afterwards."""

    all = "all"
    und = "und"


def convert_options() -> tuple[tuple[str, ConvertOption], ...]:
    """The options of all formats, each with its format's name."""
    return tuple((spec.name, option) for spec in formats().values() for option in spec.options)


def format_flags() -> tuple[Option, ...]:
    """One flag for each name of an option; its help says which formats have it."""
    having: dict[str, list[str]] = {}
    for format, option in convert_options():
        having.setdefault(option.name, []).append(option.converter or format)
    kinds = {option.name: option for _, option in convert_options()}
    return tuple(
        Option(
            name=name,
            kind=kinds[name].kind,
            help=f"{', '.join(dict.fromkeys(names))}: {kinds[name].help}",
            choices=kinds[name].choices,
        )
        for name, names in having.items()
    )


def targets() -> str:
    """The formats that there is a converter for."""
    return ", ".join(registered_names("converters"))


@takes(options=format_flags)
def convert_command(
    source: Annotated[Path, typer.Argument(help="Folder of the checkpoint, or its file of weights.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[str, typer.Option(help=f"Format: {targets()}.")],
    options: Values,
    experts: Annotated[
        KeptExperts, typer.Option(help="'und' leaves out all that draws: such a variant only answers.")
    ] = KeptExperts.all,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new one is complete.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work instead of resuming.")] = False,
    shard_size: Annotated[str, typer.Option(help="Source bytes per output file, as 1GB or 512MB.")] = "1GB",
    weights: WeightsOption = None,
    base: BaseOption = None,
    lora: LoraOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert a checkpoint to a smaller format.

    The same command again resumes an interrupted conversion.
    """
    from ..units import parse_bytes

    shard_bytes = parse_bytes(shard_size, "--shard-size")
    convert = tool("convert")
    try:
        with byte_bars() as show:
            manifest = convert(
                source,
                out,
                to,
                {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
                experts=("und",) if experts is KeptExperts.und else ("und", "gen"),
                overwrite=overwrite,
                restart=restart,
                shard_bytes=shard_bytes,
                weights=weights,
                base=base,
                lora=lora or (),
                report=lambda progress: show(to, progress.done, progress.total, progress.now),
            )
    except KeyboardInterrupt:
        note("Interrupted; the same command resumes the conversion.")
        raise typer.Exit(130) from None
    record = _record(out, manifest)
    if as_json:
        print_json(record)
    else:
        say(
            f"{out}: {record['gigabytes']:.2f} GB in {len(manifest.shards)} files"
            f"\nNext: lowmem-bagel inspect {quoted(out)}"
        )


def verify_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a variant.")],
    source: Annotated[Path | None, typer.Option(help="Compare with the checkpoint that it was made from.")] = None,
    weights: WeightsOption = None,
    base: BaseOption = None,
    lora: LoraOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check a variant's checksums, with --source against the original.

    It must then be exact, or within the errors that it records.
    """
    from dataclasses import asdict

    from ..checkpoint.folder import ModelFolder
    from ..checkpoint.verify import verify

    original = None if source is None else ModelFolder.open(source, weights=weights, base=base, lora=lora or ())
    with byte_bars() as show:
        result = verify(folder, original, lambda done, total, now: show("verify", done, total, now))
    if as_json:
        print_json({**asdict(result), "passed": result.passed})
    else:
        for problem in result.problems[:MAX_SHOWN_PROBLEMS]:
            say(problem)
    if not result.passed:
        raise CheckpointError(f"{folder}: {len(result.problems)} problems; convert or download it again")
    if not as_json:
        say(f"{folder}: {result.files} files and {result.tensors} tensors are as they were written")
        if source is not None:
            say(
                f"{result.exact} of {result.compared} tensors have the source's bits; "
                f"largest relative error of the others {result.largest_error:.2e}"
            )


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

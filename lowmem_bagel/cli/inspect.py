"""`lowmem-bagel inspect`: what a model folder holds, or how a picture was made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import printable
from .console import BaseOption, JsonOption, WeightsOption
from .terminal import MAX_TEXT, print_json, print_table, say

if TYPE_CHECKING:
    from ..formats.summary import Summary


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A checkpoint or variant folder, or a picture saved by this program.")],
    weights: WeightsOption = None,
    base: BaseOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Variants: every tensor with its errors.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a folder holds, or how a picture was made.

    Formats, sizes and errors of a folder; prompt, seed and settings of a picture.
    """
    from ..checkpoint.weights import is_weights

    if os.path.isdir(path) or is_weights(path):
        _folder(path, weights, base, tensors, as_json)
        return
    from ..errors import UserError
    from ..pictures.saving import read_metadata

    if not os.path.exists(path):
        raise UserError(f"no such file or folder: {path}; give a model folder, or a picture saved by this program")
    metadata = read_metadata(path)
    if as_json:
        print_json(metadata)
    else:
        for name, value in metadata.items():
            say(printable(f"{name}: {value}", MAX_TEXT))


def _folder(path: Path, weights: str | None, base: Path | None, tensors: bool, as_json: bool) -> None:
    from ..formats.summary import summarise

    summary = summarise(path, weights, base)
    if as_json:
        print_json(summary.to_json(tensors))
        return
    if tensors:
        _print_tensors(summary)
    else:
        _print_parts(summary)


def _print_parts(summary: Summary) -> None:
    total = summary.total
    say(
        f"{summary.path}: {summary.format}, {total.weights / 1e9:.3f} billion weights, {total.bytes / 1e9:.3f} GB, "
        f"experts {' and '.join(summary.experts)}"
    )
    if summary.manifest is not None:
        from ..checkpoint.variant_summary import encoded_bits_per_weight

        manifest = summary.manifest
        notes = [f"{encoded_bits_per_weight(manifest):.3f} bits a weight where encoded"]
        notes += [f"{name} {value}" for name, value in manifest.options.items()]
        maker = f"made from {manifest.source} by lowmem-bagel {manifest.tool_version}"
        say(f"{maker}; {', '.join(notes)}")
    table = [("part", "expert", "encoding", "tensors", "weights", "bytes", "bits a weight")]
    for row in (*summary.rows, total):
        tensors, weights, bytes = (f"{count:,}" for count in (row.tensors, row.weights, row.bytes))
        table.append((row.part, row.expert, row.encoding, tensors, weights, bytes, f"{row.bits_per_weight:.2f}"))
    print_table(table, right=range(3, 7))
    for topic, line in summary.reading.lines.items():
        say(f"{topic}: {line}")
    for row in summary.rows:
        for error, (value, tensor) in row.worst.items():
            where = " ".join(word for word in (row.part, row.expert, row.encoding) if word)
            say(f"{where}: worst {error} {value:.3g} in {tensor}")


def _print_tensors(summary: Summary) -> None:
    rows = list(summary.tensors())
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        said = [f"{name} {value:.3g}" for name, value in row["errors"].items()]
        said += [f"{name} {value}" for name, value in row["options"].items()]
        size = f"{row['bits_per_weight']:6.2f} bits"
        say(f"{row['name']:{width}} {row['encoding']:>8} {size}  {', '.join(said)}".rstrip())

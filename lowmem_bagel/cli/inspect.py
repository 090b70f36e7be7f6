"""`lowmem-bagel inspect`: what a model folder holds, or how a picture was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import JsonOption, print_json


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A checkpoint or variant folder, or a PNG saved by this program.")],
    as_json: JsonOption = False,
) -> None:
    """Show a folder's format and sizes, or a picture's prompt, seed and settings."""
    if path.is_dir():
        _folder(path, as_json)
        return
    from ..errors import UserError
    from ..images import read_metadata

    if not path.exists():
        raise UserError(f"no such file or folder: {path}; give a model folder, or a PNG saved by this program")
    metadata = read_metadata(path)
    if as_json:
        print_json(metadata)
    else:
        for name, value in metadata.items():
            print(f"{name}: {value}")


def _folder(path: Path, as_json: bool) -> None:
    from ..summary import summarise

    summary = summarise(path)
    if as_json:
        print_json(summary)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{path}: {summary['format']}, {summary['weights'] / 1e9:.3f} billion weights", markup=False)
    table = Table("part", "expert", "tensors", "weights", "bytes", "bits a weight")
    rows: list[dict[str, Any]] = [*summary["parts"], {"part": "total", "expert": "", **summary["total"]}]
    for row in rows:
        counts = (f"{row[name]:,}" for name in ("tensors", "weights", "bytes"))
        table.add_row(row["part"], row["expert"], *counts, f"{8 * row['bytes'] / max(row['weights'], 1):.2f}")
    console.print(table)

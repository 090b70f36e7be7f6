"""`lowmem-bagel bench startup`: where the seconds of a command go before the first step, cold and warm."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Out, Shape, Size, Timesteps

FORMATS = "int8,source,dfloat11,nf4"


def startup_command(
    folders: Annotated[list[Path] | None, typer.Argument(help="Model folders, instead of random weights.")] = None,
    shape: Shape = "bagel-7b",
    formats: Annotated[str, typer.Option(help="Of random weights, commas between.")] = FORMATS,
    max_vram: Annotated[str | None, typer.Option(help="Limit on the card's memory, such as 12GB.")] = None,
    size: Size = 1024,
    timesteps: Timesteps = 50,
    repeat: Annotated[int, typer.Option(min=1, help="Warm starts of each, whose medians count.")] = 2,
    work: Annotated[Path | None, typer.Option(help="Where random weights are written for a while.")] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="Put records together instead: the last of a row.")] = None,
    out: Out = Path("startup.json"),
) -> None:
    """Run `generate` in fresh processes, cold and warm, and write a JSON record of seconds by phase."""
    if merge:
        _merge(merge, out)
        return
    from lowmem_bagel.units import parse_bytes

    from ..record import write_record
    from ..report.startup import lines, measure_startup

    limit = parse_bytes(max_vram, "max_vram")
    flags = [*(["--max-vram", max_vram] if max_vram else []), "--height", str(size), "--width", str(size)]
    flags += ["--num-timesteps", str(timesteps)]
    settings = {"shape": None if folders else shape, "size": size, "timesteps": timesteps, "repeat": repeat}
    rows: list[dict[str, Any]] = []
    wanted: list[Any] = list(folders or formats.split(","))
    for one in wanted:
        with _folder(one, shape, work) as (folder, format):
            measured = measure_startup(folder, flags, repeat)
        rows.append({"format": format, "limit_gb": None if limit is None else limit / 1e9, **measured})
        for line in lines(format, measured):
            print(line, flush=True)
        write_record(out, "startup", settings, {"rows": rows})


def _merge(paths: Sequence[Path], out: Path) -> None:
    """Rows of one kind of card as one record; each says of which commit it is, and of how many cores.

    Raises:
        SettingError: a record cannot be read, is no start-up, or is of another card, versions or settings.
    """
    from ..merging import records_alike, save_merged

    records = records_alike(paths, "startup", _same)
    rows: dict[Any, dict[str, Any]] = {}
    for record in records:
        of = {"commit": record["commit"], "cores": record["hardware"]["cores"]}
        rows |= {(row["format"], row["limit_gb"]): of | row for row in record["results"]["rows"]}
    save_merged(out, records, records[0]["settings"], {"rows": list(rows.values())})


def _same(record: dict[str, Any]) -> dict[str, Any]:
    versions, settings = record["versions"], record["settings"]
    return {"card": record["hardware"].get("gpu"), "set of versions": versions, "set of settings": settings}


@contextmanager
def _folder(wanted: Path | str, shape: str, work: Path | None) -> Iterator[tuple[Path, str]]:
    """The folder and its format; random weights are written first and gone afterwards."""
    from lowmem_bagel.checkpoint.folder import ModelFolder

    if isinstance(wanted, Path):
        yield wanted, ModelFolder.open(wanted).format
        return
    from ..report.store import folder_for

    place = None if work is None else folder_for(work, "--work")
    import torch

    from ..written import write_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(dir=place, prefix="lowmem-bagel-") as own:
        folder = write_folder(wanted, shape, Path(own) / wanted, device)
        if device == "cuda":
            torch.cuda.empty_cache()  # the card is the command's
        yield folder, wanted

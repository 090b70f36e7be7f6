"""`lowmem-bagel bench pages`: writes the pages that are made from records, and the README's lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..pages.page import Drawing


def pages_command(
    checkout: Annotated[Path, typer.Option(help="Where docs/ and benchmarks/results/ are.")] = Path(),
    redraw: Annotated[bool, typer.Option("--redraw", help="Draw plots though their records are as they were.")] = False,
) -> None:
    """Write every page anew from the records in benchmarks/results."""
    from lowmem_bagel.errors import SettingError

    from ..pages import PAGES
    from ..record import read_records

    results = checkout / "benchmarks" / "results"
    if not results.is_dir():
        raise SettingError(f"{results} is missing; run this in a checkout, or name one with --checkout")
    records = read_records(results)
    for page in PAGES:
        path = checkout / page.path
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(page.text(records, before), encoding="utf-8")
        drawn = "" if page.drawing is None else _draw(page.drawing, checkout, records, results, redraw)
        print(f"{path}{drawn}: {'as it was' if path.read_text(encoding='utf-8') == before else 'written anew'}")


def _draw(drawing: Drawing, checkout: Path, records: Mapping[str, Any], results: Path, redraw: bool) -> str:
    """Draw what was drawn from other records; in words, what was done."""
    from ..report.write import put

    stamp = drawing.stamp(records)
    place = checkout / drawing.place
    if not redraw and stamped(place) == {stamp}:
        return ""
    files = drawing.make(records, results)
    put(place, files)
    for old in place.glob("*.png"):
        if old.name not in files:
            old.unlink()
    return " and its plots"


def stamped(place: Path) -> set[str]:
    """Stamps of all PNGs of a folder."""
    from PIL import Image

    from ..pages.page import STAMP

    found = set()
    for path in place.glob("*.png"):
        with Image.open(path) as image:
            found.add(str(image.info.get(STAMP)))
    return found

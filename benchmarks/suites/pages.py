"""`lowmem-bagel bench pages`: writes the pages that are made from records, and the README's lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pages_command(
    checkout: Annotated[Path, typer.Option(help="Where docs/ and benchmarks/results/ are.")] = Path(),
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
        print(f"{path}: {'as it was' if path.read_text(encoding='utf-8') == before else 'written anew'}")

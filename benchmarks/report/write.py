"""From a record to the report: an HTML file that stands alone, and its plots as PNGs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lowmem_bagel.errors import OutputError

from .document import Drawn, document
from .looks import Look, png
from .plots import PLOTS
from .reading import Report, read_report
from .strips import strip, strip_file

LOOKS = tuple(Look(dark, narrow) for dark in (False, True) for narrow in (False, True))
PAGE = "report.html"
NOTHING: Mapping[str, str] = {}


def write_report(record: Path, out: Path) -> None:
    """Write `report.html` and the plots of a record of `bench report` into the folder `out`, which is made.

    The fidelity's pictures are looked for beside the record. All is made before anything is written.

    Raises:
        SettingError: the record cannot be read, or is none.
        MissingExtraError: matplotlib is not installed.
        OutputError: the folder cannot be written.
    """
    from ..suites.predictions import COMMON, COMMON_FORMATS, predictions
    from .which import recommended

    found = read_report(record)
    report = replace(
        found,
        elsewhere=tuple(predictions(COMMON, COMMON_FORMATS, ("generate",))),
        choice=found.choice or recommended(found.machine),
    )
    shown = strip(report)
    plots = drawn(report, LOOKS)
    files = {PAGE: document(report, plots, shown).encode()}
    put(out, files | plot_files(plots, {dark: strip_file(shown, Look(dark)) for dark in (False, True)}))


def drawn(report: Report, looks: tuple[Look, ...], about: Mapping[str, str] = NOTHING) -> Drawn:
    """Every plot that the record has something for, in every look; `about` is written into each."""
    wanted = [plot for plot in PLOTS if plot.alt(report)]
    return {
        (plot.name, look.dark, look.narrow): png(plot.draw(report, look), about) for plot in wanted for look in looks
    }


def plot_files(found: Drawn, strips: Mapping[bool, bytes | None]) -> dict[str, bytes]:
    """Files by name: NAME.png and NAME-dark.png of each plot at a page's width."""
    both = {(name, dark): data for (name, dark, narrow), data in found.items() if not narrow}
    both |= {("pictures", dark): data for dark, data in strips.items() if data}
    return {f"{name}{'-dark' if dark else ''}.png": data for (name, dark), data in both.items()}


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, each whole or not at all.

    Raises:
        OutputError: one cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            part = folder / f".{name}.part"
            try:
                part.write_bytes(data)
                os.replace(part, folder / name)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write the report into {folder} ({error.strerror}); name another folder") from error

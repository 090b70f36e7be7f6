"""docs/report.md: what each variant costs in memory, time and fidelity, and what others said and took.

Rows are of the published shape on a card; pictures that can be judged are of the demo checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..report import tables
from ..report.plots import PLOTS
from ..report.reading import Report, report_of, title_of
from ..report.tables import Table, number
from ..rows import Row
from .measured import about, card, measured, size
from .page import STAMP, Column, Drawing, Page, Records, again, prose, table

RECORD = "report_h200"
"""Until it is there, rows of `bench engine` on the same kind of card stand for it."""
STARTUP = "startup_h200"
FIDELITY = "fidelity_demo"
CARDS = "predictions_common_cards"
OF_FIDELITY = ("fidelity", "errors")
PLACE = "docs/report"
"""Of the plots."""


@dataclass(frozen=True)
class Claim:
    """What was said of a variant before: GB on disk, GB at the peak (least, most), the card for it and its GB."""

    format: str
    stored: tuple[float, float]
    peak: tuple[float, float]
    card: str
    card_gb: float


CLAIMS = (
    Claim("source", (29.21, 29.21), (30, 30), "A100 40 GB", 40 * 1.073741824),
    Claim("dfloat11", (19.89, 19.89), (22, 22), "RTX 4090", 24 * 1.073741824),
    Claim("int8", (15, 15), (16, 18), "RTX 3090, RTX 4080 Super", 16 * 1.073741824),
)
TOLERANCE = 0.03
"""Within which a claim counts as confirmed."""


def report(records: Records) -> Report:
    record = records[RECORD]
    whole = {**record, "results": {**record["results"], "startup": records[STARTUP]["results"]}}
    found = report_of(whole, Path(f"{RECORD}.json"))
    return replace(found, elsewhere=tuple(records[CARDS]["results"]))


def conditions(records: Records) -> str:
    found = report(records)
    versions = " and ".join(f"{package} {found.versions[package]}" for package in ("torch", "triton"))
    link = f"[{RECORD}](../benchmarks/results/{RECORD}.json)"
    return prose(
        f"Measured on one {found.card} (commit {found.commit}) with {versions}: random weights of the shape "
        f"{found.settings['shape']}, pictures of {found.settings['size']}x{found.settings['size']} and "
        f"{found.settings['num_timesteps']} timesteps. Record: {link}."
    )


def figures(records: Records) -> str:
    """Every table and plot that the record has something for."""
    found = report(records)
    plots = {plot.name: plot for plot in PLOTS if plot.alt(found)}

    def draw(*names: str) -> list[str]:
        return [_picture(name, plots[name].alt(found), plots[name].caption) for name in names if name in plots]

    sections = {
        "Time against memory": draw(*(name for name in plots if name.startswith("time-memory"))),
        "Which for how much memory": _shown(tables.within(found)),
        "All rows": _shown(tables.measured(found)),
        "Not measured": _shown(tables.lost(found)),
        "Where the seconds go": draw("phases"),
        "Fidelity at this shape": [*draw("fidelity"), *_shown(tables.fidelity(found)), *draw("errors")],
        "Start-up": [*draw("startup"), *_shown(tables.startup(found))],
        "Predicted and measured": [*draw("predicted"), *_shown(tables.predictions(found))],
    }
    return "\n\n".join(f"### {title}\n\n" + "\n\n".join(parts) for title, parts in sections.items() if parts)


def judged(records: Records) -> Report:
    """The fidelity of the demo checkpoint, whose pictures are of something, as a report without rows."""
    record = records[FIDELITY]
    return report_of(
        {**record, "benchmark": "report", "results": {"rows": [{"format": "source"}], "fidelity": record["results"]}},
        Path(f"{FIDELITY}.json"),
    )


def fidelity(records: Records) -> str:
    found, settings = judged(records), records[FIDELITY]["settings"]
    said = prose(
        f"The demo checkpoint on a processor, commit {found.commit}: {settings['pictures']} pictures of "
        f"{settings['num_timesteps']} timesteps, {settings['texts']} texts "
        f"([record](../benchmarks/results/{FIDELITY}.json))."
    )
    plots = [_picture(f"demo-{plot.name}", plot.alt(found), plot.caption) for plot in PLOTS if plot.name in OF_FIDELITY]
    titles = ", ".join(variant.title for variant in found.fidelity if variant.files)
    strip = (
        f"One seed's picture by the source, then by {titles}; below each, how it differs from the source's, amplified."
    )
    return "\n\n".join([said, *plots, *_shown(tables.fidelity(found)), _picture("demo-pictures", strip, strip)])


def elsewhere(records: Records) -> str:
    found = report(records)
    plot = next(plot for plot in PLOTS if plot.name == "elsewhere")
    ram = records[CARDS]["settings"]["ram_gb"]
    said = prose(f"Commit {records[CARDS]['commit']}, with {ram:g} GB of RAM.")
    return "\n\n".join([_picture(plot.name, plot.alt(found), plot.caption), *_shown(tables.elsewhere(found)), said])


def seeds(records: Records) -> str:
    """Claims beside what was measured at the published shape."""
    known = _published(records)

    def verdict(measured: float | None, claimed: tuple[float, float]) -> str:
        least, most = claimed
        words = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        if measured is None:
            return f"{words}: not measured"
        right = least * (1 - TOLERANCE) <= measured <= most * (1 + TOLERANCE)
        return f"{words}: {'confirmed' if right else 'corrected'}, {measured:.2f}"

    def fits(claim: Claim) -> str:
        peak = known[claim.format].peak
        if peak is None:
            return f"{claim.card}: not measured"
        return f"{claim.card}: {peak:.1f} GB {'fit' if peak < claim.card_gb else 'do not fit'} into {claim.card_gb:.1f}"

    columns: dict[str, Callable[[Claim], str]] = {
        "": lambda claim: title_of(claim.format),
        "on disk, GB": lambda claim: verdict(known[claim.format].stored, claim.stored),
        "at the peak, drawing, GB": lambda claim: verdict(known[claim.format].peak, claim.peak),
        "card": fits,
    }
    alone: dict[str, Column] = {
        "understanding alone": title_of,
        "at the peak, GB": lambda name: number(known[name].und, lambda value: f"{value:.2f}"),
    }
    gpu = card(records["engine_h200"])
    said = prose(
        f"Claimed, and found at the 7B shape on one {gpu} (commit {report(records).commit}); GB are 1e9 bytes, the "
        "peak all that is in use on the card. On disk: what `convert` writes, autoencoder and vision tower included."
    )
    return f"{said}\n\n{table(columns, CLAIMS)}\n\n{table(alone, [name for name in known if known[name].und])}"


@dataclass(frozen=True)
class Published:
    """1e9 bytes of one format of the published shape: of its files, at the peak of drawing and of understanding."""

    stored: float | None
    peak: float | None
    und: float | None


def _published(records: Records) -> dict[str, Published]:
    """Peaks of the rows without a limit; sizes of the variants' files, or of those that were converted on their own."""
    found, converted = report(records), records["conversion_bagel-7b"]
    sizes = {row["case"]: row["bytes"] / 1e9 for row in converted["results"]}
    sizes["source"] = converted["settings"]["source_bytes"] / 1e9

    def peak(format: str, task: str) -> float | None:
        rows = (r for r in found.measured if (r.format, r.task, r.limit_gb) == (format, task, 0) and r.is_plain)
        return next((found.memory(row) for row in rows), None)

    return {
        name: Published(found.stored(name) or sizes.get(name), peak(name, "generate"), peak(name, "ask"))
        for name in ("source", "dfloat11", "int8", "nf4")
    }


def upstream(records: Records) -> str:
    """What others took beside what the same row of ours takes, with work, card and commit."""
    found, ours = (
        records["upstream_h200"],
        {name: (row.seconds, records[row.run]["commit"]) for name, row in measured(records).items()},
    )
    newer = {Row.parse(row["row"]): row for row in records[RECORD]["results"]["rows"] if row["state"] == "measured"}
    for name in ours:
        if row := newer.get(Row.parse(name)):
            ours[name] = row["seconds"]["median"], row.get("commit", records[RECORD]["commit"])

    def of_ours(other: Mapping[str, Any]) -> str:
        seconds, commit = ours[other["beside"]]
        return f"{seconds:.2f} (commit {commit})"

    columns: dict[str, Column] = {
        "": lambda other: other["name"],
        "s": about,
        "ours, s": of_ours,
        "times": lambda other: f"{other['seconds'] / ours[other['beside']][0]:.1f}",
    }
    said = prose(
        f"One picture (or edit) of {size(found)} and {found['settings']['num_timesteps']} timesteps. "
        f"Others: {found['conditions']}. Ours: one {card(records['engine_h200'])}, the commits named."
    )
    return f"{said}\n\n{table(columns, found['results'])}"


def stamp(records: Records) -> str:
    """Of what is drawn."""
    said = json.dumps([records[name] for name in (RECORD, STARTUP, FIDELITY, CARDS)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def plots(records: Records, results: Path) -> dict[str, bytes]:
    """The PNGs, light and dark. A record's pictures lie beside it."""
    from ..report.looks import Look
    from ..report.strips import strip, strip_file
    from ..report.write import drawn, plot_files

    about, schemes = {STAMP: stamp(records)}, (Look(), Look(dark=True))
    demo = replace(judged(records), path=results / f"{FIDELITY}.json")
    pictures = strip(demo)
    strips = {look.dark: strip_file(pictures, look, about) for look in schemes}
    rows = plot_files(drawn(report(records), schemes, about), {})
    return rows | {f"demo-{name}": data for name, data in plot_files(drawn(demo, schemes, about), strips).items()}


def commands(records: Records) -> str:
    own = {RECORD: "report --shape bagel-7b"}
    return again(records, {**own, STARTUP: "startup", FIDELITY: "fidelity", CARDS: "predictions --common --out RECORD"})


def _shown(found: Table) -> list[str]:
    """The table and its note; nothing of one without rows."""
    if not found.rows:
        return []
    columns = {head + " " * n: _cell(n) for n, head in enumerate(found.heads)}
    return [table(columns, found.rows), *([prose(found.note)] if found.note else [])]


def _cell(place: int) -> Column:
    return lambda row: str(row[place]).replace("|", r"\|")


def _picture(name: str, alt: str, caption: str) -> str:
    """A plot by the reader's scheme."""
    quoted = alt.replace('"', "'")
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="report/{name}-dark.png">\n'
        f'<img src="report/{name}.png" alt="{quoted}"></picture>\n\n{prose(caption)}'
    )


REPORT = Page(
    "docs/report.md",
    {
        "conditions": conditions, "figures": figures, "fidelity": fidelity, "seeds": seeds, "upstream": upstream,
        "elsewhere": elsewhere,
        "commands": commands,
    },
    Drawing(PLACE, stamp, plots),
)  # fmt: skip

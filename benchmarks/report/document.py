"""The report as one HTML file: nothing is fetched, and all of it can be read without the script, which only sorts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence

from . import tables
from .markup import Html, data_uri, el
from .plots import PLOTS, Plot
from .reading import Report
from .strips import Shown
from .tables import NONE, Table

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f1f1f; --faint: #5f6368; --line: #d9dce0; --soft: #f4f5f7;
  --link: #005a9c; }
@media (prefers-color-scheme: dark) { :root { --paper: #17191c; --ink: #e8e8e8; --faint: #a8adb3; --line: #3a3d42;
  --soft: #202327; --link: #7cc4ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0; }
code { background: var(--soft); padding: .1rem .3rem; border-radius: .2rem; font-size: .9em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding: .3rem 0; caption-side: bottom; }
caption span { display: block; position: sticky; left: 0; max-width: min(70rem, calc(100vw - 2rem)); }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th.number, td.number { text-align: right; } td.long { white-space: normal; min-width: 14rem; }
thead th { background: var(--soft); vertical-align: bottom; white-space: normal; } tbody th { font-weight: 600; }
tbody th { position: sticky; left: 0; background: var(--paper); max-width: 45vw; white-space: normal;
  min-width: min(11rem, 30vw); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--faint); font-size: .87rem; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
.strip figure { margin: 0; } .strip img { width: 100%; image-rendering: auto; margin-bottom: .3rem; }
.choice { background: var(--soft); border-left: .3rem solid var(--link); padding: .6rem 1rem; }
.failed td, .failed th { color: var(--faint); }
@media print { body { max-width: none; font-size: 9pt; } .wide { overflow: visible; } nav { display: none; }
  table { font-size: 6.5pt; } th, td { padding: .1rem .2rem; } figure, tr { break-inside: avoid; }
  tbody th { position: static; } }
@page { size: A4 landscape; margin: 12mm; }
"""
SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener('click', () => {
      const up = head.getAttribute('aria-sort') !== 'ascending';
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const value = row => row.cells[place].textContent.trim();
      const body = table.tBodies[0];
      const compared = (a, b) => {
        const x = parseFloat(value(a)), y = parseFloat(value(b));
        if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
        return (isNaN(x) ? value(a).localeCompare(value(b)) : x - y) * (up ? 1 : -1);
      };
      body.append(...[...body.rows].sort(compared));
    });
  });
}
"""
LONG = 24
"""Characters of a cell that may be broken into lines."""
PHONE = "(max-width: 600px)"
DARK = "(prefers-color-scheme: dark)"

Drawn = Mapping[tuple[str, bool, bool], bytes]
"""PNGs by plot's name, dark, narrow."""


def document(report: Report, drawn: Drawn, strip: Sequence[Shown]) -> str:
    """The whole file."""
    sections = [section for section in _sections(report, drawn, strip) if section[2]]
    links = [el("li", el("a", title, href=f"#{name}")) for name, title, _ in sections]
    page = el(
        "html",
        _head(report),
        el(
            "body",
            el("h1", f"BAGEL on {report.card}: memory, time and fidelity"),
            _about(report),
            el("nav", el("ul", *links), aria_label="Sections"),
            el("main", *(el("section", el("h2", title, id=name), *inside) for name, title, inside in sections)),
            el("script", Html(SCRIPT)),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _head(report: Report) -> Html:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"BAGEL on {report.card}"),
        el("style", Html(STYLE)),
    )


def _about(report: Report) -> Html:
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items() if value is not None)
    hardware = ", ".join(f"{name} {value}" for name, value in report.hardware.items())
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    facts = {"machine": hardware, "versions": versions, "commit": report.commit, "settings": settings}
    told = [part for name, value in facts.items() if value for part in (el("dt", name), el("dd", value))]
    made = el("dd", el("code", report.command or "unknown"))
    return el("dl", *told, el("dt", "command"), made)


def _sections(report: Report, drawn: Drawn, strip: Sequence[Shown]) -> list[tuple[str, str, list[Html]]]:
    """(anchor, title, what is inside); empty where the record has nothing of it."""
    plots = {plot.name: plot for plot in PLOTS}

    def shown(*names: str) -> list[Html]:
        return [_figure(plots[name], report, drawn) for name in names if (name, False, False) in drawn]

    def table(found: Table, sortable: bool = False) -> list[Html]:
        return [_table(found, sortable)] if found.rows else []

    times = [name for name in plots if name.startswith("time-memory")]
    return [
        ("which", "Which for this card", _choice(report) + table(tables.within(report))),
        ("time", "Time against memory", shown(*times)),
        ("rows", "All rows", table(tables.measured(report), sortable=True)),
        ("lost", "Not measured", table(tables.lost(report))),
        ("phases", "Where the seconds go", shown("phases")),
        ("fidelity", "Fidelity", shown("fidelity") + table(tables.fidelity(report), sortable=True) + shown("errors")),
        ("pictures", "The same seed by each variant", _strip(strip)),
        ("start", "Start-up", shown("startup") + table(tables.startup(report))),
        ("predicted", "Predicted and measured", shown("predicted") + table(tables.predictions(report), sortable=True)),
        ("elsewhere", "Cards that are not here", shown("elsewhere") + table(tables.elsewhere(report))),
    ]


def _choice(report: Report) -> list[Html]:
    if report.choice is None:
        return []
    line, command = report.choice
    return [el("p", line, Html(" "), *([el("code", command)] if command else []), class_="choice")]


def _table(found: Table, sortable: bool) -> Html:
    kinds = [_kind([row[n] for row in found.rows]) for n in range(len(found.heads))]
    heads = [el("th", head, scope="col", class_=kind) for head, kind in zip(found.heads, kinds, strict=True)]
    rows = [
        el(
            "tr",
            el("th", row[0], scope="row"),
            *(el("td", text, class_=kind) for text, kind in zip(row[1:], kinds[1:], strict=True)),
        )
        for row in found.rows
    ]
    table = el(
        "table",
        el("caption", el("span", f"{found.title}. {found.note}".strip())),
        el("thead", el("tr", *heads)),
        el("tbody", *rows),
        **({"class_": "sortable"} if sortable else {}),
    )
    # A region that can be scrolled must be reached by keyboard too.
    return el("div", table, class_="wide", role="region", aria_label=found.title, tabindex="0")


def _kind(cells: Sequence[str]) -> str:
    """Of a column: numbers stand to the right, and long texts may be broken."""
    said = [cell for cell in cells if cell != NONE]
    if sum(cell[:1].isdigit() for cell in said) > len(said) / 2 and max(map(len, said)) <= LONG:
        return "number"
    return "long" if any(len(cell) > LONG for cell in said) else "words"


def _figure(plot: Plot, report: Report, drawn: Drawn) -> Html:
    """The plot for any width and scheme."""
    sources = [
        el("source", media=media, srcset=data_uri(drawn[plot.name, dark, narrow]))
        for media, dark, narrow in (
            (f"{PHONE} and {DARK}", True, True), (PHONE, False, True), (DARK, True, False),
        )
        if (plot.name, dark, narrow) in drawn
    ]  # fmt: skip
    image = el("img", src=data_uri(drawn[plot.name, False, False]), alt=plot.alt(report))
    return el("figure", el("picture", *sources, image), el("figcaption", f"{plot.title}. {plot.caption}"))


def _strip(strip: Sequence[Shown]) -> list[Html]:
    return [el("div", *map(_shown, strip), class_="strip")] if strip else []


def _shown(each: Shown) -> Html:
    if not each.picture:
        return el("figure", el("figcaption", f"{each.title}: {each.why}"))
    images = [el("img", src=data_uri(each.picture), alt=f"The picture by {each.title}")]
    words = each.title
    if each.difference:
        apart = "no difference" if each.same else f"difference ×{each.factor}"
        images.append(el("img", src=data_uri(each.difference), alt=f"{each.title}: {apart}"))
        words = f"{each.title}; below: {apart}"
    return el("figure", *images, el("figcaption", words))

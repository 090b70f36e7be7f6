"""Figures in README and docs come from records: what is typed by hand is a bound or a condition, and named here."""

from __future__ import annotations

import re

import pytest
from support.paths import ROOT

UNITS = (
    "s", "ms", "us", "seconds", "minutes", "GB", "MB", "TB", "GiB", "GB/s", "MB/s", "tokens/s", "TFLOP/s", "TOP/s", "%",
    "dB",
)  # fmt: skip
FIGURE = re.compile(rf"(?<![\w.])(\d[\d,.]*(?: to \d[\d.]*)?\s?(?:{'|'.join(UNITS)}))(?![\w/])")
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
TYPED = {
    "README.md": {
        "29 GB": "the published checkpoint's files",
        "30 GB": "the same, as room to be left for them",
        "1.5 GB": "room for the environment, as room to be left",
        "32 GB": "a condition of the predictions",
        "5 seconds": "the bound of a trial, in the code",
    },
    "docs/architecture.md": {"8GB": "an example of a size"},
    "docs/choosing.md": {"32 GB": "a condition of the predictions", "15%": "a bound, tested", "7%": "a bound, tested"},
    "docs/fidelity.md": {"60 GB": "room to be left for two models in RAM"},
    "docs/frames.md": {"512 MB": "a bound, in the code"},
    "docs/installation.md": {"5 seconds": "the bound of a trial, in the code"},
    "docs/kernels.md": {"2%": "the gain from which another tile is taken, in the code"},
    "docs/older-gpus.md": {"32 GB": "a condition of the predictions", "15 GB": "a condition of the measurements"},
    "docs/pictures.md": {"0.85 GB": "a bound, in the code", "512 MB": "a bound, in the code"},
    "docs/report.md": {},
    "docs/several-gpus.md": {"64 GB": "a condition of the predictions", "16 GB": "a limit in an example"},
    "docs/serving.md": dict.fromkeys(
        ("300 s", "15 s", "60 s", "32 MB", "30 seconds", "2 seconds"), "a bound, in the code"
    ),
}
"""By page, what may be typed, and why it is no measurement."""


def typed(text: str) -> list[str]:
    """Figures with units outside marked parts, code and commands."""
    text = re.sub(r"<!-- (?!end of )(.*?) -->.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    return FIGURE.findall(re.sub(r"`[^`]*`", "", text))


@pytest.mark.parametrize("page", PAGES)
def test_no_measured_figure_is_typed_by_hand(page: str) -> None:
    found = typed((ROOT / page).read_text(encoding="utf-8"))
    assert set(found) == set(TYPED.get(page, {})), "show figures from a record, between marks; or say here why not"


def test_the_search_finds_figures_and_leaves_what_is_marked() -> None:
    text = (
        "It took 3.5 s, 12 ms or 4 to 5 GB, 7% of 80 tokens/s at 40.1 dB.\n"
        "<!-- made --> 9 s <!-- end of made -->\n    bench --limit 8 GB\n`6 GB` ```\n5 s\n```\n"
        "512x512, T4, RTX 40, 3 steps"
    )
    assert typed(text) == ["3.5 s", "12 ms", "4 to 5 GB", "7%", "80 tokens/s", "40.1 dB"]

"""The report that is written stands alone, shows every row, and cannot be broken by what is in the record."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from copy import deepcopy
from io import BytesIO
from pathlib import Path

import pytest
from lowmem_bagel.benchmarks.report import looks, write
from lowmem_bagel.benchmarks.report.document import document
from lowmem_bagel.benchmarks.report.looks import Look
from lowmem_bagel.benchmarks.report.plots import PLOTS
from lowmem_bagel.benchmarks.report.reading import read_report, report_of
from lowmem_bagel.benchmarks.report.strips import strip
from lowmem_bagel.benchmarks.report.which import recommended
from lowmem_bagel.benchmarks.report.write import LOOKS, drawn, write_report
from matplotlib.text import Text
from PIL import Image
from support.report_records import SIDE, failed_row, report_record, written

from lowmem_bagel.errors import MissingExtraError, OutputError, SettingError
from lowmem_bagel.hardware.profile import HardwareProfile

HOSTILE = "$\\frac{$<script>alert(1)</script>&\"'\x1b[31m\u202e"


def tree(text: str) -> ET.Element:
    """The document, which is well-formed XML too."""
    head, _, rest = text.partition("\n")
    assert head == "<!DOCTYPE html>"
    return ET.fromstring(rest)


def short_record() -> dict[str, object]:
    """With everything in it and few rows, so that it is drawn quickly."""
    record = report_record()
    rows = record["results"]["rows"]
    wanted = ("int8", "int8:8", "source", "source:step_cache=taylorseer")
    record["results"]["rows"] = [row for row in rows if row["row"] in wanted or row["state"] != "measured"]
    return record


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of a quarter of the pixels, for those who do not look at them: encoding these takes the most."""
    monkeypatch.setattr(looks, "DPI", looks.DPI // 2)


@pytest.mark.usefixtures("coarse")
def test_the_report_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "LOOKS", (Look(), Look(True, True)))
    write_report(written(tmp_path, short_record()), tmp_path / "out" / "deeper")
    names = {path.name for path in (tmp_path / "out" / "deeper").iterdir()}
    plots = ("time-memory-generate", "phases", "fidelity", "errors", "predicted", "startup", "elsewhere", "pictures")
    assert names == {"report.html", "pictures-dark.png", *(f"{plot}.png" for plot in plots)}
    page = tree((tmp_path / "out" / "deeper" / "report.html").read_text(encoding="utf-8"))
    for image in page.iter("img"):
        assert image.get("alt") and image.get("src", "").startswith("data:image/png;base64,")
    phones = [source.get("media") for source in page.iter("source")]
    assert any("max-width" in str(media) for media in phones) and any("dark" in str(media) for media in phones)
    assert len(list(page.iter("figure"))) == 7 + 6  # plots, and the source's picture with five variants


def test_nothing_is_fetched_and_only_our_script_may_run() -> None:
    report = report_of(report_record(), Path("report.json"))
    text = document(report, {}, [])
    page = tree(text)
    for element in page.iter():
        for name in ("src", "href", "srcset", "action", "data"):
            value = element.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    policy = next(meta.get("content", "") for meta in page.iter("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy
    assert len(list(page.iter("script"))) == 1


def test_every_row_is_there_and_failures_say_why() -> None:
    report = report_of(report_record(), Path("report.json"))
    page = tree(document(report, {}, []))
    said = ["".join(row.itertext()) for row in page.iter("tr")]
    for row in report.rows:
        assert any(line.startswith(row.label) and line.endswith(row.row) for line in said), row.row
        assert row.is_measured or any(row.why in line for line in said), row.row
    for table in page.iter("table"):
        assert table.find("caption") is not None
        assert all(head.get("scope") for head in table.iter("th"))


@pytest.mark.usefixtures("coarse")
def test_what_is_in_a_record_is_text_and_nothing_else() -> None:
    record = short_record()
    results = record["results"]
    results["rows"] += [failed_row("int8", "failed", HOSTILE)]
    results["rows"][-1] |= {"row": HOSTILE, "format": HOSTILE, "task": HOSTILE}
    results["fidelity"]["variants"][0] |= {"name": HOSTILE, "kind": HOSTILE, "why": HOSTILE}
    results["choice"] = {"line": HOSTILE, "command": HOSTILE}
    record |= {"command": HOSTILE, "commit": HOSTILE, "hardware": {"gpu": HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    report = report_of(record, Path("report.json"))
    text = document(report, drawn(report, (Look(),)), [])
    page = tree(text)
    assert len(list(page.iter("script"))) == 1
    assert "alert(1)" not in "".join(script.text or "" for script in page.iter("script"))
    assert r"$\frac{$&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;\x1b[31m\u202e" in text


def test_columns_that_nobody_fills_are_left_out() -> None:
    text = document(report_of(report_record(), Path("report.json")), {}, [])
    assert "tokens/s" in text and "energy, J" not in text and "no driver" in text


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_plots_are_as_wide_as_their_page_and_of_its_color(look: Look) -> None:
    report = report_of(report_record(), Path("report.json"))
    (data,) = drawn_only("startup", report, look)
    with Image.open(BytesIO(data)) as image:
        assert image.width == (504 if look.narrow else 1080)
        assert image.convert("RGB").getpixel((2, 2)) == ((23, 25, 28) if look.dark else (255, 255, 255))


def drawn_only(name: str, report: object, look: Look) -> list[bytes]:
    from lowmem_bagel.benchmarks.report.looks import png

    return [png(plot.draw(report, look), {}) for plot in PLOTS if plot.name == name]


def test_labels_in_the_plot_of_time_and_memory_do_not_overlap() -> None:
    report = report_of(report_record(), Path("report.json"))
    plot = next(plot for plot in PLOTS if plot.name == "time-memory-generate")
    for look in LOOKS:
        figure = plot.draw(report, look)
        figure.canvas.draw()
        (axes,) = figure.axes
        for text in axes.texts:
            text.update_positions(figure.canvas.get_renderer())  # the box without the line to the point
        boxes = [Text.get_window_extent(text) for text in axes.texts if text.get_text()]
        assert len(boxes) > 10
        for n, one in enumerate(boxes):
            assert not [other for other in boxes[n + 1 :] if one.shrunk(0.96, 0.9).overlaps(other.shrunk(0.96, 0.9))]


@pytest.mark.usefixtures("coarse")
def test_a_record_of_rows_alone_makes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = short_record()
    record["results"] = {"rows": record["results"]["rows"][:2]}
    monkeypatch.setattr(write, "LOOKS", (Look(),))
    write_report(written(tmp_path, record), tmp_path / "out")
    page = tree((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert {section.find("h2").get("id") for section in page.iter("section")} == {
        "which", "time", "rows", "phases", "predicted", "elsewhere",
    }  # fmt: skip


def test_the_strip_compares_by_one_factor(tmp_path: Path) -> None:
    shown = strip(read_report(written(tmp_path)))
    assert [each.title for each in shown] == ["bf16", "DFloat11", "INT8", "NF4", "TaylorSeer", "float16"]
    assert shown[1].same and not shown[3].same
    assert len({each.factor for each in shown[1:]}) == 1 and shown[1].factor > 1
    with Image.open(BytesIO(shown[1].difference)) as image:
        assert image.size == (SIDE, SIDE) and image.getextrema() == ((0, 0),) * 3


def test_pictures_are_taken_from_beside_the_record_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    record = report_record()
    variants = record["results"]["fidelity"]["variants"]
    variants[0]["pictures"]["files"] = ["../secret.png"]
    variants[1]["pictures"]["files"] = ["pictures/none.png"]
    variants[2]["pictures"]["files"] = ["report.json"]
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "secret.png")
    shown = {each.title: each for each in strip(read_report(written(tmp_path / "in", record)))}
    assert shown["DFloat11"].why == "../secret.png is not beside the record"
    assert "none.png" in shown["INT8"].why and "report.json" in shown["NF4"].why
    assert shown["TaylorSeer"].picture and not any(shown[name].picture for name in ("DFloat11", "INT8", "NF4"))


def test_the_machine_of_the_record_gets_a_recommendation() -> None:
    """By the rule of `choose`, for the machine that was measured and not for this one."""
    card = HardwareProfile.hypothetical(12, (8, 6), 32, 20, name="RTX 3060").to_json()
    said, command = recommended(card) or ("", "")
    assert "on RTX 3060" in said and "(predicted)" in said and "lowmem-bagel generate" in command
    assert recommended({}) is None
    assert (recommended({"of": "another version"}) or ("",))[0].startswith("No recommendation: ")


def test_a_folder_that_cannot_be_written_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "LOOKS", (Look(),))
    path = written(tmp_path, {**short_record(), "results": {"rows": [{"format": "int8"}]}})
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write the report into .*name another folder"):
        write_report(path, tmp_path / "file" / "out")


def test_a_broken_record_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(SettingError):
        write_report(tmp_path / "report.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MissingExtraError, match=r'pip install "lowmem-bagel\[benchmarks\]"'):
        write_report(written(tmp_path, short_record()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_format_has_one_color_everywhere_and_no_two_share_it() -> None:
    for dark in (False, True):
        look = Look(dark)
        others = ["other-a", "other-b"]
        known = ("source", "fp16", "dfloat11", "int8", "nf4", "gguf-q8_0", "gguf-q6_k", "gguf-q5_k", "gguf-q4_k")
        colors = [look.format(name, others) for name in (*known, *others)]
        assert len(set(colors)) == len(colors)
        assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)
        assert all(contrast(color, look.paper) >= 3 for color in colors)


def contrast(one: str, other: str) -> float:
    """As WCAG counts it; 3 is what a mark needs to stand out."""

    def luminance(color: str) -> float:
        shares = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_a_plot_changes_with_its_record() -> None:
    """Its description does, from which who does not see it knows what it shows."""
    record = report_record()
    report, other = (report_of(each, Path("report.json")) for each in (record, changed(record)))
    said = {plot.name: plot.alt(report) for plot in PLOTS if plot.alt(report)}
    assert len(said) == 7
    assert not [plot.name for plot in PLOTS if plot.name in said and plot.alt(other) == said[plot.name]]


def changed(record: dict[str, object]) -> dict[str, object]:
    other = deepcopy(record)
    for row in other["results"]["rows"]:
        if row["state"] == "measured":
            row["seconds"]["median"] *= 2
    for variant in other["results"]["fidelity"]["variants"]:
        if variant["pictures"]["psnr_db"]:
            variant["pictures"]["psnr_db"]["median"] += 1
            variant["velocity"]["per_step"][0] *= 3
    for row in other["results"]["startup"]["rows"]:
        row["cold"]["imports"] += 1
    return other

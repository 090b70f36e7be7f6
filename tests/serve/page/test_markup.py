"""What the page says: in its language, escaped, and of an error one line."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from support.serving import running_service, service_of

from lowmem_bagel.errors import BusyError, Cancelled, CheckpointError, SettingError
from lowmem_bagel.serve.jobs import Progress
from lowmem_bagel.serve.memory import device_memory
from lowmem_bagel.serve.page import markup
from lowmem_bagel.serve.page.actions import View
from lowmem_bagel.serve.page.history import KEPT, Entry, thumbnail, thumbnails, with_entry
from lowmem_bagel.serve.page.markup import Part, Shown
from lowmem_bagel.serve.page.ratios import sizes_within
from lowmem_bagel.serve.page.texts import duration, language_of
from lowmem_bagel.serve.page.thoughts import parts_of
from lowmem_bagel.serve.service import Outlook

WORDS = re.compile(r"<[^>]+>")


def said(html: str) -> str:
    return WORDS.sub("", html)


@pytest.mark.parametrize(
    ("progress", "outlook", "wanted", "share"),
    [
        (Progress(), Outlook(2, 65.0), "Place 3 in the queue, done in about 65 s", None),
        (Progress(state="running", seconds_left=4.2), None, "Starting, done in about 4.2 s", None),
        (Progress(state="running", text="a red"), None, "Writing", None),
        (Progress(state="running", step=3, steps=12, seconds_left=200.0), None, "Step 3 of 12, 3 min left", "25"),
        (Progress(state="running", step=12, steps=12), None, "All 12 steps done, making the picture", "100"),
    ],
)
def test_progress(progress: Progress, outlook: Outlook | None, wanted: str, share: str | None) -> None:
    html = markup.status(View(progress, outlook), "en")
    assert said(html) == wanted
    assert re.findall(r'aria-valuenow="(\d+)"', html) == ([] if share is None else [share])


def test_a_preview_is_in_the_page_itself_and_named() -> None:
    progress = Progress(state="running", step=1, steps=2, seconds_left=1.0, preview=Image.new("RGB", (16, 16)))
    html = markup.status(View(progress), "zh")
    assert 'src="data:image/jpeg;base64,' in html and 'alt="正在成形的图"' in html


def test_a_conversation_has_its_pieces_in_their_places() -> None:
    given = [Part(picture=Path("/tmp/a b.png")), Part("<i>look</i>")]
    done = Shown(given, [Part("<think>hm</think>it is"), Part(picture=Path("/tmp/c.png")), Part("red")])
    html = markup.conversation([done, Shown([Part("and?")], [], "it <b>")], "en")
    assert said(html) == "You&lt;i&gt;look&lt;/i&gt;BAGELWhat it thinkshmit isredYouand?BAGELit &lt;b&gt;"
    assert html.index("a%20b.png") < html.index("look") < html.index("it is") < html.index("c.png") < html.index("red")
    assert re.findall(r'alt="([^"]+)"', html) == ["Picture that you gave, 1", "Picture 1 of the answer"]
    assert "What is said appears here" in markup.conversation([], "en")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (SettingError("seed <b>must</b> be"), "That does not work: seed &lt;b&gt;must&lt;/b&gt; be"),
        (BusyError("4 are waiting", 130.0), "4 are waiting (worth a try in 2 min)"),
        (Cancelled("stopped"), "Cancelled."),
        (RuntimeError("secret\nTraceback"), "A fault of the program; the server's log says more."),
    ],
)
def test_an_error_is_one_line(error: Exception, wanted: str) -> None:
    html = markup.status(View(Progress(state="failed", error=error)), "en")
    assert said(html).replace("&#x27;", "'") == wanted
    assert "\n" not in html


def test_loading_and_its_failure_are_told() -> None:
    service = service_of()
    assert "Loading the model ..." in markup.model_line(service, "en")
    service.bytes_loaded = (3 * 10**9, 12 * 10**9)
    html = markup.model_line(service, "en")
    assert "3.0 GB of 12.0 GB" in html and 'aria-valuenow="25"' in html
    service.failure = CheckpointError("no such folder: <x>")
    assert "no such folder: &lt;x&gt;" in markup.plan_table(service, "en")
    assert 'role="alert"' in markup.model_line(service, "en")


def test_plan_and_memory_of_a_loaded_model() -> None:
    with running_service() as service:
        assert service.loaded is not None
        table = said(markup.plan_table(service, "en"))
        assert "12 of 12 layer units on the device" in table and "predicted peak" in table
        used, total = device_memory(service.loaded)
        assert 0 < used < total
        assert said(markup.memory_bar(used, total, "zh")).startswith("设备内存")


def entry(**changes: Any) -> Entry:
    return Entry(**{
        "tab": "draw", "texts": ("a <red> circle",), "pictures": (), "output": "image", "answer": "",
        "settings": {"seed": 5, "think": True, "cfg_interval": (0.4, 1.0)}, "thumbnail": "x.png", **changes,
    })  # fmt: skip


def test_an_entry_of_the_history() -> None:
    html = markup.entry_table(entry(answer="<think>"), "en")
    assert "a &lt;red&gt; circle" in html and "&lt;think&gt;" in html
    assert "Think firstyes" in said(html) and "0.4, 1" in html


def test_the_history_is_bounded_and_the_newest_stands_first() -> None:
    history: tuple[Entry, ...] = ()
    for number in range(KEPT + 5):
        history = with_entry(history, entry(texts=(None, f"{number} " + "long " * 50)))
    assert len(history) == KEPT
    assert history[0].prompt.startswith(f"{KEPT + 4} ")
    assert all(len(caption) <= 81 for _, caption in thumbnails(history))
    assert thumbnail(Image.new("RGB", (1024, 512))).size == (192, 96)
    assert thumbnail(None).size == (192, 192)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("green", ("", "green")),
        ("<think>it is <b>", ("it is <b>", "")),
        ("<think>it is</think> green", ("it is", "green")),
        ("no <think>tag</think> first", ("", "no <think>tag</think> first")),
        ("", ("", "")),
    ],
)
def test_reasoning_and_answer_are_told_apart(text: str, parts: tuple[str, str]) -> None:
    assert parts_of(text) == parts


def test_ratios_are_what_the_model_draws_well() -> None:
    published = sizes_within(1024, 512, 16)
    assert published["1:1"] == (1024, 1024) and published["16:9"] == (1024, 576) and published["9:16"] == (576, 1024)
    assert published["4:3"] == (1024, 768) and "21:9" not in published
    assert all(side % 16 == 0 for size in published.values() for side in size)
    small = sizes_within(128, 64, 16)
    assert {"1:1", "4:3", "3:4", "16:9", "9:16"} <= set(small)
    assert len(set(small.values())) == len(small)


def test_durations_and_languages() -> None:
    spoken = [duration(seconds, "en") for seconds in (0.44, 5.0, 12.3, 240, 9000)]
    assert spoken == ["0.4 s", "5 s", "12 s", "4 min", "2.5 h"]
    assert [language_of(said) for said in ("zh", "en", None, "fr", 7)] == ["zh", "en", "en", "en", "en"]


def test_a_result_says_its_seed_and_size_and_what_to_know() -> None:
    from lowmem_bagel.settings import PictureSettings

    result = SimpleNamespace(seed=9, settings={"width": 64, "height": 32})
    prepared = SimpleNamespace(settings=PictureSettings(), notes=("height 30 is not a multiple of 16; using 32",))
    job: Any = SimpleNamespace(prepared=prepared, started=0.0, created=0.0)
    text = said(markup.status(View(Progress(state="done", result=result), None, job), "en"))  # type: ignore[arg-type]
    assert "Seed 9. 64×32. height 30 is not a multiple of 16; using 32" in text

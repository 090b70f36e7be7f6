"""The page as a person has it, in a browser, on the demo checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from support.browser import DESKTOP, Browser, unhurried_drawings, why_no_browser
from support.serving import ServerThread, served, until

from lowmem_bagel.pictures.saving import save_picture
from lowmem_bagel.serve.app import create_app
from lowmem_bagel.serve.service import Service

pytestmark = pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "a browser is there")
PROMPT = "a large red circle on a white background"
STEPS, LONG = "6", "5000"
NEED_NAMES = ("button", "checkbox", "combobox", "radio", "searchbox", "slider", "spinbutton", "textbox", "tab")
"""Roles of what a screen reader announces by name."""

COUNT = """const frame = window.requestAnimationFrame; window.counted = 0;
window.requestAnimationFrame = (then) => { window.counted++; return frame(then); };"""
ASKS_FOR_NONE = "const before = window.counted; setTimeout((done) => done(window.counted == before), 200, arguments[0])"


@pytest.fixture(scope="module")
def server(page_port: int) -> Iterator[ServerThread]:
    with served(create_app, page=True, queue=3, port=page_port) as running:
        yield running


@pytest.fixture(scope="module")
def service(server: ServerThread) -> Service:
    return server.service


@pytest.fixture(scope="module")
def url(server: ServerThread) -> str:
    return server.url


@pytest.fixture
def desktop(chromium: Browser) -> Iterator[Browser]:
    with chromium.had_by(DESKTOP) as one:
        yield one


@pytest.fixture
def page(desktop: Browser, url: str) -> Browser:
    desktop.open(url)
    return desktop


@pytest.fixture
def circle(tmp_path: Path) -> Path:
    """A picture of ours: a red circle on white, which carries its settings."""
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((32, 32, 96, 96), fill="red")
    kept = {"prompt": "a blue square", "num_timesteps": 7, "seed": 2**60, "cfg_interval": [0.25, 0.75], "width": 96}
    return save_picture(image, tmp_path / "circle.png", kept)


@contextmanager
def counted_frames(page: Browser) -> Iterator[None]:
    """Of pages that are loaded meanwhile, how many frames they ask for."""
    counting = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": COUNT})
    yield
    page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", counting)


def start(page: Browser, tab: str, steps: str = STEPS) -> None:
    page.write(f"#{tab}-num_timesteps input", steps)
    page.click(f"#{tab}-go")


def done(page: Browser, tab: str) -> str:
    """What is said once it is done."""
    return page.until(lambda: "Done" in page.text(f"#{tab}-status") and page.text(f"#{tab}-status"), 60)


def test_draws_edits_asks_restores_and_changes_its_language(page: Browser, url: str) -> None:
    page.click("#draw-examples button")
    page.until(lambda: page.value("#draw-prompt textarea") == PROMPT)
    start(page, "draw")
    assert "128×128" in done(page, "draw")
    shown = page.until(lambda: page.find("#draw-drawn img"))
    page.until(lambda: shown.get_property("naturalWidth") == 128)
    assert PROMPT in shown.get_attribute("alt")

    page.click("#draw-edit-this")
    page.until(lambda: page.find("#edit-picture img"))
    page.write("#edit-prompt textarea", "make the circle green")
    start(page, "edit")
    done(page, "edit")

    page.click("#edit-ask-this")
    page.until(lambda: page.find("#ask-picture img"))
    page.write("#ask-prompt textarea", "What color is the circle?")
    page.click("#ask-go")
    done(page, "ask")
    assert page.value("#ask-answer textarea") == "green"

    page.tab("History")
    page.until(lambda: len(page.all("#history-pictures button img")) == 3)
    page.all("#history-pictures button img")[-1].click()
    page.until(lambda: PROMPT in page.text("#chosen"))
    page.click("#history-restore")
    page.until(lambda: page.find("#draw-prompt") and page.value("#draw-prompt textarea") == PROMPT)
    assert page.value("#draw-num_timesteps input") == STEPS
    assert page.value("#draw-seed input").isdecimal()

    page.tab("Ask")
    page.click("#ask-picture button[aria-label='Remove Image'], #ask-picture button[aria-label='Clear']")
    page.until(lambda: not page.find("#ask-picture img"))
    page.tab("History")
    page.until(lambda: len(page.all("#history-pictures button img")) == 3)
    page.all("#history-pictures button img")[0].click()
    page.until(lambda: "What color" in page.text("#chosen"))
    page.click("#history-restore")
    back = page.until(lambda: page.find("#ask-picture img"))
    page.until(lambda: back.get_property("naturalWidth") == 128)

    page.tab("Draw")
    page.all("#language input")[1].click()
    page.until(lambda: page.text("#draw-go") == "开始画")
    assert page.driver.execute_script("return document.documentElement.lang") == "zh"
    page.tab("看图问答")
    assert page.value("#ask-answer textarea") == "green"
    page.tab("模型")
    page.until(lambda: "权重格式" in page.text("#plan") and "设备内存" in page.text("#memory"))
    with counted_frames(page):
        page.driver.refresh()
        page.until(lambda: page.text("#draw-go") == "开始画")
        page.until(lambda: page.driver.execute_async_script(ASKS_FOR_NONE))
    page.driver.execute_script("localStorage.clear()")

    asked = [address for address in page.requests() if not address.startswith(("data:", "blob:", "chrome"))]
    assert len(asked) > 20
    assert [address for address in asked if not address.startswith(url)] == []


@unhurried_drawings()
def test_progress_is_shown_meanwhile_and_what_runs_is_cancelled(page: Browser, service: Service) -> None:
    page.write("#draw-prompt textarea", PROMPT)
    page.write("#draw-num_timesteps input", LONG)
    for _ in range(2):
        page.click("#draw-go")
        page.until(lambda: page.text("#draw-status").startswith(("Starting", "Step", "Place")))
        page.until(lambda: page.find("#draw-status .lb-preview"))
        assert service.worker.running is not None, "what is shown of it comes before it is done"
        page.click("#draw-cancel")
        page.until(lambda: page.text("#draw-status") == "Cancelled.")
    until(lambda: service.worker.running is None)

    page.write("#draw-num_timesteps input", "1")
    page.click("#draw-go")
    page.until(lambda: "num_timesteps must be a whole number from 2" in page.text("#draw-status [role=alert]"))

    start(page, "draw", LONG)
    until(lambda: service.worker.running is not None)
    page.driver.get("about:blank")
    until(lambda: service.worker.running is None, 20)


def test_settings_come_from_a_picture_and_parts_in_any_order_and_everything_has_a_name(
    page: Browser, circle: Path
) -> None:
    page.click("#draw-more button")
    page.upload("#draw-dropped", circle)
    page.until(lambda: "circle.png" in page.text("#draw-status"))
    page.until(lambda: page.value("#draw-prompt textarea") == "a blue square")
    assert page.value("#draw-num_timesteps input") == "7"
    assert page.value("#draw-seed input") == str(2**60)
    assert page.value("#draw-width input") == "96"
    assert page.value("#draw-cfg_interval-from input[type=number]") == "0.25"
    page.click("#draw-think input")
    page.click("#draw-go")
    done(page, "draw")
    assert page.value("#draw-thoughts textarea")
    page.click("#draw-reset")
    page.until(lambda: page.value("#draw-num_timesteps input") == "50" and page.value("#draw-seed input") == "")
    page.click("#draw-last-seed")
    page.until(lambda: page.value("#draw-seed input") == str(2**60))
    page.click("#draw-random-seed")
    page.until(lambda: page.value("#draw-seed input") == "")
    page.click("#draw-ratio input")
    page.until(lambda: "4:3 (128×96)" in page.text("ul[role=listbox]"))
    page.all("ul[role=listbox] li")[2].click()
    page.until(lambda: page.value("#draw-height input") == "96")
    assert page.value("#draw-width input") == "128"

    page.tab("Mixed")
    page.upload("#mixed-picture-1", circle)
    page.until(lambda: page.find("#mixed-picture-1 img"))
    page.click("#mixed-add-text")
    page.until(lambda: page.find("#mixed-text-3"))
    page.click("#mixed-remove-part")
    page.until(lambda: not page.find("#mixed-text-3"))
    page.all("#mixed-output input")[1].click()
    page.until(lambda: page.find("#mixed-text-max_new_tokens"))
    page.write("#mixed-text-2 textarea", "What color is the circle?")
    page.click("#mixed-go")
    done(page, "mixed")
    assert page.value("#mixed-answer textarea") == "red"

    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [node for node in tree if not node["ignored"] and node["role"]["value"] in NEED_NAMES]
    assert len(controls) > 15
    assert [node for node in controls if not node.get("name", {}).get("value")] == []

    page.tab("Draw")
    page.until(lambda: page.find("#draw-prompt textarea")).click()
    for _ in range(30):
        page.press_tab()
        if page.driver.switch_to.active_element.get_attribute("id") == "draw-go":
            return
    pytest.fail("the tabulator never reaches the button that draws")


def test_the_routes_are_described_without_a_network(desktop: Browser, url: str) -> None:
    desktop.driver.get(f"{url}/docs")
    shown = desktop.until(lambda: desktop.text("main"))
    assert "/v1/images/generations" in shown and "/sdapi/v1/txt2img" in shown
    assert "cfg_text_scale" not in shown
    desktop.driver.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert "cfg_text_scale" in desktop.text("main")
    assert all(address.startswith(url) for address in desktop.requests())

"""The chat tab as a person has it, in a browser, with a model that asks for pictures."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from support.browser import DESKTOP, PHONE, Browser, unhurried_drawings, why_no_browser
from support.drawn_answers import WORDS, answers_with_pictures
from support.serving import ServerThread, served, until
from torch import Tensor

from lowmem_bagel.sampling.denoise import PictureSampler
from lowmem_bagel.serve.app import create_app

pytestmark = pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "a browser is there")
STEPS, LONG = "6", "5000"
DONE, WRITTEN = "#chat-status", "#chat-log"


@pytest.fixture(scope="module")
def server(page_port: int) -> Iterator[ServerThread]:
    with served(create_app, page=True, queue=3, port=page_port) as running:
        yield running


@pytest.fixture
def page(server: ServerThread, chromium: Browser, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    assert server.service.loaded is not None
    answers_with_pictures(monkeypatch, server.service.loaded.pipeline.model.tokenizer)
    with chromium.had_by(DESKTOP) as desktop:
        desktop.open(server.url)
        desktop.tab("Chat")
        yield desktop


def say(page: Browser, text: str, steps: str = STEPS) -> None:
    page.write("#chat-num_timesteps input", steps)
    page.write("#chat-prompt textarea", text)
    page.click("#chat-go")


def done(page: Browser) -> None:
    page.until(lambda: "Done" in page.text(DONE), 90)


def pictures(page: Browser) -> int:
    """That are there and can be seen."""
    seen = page.all("#chat-log img.lb-told")
    page.until(lambda: all(image.get_property("naturalWidth") for image in seen))
    return len(seen)


@contextmanager
def drawings_that_wait() -> Iterator[None]:
    """In the middle of a picture, while one looks at the page."""
    looked, velocity = threading.Event(), PictureSampler.velocity

    def waits(self: PictureSampler, x: Tensor, t: float, time: Tensor) -> Tensor:
        assert t > 0.5 or looked.wait(120)
        return velocity(self, x, t, time)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PictureSampler, "velocity", waits)
        try:
            yield
        finally:
            looked.set()


def test_a_chat_goes_on_is_taken_back_saved_and_opened(page: Browser, server: ServerThread, tmp_path: Path) -> None:
    with drawings_that_wait():  # the first text is there, and the picture forms
        say(page, "draw <b>one</b>")
        page.until(lambda: page.find("#chat-status .lb-preview"), 60)
        page.until(lambda: page.text(WRITTEN).endswith(f"draw <b>one</b>\nBAGEL\n{WORDS[0]}"))
        page.until(lambda: page.value("#chat-prompt textarea") == "")
        page.until(lambda: not page.find("#chat-undo-chat:enabled"))
    done(page)
    page.until(lambda: page.text(WRITTEN).endswith(WORDS[1]) and pictures(page) == 1)
    assert page.find("#chat-log img.lb-told").get_attribute("alt") == "Picture 1 of the answer"

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    page.upload("#chat-picture", tmp_path / "red.png")
    page.until(lambda: page.find("#chat-picture img"))
    say(page, "and this?")
    page.until(lambda: not page.find("#chat-picture img"))
    done(page)
    page.until(lambda: pictures(page) == 3 and page.text(WRITTEN).count("BAGEL") == 2)

    page.click("#chat-save-chat")
    saved = page.until(lambda: page.find("#chat-saved a")).get_attribute("href").partition("file=")[2]
    page.click("#chat-undo-chat")
    page.until(lambda: page.text(WRITTEN).count("BAGEL") == 1)
    page.click("#chat-new-chat")
    page.until(lambda: "What is said appears here" in page.text(WRITTEN))
    page.click("#chat-save-chat")
    page.until(lambda: page.text(DONE) == "Nothing was said yet.")
    open_saved(page, Path(saved))
    page.until(lambda: page.text(WRITTEN).count("BAGEL") == 2)
    page.until(lambda: pictures(page) == 3 and "turns: 2" in page.text(DONE))
    say(page, "go on")
    done(page)
    page.until(lambda: pictures(page) == 4 and page.text(WRITTEN).count("BAGEL") == 3)

    page.all("#language input")[1].click()
    page.until(lambda: page.text("#chat-go") == "发送")
    page.driver.execute_script("localStorage.clear()")
    page.driver.get("about:blank")
    assert server.service.loaded is not None
    until(lambda: not [chat for chat in server.service.loaded.pipeline.model.keepers if chat.kept_bytes], 30)


def open_saved(page: Browser, path: Path) -> None:
    page.until(lambda: page.driver.find_elements("css selector", "#chat-open"))
    field = page.until(lambda: page.driver.find_elements("css selector", "input[type=file][accept='.zip']"))[0]
    field.send_keys(str(path))


@unhurried_drawings()
def test_stopped_or_refused_it_is_as_it_was(page: Browser, server: ServerThread) -> None:
    say(page, "first", LONG)
    page.until(lambda: page.find("#chat-status .lb-preview"), 60)
    page.click("#chat-cancel")
    page.until(lambda: page.text(DONE) == "Cancelled.")
    page.until(lambda: "What is said appears here" in page.text(WRITTEN))
    page.until(lambda: page.value("#chat-prompt textarea") == "first")
    say(page, "first", "1")
    page.until(lambda: "num_timesteps must be a whole number from 2" in page.text("#chat-status [role=alert]"))
    say(page, "first")
    done(page)
    page.click("#chat-think input")
    say(page, "second")
    page.until(lambda: "think holds for all of a chat" in page.text("#chat-status [role=alert]"))
    page.click("#chat-think input")
    say(page, "second", LONG)
    until(lambda: server.service.worker.running is not None)
    page.driver.get("about:blank")
    until(lambda: server.service.worker.running is None, 20)


def test_a_phone_in_the_dark_in_chinese(
    chromium: Browser, server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.service.loaded is not None
    answers_with_pictures(monkeypatch, server.service.loaded.pipeline.model.tokenizer)
    with chromium.had_by(PHONE, "zh-CN", dark=True) as phone:
        phone.open(server.url)
        phone.until(lambda: phone.text("#draw-go") == "开始画")
        assert fits(phone)
        assert phone.driver.execute_script("return document.body.classList.contains('dark')")
        phone.tab("模型")
        phone.tab("对话")
        say(phone, "draw it")
        phone.until(lambda: "完成，用时" in phone.text(DONE), 90)
        assert fits(phone)
        # What is said next stands below what was said.
        above, below = (phone.find(place).location["y"] for place in ("#chat-log", "#chat-prompt"))
        assert above < below
        assert phone.find("#chat-log img.lb-told").get_attribute("src").startswith(server.url)


def fits(phone: Browser) -> bool:
    width, wide = phone.driver.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    return bool(wide <= width == PHONE[0])

"""A browser without a window, driven as a person would: what is on the page, waited for, clicked and read."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

T = TypeVar("T")
SECONDS = 30.0
"""That anything may take to appear."""
LONGEST_PAUSE = 0.2
"""Between looks: each keeps the browser, its driver and the page busy, and so what is waited for."""
GO_TO_TAB = """
const shown = [...document.querySelectorAll('button[role=tab]')].filter(tab => tab.offsetParent);
const tab = shown.find(tab => tab.innerText.trim() == arguments[0]);
if (tab) tab.click();
if (tab) return tab.ariaSelected == 'true';
// Where there is little room, the last ones are in a menu.
const menu = document.querySelector('.overflow-dropdown');
const inside = [...(menu ? menu.querySelectorAll('button') : [])];
const found = inside.find(button => button.innerText.trim() == arguments[0]);
if (found) found.click();
else document.querySelector('.overflow-menu > button')?.click();
return !!found;
"""
FIND = """
const found = [...document.querySelectorAll(arguments[0])].find(element => {
    const {width, height} = element.getBoundingClientRect();
    return width && height && element.checkVisibility({opacityProperty: true, visibilityProperty: true});
}) ?? null;
"""
FOUND = f"{FIND} return found;"
ENABLED = f"{FIND} return found?.matches(':disabled') ? null : found;"
VALUE = f"{FIND} return found && [found.value];"
WRITE = f"""{FIND}
if (!found || found.matches(':disabled')) return false;
found.focus();
found.select();
return document.execCommand(arguments[1] ? 'insertText' : 'delete', false, arguments[1]);
"""
"""As pasting does: a page that answers each key takes three times as long."""
TEXT = """
const element = document.querySelector(arguments[0]);
const seen = element && element.checkVisibility({visibilityProperty: true});
return seen ? element.innerText.replace(/\\s*\\n\\s*/g, '\\n').trim() : '';
"""
"""Asked many times a second; Selenium's own take ten times as long, for they walk through all that is inside."""
DESKTOP, PHONE = (1280, 900), (390, 844)
ONE_PROCESS = ("disable-site-isolation-trials", "renderer-process-limit=1", "in-process-gpu")
"""Draws what one person after the other sees, and knows the page's scripts after the first."""


def why_no_browser() -> str:
    """Why the tests of the page cannot run; empty where they can."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not installed (apt install chromium chromium-driver)" if missing else ""


@contextmanager
def browser(size: tuple[int, int] = DESKTOP, language: str = "en-US", dark: bool = False) -> Iterator[Browser]:
    """One for a single person; ended however what they do ends."""
    with chromium() as one, one.had_by(size, language, dark):
        yield one


@contextmanager
def chromium() -> Iterator[Browser]:
    """For one person after the other: a second to start, and another to load a page whose scripts it does not know."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    plain = ("no-sandbox", "headless=new", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars")
    for argument in (*plain, *ONE_PROCESS):
        options.add_argument(f"--{argument}")
    # Nothing outside this machine is found, whatever a page asks for.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@contextmanager
def unhurried_drawings() -> Iterator[None]:
    """Twenty steps a second, each of which the page shows, keep it so busy that a click waits for its turn."""
    from lowmem_bagel.sampling.denoise import PictureSampler

    velocity = PictureSampler.velocity

    def later(self: PictureSampler, *given: Any) -> Any:
        time.sleep(0.1)
        return velocity(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PictureSampler, "velocity", later)
        yield


class Browser:
    """A page and what is done with it. Elements are named by CSS selectors."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    @contextmanager
    def had_by(self, size: tuple[int, int] = DESKTOP, language: str = "en-US", dark: bool = False) -> Iterator[Browser]:
        """As a person with a window of that size and with these wishes finds it, who has never been anywhere."""
        do, agent = self.driver.execute_cdp_cmd, self.driver.execute_script("return navigator.userAgent")
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        do("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        do("Emulation.setEmulatedMedia", {"features": scheme})
        do("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": language})
        self.requests()
        try:
            yield self
        finally:
            origin = self.driver.execute_script("return origin")
            self.driver.get("about:blank")
            do("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "cookies,local_storage"})
            do("Network.clearBrowserCookies", {})

    def open(self, url: str) -> None:
        """Load the page, until its tabs stand and it has said what language it speaks."""
        self.driver.get(url)
        self.until(lambda: self.find("#draw-go") and self.driver.execute_script("return document.documentElement.lang"))

    def until(self, true: Callable[[], T], seconds: float = SECONDS) -> T:
        """What `true` gives once it is true; elements that were replaced meanwhile are looked for again."""
        end, pause = time.monotonic() + seconds, 0.02
        while True:
            try:
                found = true()
            except StaleElementReferenceException:
                found = None  # type: ignore[assignment]
            if found:
                return found
            assert time.monotonic() < end, f"not within {seconds} s; the page says {self.text('body')[:600]!r}"
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)

    def find(self, selector: str) -> Any:
        """The first visible element, or None."""
        return self.driver.execute_script(FOUND, selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def text(self, selector: str) -> str:
        """What is seen of the first such element."""
        return str(self.driver.execute_script(TEXT, selector))

    def value(self, selector: str) -> str:
        return str(self.until(lambda: self.driver.execute_script(VALUE, selector))[0])

    def click(self, selector: str) -> None:
        """Click an element once it can be."""

        def clicked() -> bool:
            found = self.driver.execute_script(ENABLED, selector)
            if not found:
                return False
            try:
                found.click()
            except WebDriverException:  # something still moves above it
                self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
                return False
            return True

        self.until(clicked)

    def tab(self, label: str) -> None:
        """Go to the tab of that name."""
        self.until(lambda: self.driver.execute_script(GO_TO_TAB, label))

    def write(self, selector: str, text: str) -> None:
        """Replace what a field holds."""
        self.until(lambda: self.driver.execute_script(WRITE, selector, text))
        self.until(lambda: self.value(selector) == text)

    def upload(self, place: str, path: Path) -> None:
        """Give a file to the field in a place, and wait until it is there."""
        field = self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, f"{place} input[type=file]"))[0]
        field.send_keys(str(path))

    def requests(self) -> list[str]:
        """The addresses of everything that was asked for since the last call."""
        import json

        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def shoot(self, path: Path) -> None:
        """What is seen, as a PNG."""
        self.driver.save_screenshot(str(path))

    def press_tab(self) -> None:
        """The tabulator, as a person who has no mouse goes on."""
        self.driver.switch_to.active_element.send_keys(Keys.TAB)

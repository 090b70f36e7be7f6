"""A browser before a server with a key: it is asked for it once, and the page then works as without."""

from __future__ import annotations

import pytest
from support.browser import Browser, why_no_browser
from support.serving import PROMPT, served

from lowmem_bagel.serve.app import create_app

pytestmark = pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "a browser is there")
KEY = "correct-horse-battery-staple"


def give_key(page: Browser, key: str) -> None:
    page.write("#key", key)
    page.click("button")


def test_the_key_opens_the_page_for_a_browser(chromium: Browser, page_port: int) -> None:
    with served(create_app, page=True, api_key=KEY, port=page_port) as server, chromium.had_by() as page:
        page.driver.get(server.url)
        assert page.find("#key").get_property("type") == "password"
        give_key(page, "wrong")
        page.until(lambda: "not the key" in page.text("[role=alert]"))
        give_key(page, KEY)
        page.until(lambda: page.find("#draw-go"))
        page.write("#draw-prompt textarea", PROMPT)
        page.write("#draw-num_timesteps input", "5")
        page.click("#draw-go")
        page.until(lambda: "Done" in page.text("#draw-status"), 60)
        shown = page.until(lambda: page.find("#draw-drawn img"))
        page.until(lambda: shown.get_property("naturalWidth") == 128)
        [cookie] = [cookie for cookie in page.driver.get_cookies() if "session" in cookie["name"]]
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert KEY not in cookie["value"]
        assert not page.driver.execute_script("return document.cookie")
        page.driver.get(f"{server.url}/docs")
        assert "/v1/images/generations" in page.text("main"), "it is asked no more, wherever it goes"

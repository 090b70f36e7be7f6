"""Pictures of the page for its documentation, to be looked at: `PYTHONPATH=tests python -m support.screenshots OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from lowmem_bagel.serve.app import create_app

from .browser import DESKTOP, PHONE, Browser, browser
from .serving import served

PROMPT = "a blue square to the left of a yellow triangle on a black background"
TALK = "a small blue circle on a white background. What color is the circle?"
SEED = "2"


def draw(page: Browser) -> None:
    page.write("#draw-prompt textarea", PROMPT)
    page.write("#draw-seed input", SEED)
    page.click("#draw-go")
    shown = page.until(lambda: page.find("#draw-drawn img"), 60)
    page.until(lambda: shown.get_property("naturalWidth"))
    page.driver.execute_script("scrollTo(0, 0); document.activeElement.blur()")


def talk(page: Browser) -> None:
    page.tab("Chat")
    page.write("#chat-prompt textarea", TALK)
    page.write("#chat-seed input", SEED)
    page.click("#chat-go")
    page.until(lambda: "Done" in page.text("#chat-status"), 120)
    page.driver.execute_script("scrollTo(0, 0); document.activeElement.blur()")


def kept(page: Browser, path: Path) -> None:
    """With few colors, so that it stays small."""
    page.shoot(path)
    with Image.open(path) as seen:
        seen.convert("RGB").quantize(256).save(path, optimize=True)
    print(path, path.stat().st_size)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with served(create_app, page=True) as server:
        for size, at in ((DESKTOP, "desktop"), (PHONE, "phone")):
            for language in ("en", "zh"):
                for dark in (False, True):
                    with browser(size, language, dark) as page:
                        page.open(server.url)
                        draw(page)
                        kept(page, out / f"page-{at}-{language}{'-dark' if dark else ''}.png")
            with browser(size) as page:
                page.open(server.url)
                talk(page)
                kept(page, out / f"page-{at}-chat.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

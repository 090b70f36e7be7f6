"""Pictures of the nodes in ComfyUI's front end for their documentation, to be looked at:
`PYTHONPATH=tests python -m support.comfyui_screenshots OUT [URL]`, of the ComfyUI that runs there or else of the
stand-in for its server.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem_bagel.integrations.comfyui import FOLDER

from .browser import browser
from .comfy import comfy_loaded
from .comfyui_front_end import FrontEnd
from .comfyui_server import comfy_server
from .screenshots import kept
from .serving import until

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.VueNodes.Enabled": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.RightSidePanel.IsOpen": False,
}
SIZE = (1440, 810)
STEPS = 30


@contextmanager
def served(url: str) -> Iterator[str]:
    if url:
        yield url
        return
    folder = Path(tempfile.mkdtemp())
    with comfy_loaded(folder / "models") as comfy, comfy_server(comfy, folder) as server:
        yield server.url


def asked(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"content-type": "application/json"})) as answer:
        text = answer.read()
        return json.loads(text) if text else None


def ran(front: FrontEnd, url: str) -> None:
    """The graph that is there, to its end."""
    before = len(asked(f"{url}api/history"))
    front.run()

    def ended() -> bool:
        runs = list(asked(f"{url}api/history").values())[before:]
        return bool(runs) and runs[-1]["status"]["status_str"] != "running"

    until(ended, 600)


def example(name: str) -> dict[str, Any]:
    flow: dict[str, Any] = json.loads((FOLDER / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return flow


def main(out: Path, url: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with served(url) as server, browser(SIZE) as page:
        for name, value in SETTINGS.items():
            asked(f"{server}api/settings/{name}", value)
        front = FrontEnd(page, server)
        front.load(example("convert-and-draw"))
        ran(front, server)
        page.until(lambda: front.node("PreviewImage")["pictures"] and "Job completed" not in front.text())
        kept(page, out / "comfyui.png")
        front.load(example("text-to-image"))
        front.set("LowmemBagelLoad", "path", "no-such-model")
        ran(front, server)
        front.until_told("no such folder: no-such-model")
        kept(page, out / "comfyui-error.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")

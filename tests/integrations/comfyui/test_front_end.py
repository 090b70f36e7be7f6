"""The nodes in ComfyUI's front end, in a browser, before a stand-in for its server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from support.browser import Browser, unhurried_drawings, why_no_browser
from support.comfy import Comfy
from support.comfyui_front_end import FrontEnd
from support.comfyui_server import ComfyServer, comfy_server
from support.paths import DATA
from support.serving import until

from lowmem_bagel import BagelPipeline
from lowmem_bagel.demo_checkpoint import FOLDER as DEMO
from lowmem_bagel.integrations.comfyui import FOLDER

pytestmark = pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "a browser is there")

EXAMPLES = sorted((FOLDER / "example_workflows").glob("*.json"))
FEW = 4
"""Timesteps."""


@pytest.fixture(scope="module")
def server(comfy: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfyui")
    with comfy_server(comfy, folder) as made:
        Image.new("RGB", (64, 64), "red").save(folder / "input" / "example.png")
        yield made


@pytest.fixture(scope="module")
def front(server: ComfyServer, chromium: Browser) -> Iterator[FrontEnd]:
    with chromium.had_by((1000, 600)) as page:
        yield FrontEnd(page, server.url)


def flow_of(name: str) -> dict[str, Any]:
    flow: dict[str, Any] = json.loads((FOLDER / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return flow


def small(flow: dict[str, Any], steps: int = FEW) -> dict[str, Any]:
    """The same, quickly drawn."""
    for node in flow["nodes"]:
        if node["type"] == "LowmemBagelTextToImage":
            node["widgets_values"][1:3] = [64, 32]
        if node["type"] == "LowmemBagelDrawingSettings":
            node["widgets_values"][0] = steps
    return flow


def ended(server: ComfyServer, runs: int) -> dict[str, Any]:
    """The status of the last run, once there were so many."""
    until(
        lambda: len(server.history) == runs and list(server.history.values())[-1]["status"]["status_str"] != "running"
    )
    status: dict[str, Any] = list(server.history.values())[-1]["status"]
    return status


def test_every_example_opens_whole(front: FrontEnd) -> None:
    """No node is missing, widgets have the names of our options and the values that were saved, links are there."""
    for example in EXAMPLES:
        flow = json.loads(example.read_text(encoding="utf-8"))
        front.load(flow)
        shown = front.nodes()
        assert [node["type"] for node in shown] == [node["type"] for node in flow["nodes"]] and len(shown) > 2
        assert all(node["known"] for node in shown), example.stem
        assert sum(linked for node in shown for _, linked in node["inputs"]) == len(flow["links"]), example.stem
        for node, saved in zip(shown, flow["nodes"], strict=True):
            values = [value for _, value in node["widgets"]][: len(saved["widgets_values"])]
            assert values == saved["widgets_values"], (example.stem, node["type"])
        drawing = next(node for node in shown if any(name == "seed" for name, _ in node["widgets"]))
        assert [name for name, _ in drawing["widgets"]][1:6] == [
            "width",
            "height",
            "seed",
            "control_after_generate",
            "speed",
        ]
        text = front.text()
        assert "BAGEL Load" in text and "max_vram" in text
        assert "issing" not in text, f"{example.stem}: {text}"


def test_saved_values_are_those_of_the_widgets_that_they_were_saved_of(front: FrontEnd) -> None:
    saved = json.loads((DATA / "comfyui" / "saved_widgets.json").read_text("utf-8"))
    nodes = [
        {"id": id, "type": type, "pos": [0, 0], "size": [300, 300], "widgets_values": [value for _, value in values]}
        for id, (type, values) in enumerate(saved.items(), 1)
    ]
    front.load({"last_node_id": len(nodes), "last_link_id": 0, "nodes": nodes, "links": [], "version": 0.4})
    assert {node["type"]: node["widgets"] for node in front.nodes()} == saved


@unhurried_drawings()
def test_a_graph_is_run_and_stopped_and_a_mistake_is_told(server: ComfyServer, front: FrontEnd) -> None:
    """By the buttons of the front end: the picture that it shows is the pipeline's, a stop ends it between steps, and
    its error box has our line."""
    front.load(small(flow_of("convert-and-draw")))
    front.set("LowmemBagelConvert", "to", "bf16")
    front.run()
    assert ended(server, 1)["status_str"] == "success"
    until(lambda: front.node("PreviewImage")["pictures"] and front.node("PreviewImage")["pictures"][0][1])
    ((source, width, height),) = front.node("PreviewImage")["pictures"]
    assert (width, height) == (64, 32)
    with urlopen(source) as answer:
        seen = np.asarray(Image.open(BytesIO(answer.read())).convert("RGB"))
    drawn = BagelPipeline.from_pretrained(server.comfy.models / "bagel" / f"{DEMO.name}-bf16", device="cpu").generate(
        "a red circle on a white background", width=64, height=32, seed=7, num_timesteps=FEW
    )
    assert np.array_equal(seen, np.asarray(drawn.image))
    assert front.heard() == {"progress", "b_preview_with_metadata", "executed"}

    front.load(small(flow_of("convert-and-draw"), 5000))
    front.set("LowmemBagelConvert", "to", "bf16")
    front.run()
    until(lambda: server.steps > 5)
    front.stop()
    assert ended(server, 2)["status_str"] == "interrupted"

    wrong = server.comfy.models / "bagel" / f"{DEMO.name}-bf16" / "variant.json"
    wrong.write_text(wrong.read_text().replace('"bf16"', '"bf17"'))
    mistakes = (
        ("path", "no-such-model", "no such folder: no-such-model; give a BAGEL checkpoint or variant folder"),
        ("path", str(wrong.parent), "bf17"),
        ("max_ram", "1MB", "of RAM, and 1 MB may be used"),
    )
    for runs, (widget, value, line) in enumerate(mistakes, 3):
        front.load(flow_of("text-to-image"))
        front.set("LowmemBagelLoad", widget, value)
        front.run()
        assert ended(server, runs)["status_str"] == "error"
        front.until_told(line)

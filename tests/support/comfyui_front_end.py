"""ComfyUI's front end in a browser: workflows loaded into it, run, stopped and looked at, as a person would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .browser import Browser

RUN, STOP = "[data-testid=queue-button]", "[data-testid=interrupt-button], button[aria-label^='Cancel current run']"
READY = "return !!(window.app?.graph && window.app.extensionManager && document.querySelector('canvas'))"
LOAD = "window.app.loadGraphData(arguments[0]).then(() => arguments[1](''), error => arguments[1](String(error)))"
LISTEN = """
window.heard = [];
for (const kind of ['progress', 'b_preview_with_metadata', 'executed'])
    window.app.api.addEventListener(kind, () => window.heard.push(kind));
"""
NODES = """
return window.app.graph.nodes.map(node => ({
    type: node.type,
    known: node.type in LiteGraph.registered_node_types,
    widgets: (node.widgets ?? []).map(widget => [widget.name, widget.value]),
    inputs: (node.inputs ?? []).map(put => [put.name, put.link != null]),
    pictures: (node.imgs ?? []).map(image => [image.src, image.naturalWidth, image.naturalHeight]),
}))
"""
SET = """
const node = window.app.graph.nodes.find(node => node.type == arguments[0]);
node.widgets.find(widget => widget.name == arguments[1]).value = arguments[2];
"""
SHOW_DETAILS = """
const button = [...document.querySelectorAll('button')].find(button => button.innerText.includes('View details'));
button?.click();
"""


class FrontEnd:
    """A page of the front end. Nodes are named by their type."""

    def __init__(self, page: Browser, url: str) -> None:
        self.page = page
        page.driver.set_script_timeout(60)
        page.driver.get(url)
        page.until(lambda: page.driver.execute_script(READY) and page.find(RUN), 60)
        page.driver.execute_script(LISTEN)

    def load(self, flow: Mapping[str, Any]) -> None:
        """A saved workflow, in place of what is there."""
        failed = self.page.driver.execute_async_script(LOAD, flow)
        assert not failed, failed

    def nodes(self) -> list[dict[str, Any]]:
        """Of the graph: type, whether it is known, widgets and inputs by name, pictures that it shows."""
        found: list[dict[str, Any]] = self.page.driver.execute_script(NODES)
        return found

    def node(self, type: str) -> dict[str, Any]:
        return next(node for node in self.nodes() if node["type"] == type)

    def set(self, type: str, widget: str, value: Any) -> None:
        self.page.driver.execute_script(SET, type, widget, value)

    def run(self) -> None:
        self.page.click(RUN)

    def stop(self) -> None:
        self.page.click(STOP)

    def until_told(self, line: str) -> None:
        """Until its box of what went wrong, opened where there is something new, says a line."""

        def told() -> bool:
            self.page.driver.execute_script(SHOW_DETAILS)
            return line in self.text()

        self.page.until(told)

    def heard(self) -> set[str]:
        """Kinds of messages that came since it was opened."""
        return set(self.page.driver.execute_script("return window.heard"))

    def text(self) -> str:
        """All that is written on the page."""
        return self.page.text("body")

"""The page of the API's routes: whole, and made of the OpenAPI document."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from support.serving import client_for, service_of

from lowmem_bagel.serve.app import create_app
from lowmem_bagel.serve.docs_page import docs_page


class Read(HTMLParser):
    """What a page's elements hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.codes: list[str] = []
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.setdefault(tag, []).append(dict(attrs))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "code":
            self.codes.append(data)


def test_every_route_and_every_field_is_there_and_nothing_from_elsewhere() -> None:
    app = create_app(service_of(page=False))
    with client_for(app) as client:
        answer = client.get("/docs")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    page, document = Read(answer.text), app.openapi()
    assert set(document["paths"]) <= set(page.codes)
    fields = {name for shape in document["components"]["schemas"].values() for name in shape.get("properties", {})}
    assert len(fields) > 50 and fields <= set(page.codes)
    assert {"height", "image", "cfg_text_scale"} <= set(page.codes)
    assert not {"script", "link", "img", "iframe"} & page.tags.keys()
    links = {str(link["href"]) for link in page.tags["a"]}
    ids = {f"#{about['id']}" for about in page.tags["details"] if "id" in about}
    assert links <= ids | {"/openapi.json"}


def test_what_is_described_cannot_become_part_of_the_page() -> None:
    evil = "<script>alert(1)</script>"
    field: dict[str, Any] = {"type": "string", "description": evil, "default": evil, "enum": [evil]}
    shape = {"properties": {evil: field}, "description": evil}
    body = {"content": {"application/json": {"schema": {"properties": {evil: field}}}}}
    route = {"summary": evil, "description": evil, "tags": [evil], "requestBody": body}
    about = {"title": evil, "version": "1", "summary": evil}
    made = docs_page({"info": about, "paths": {f"/{evil}": {"get": route}}, "components": {"schemas": {"A": shape}}})
    assert "script" not in Read(made).tags

"""`/docs`: the API's routes and their fields for people, made of the OpenAPI document; one page without any script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Schema = Mapping[str, Any]
BOUNDS = {
    "minimum": "from {:g}", "exclusiveMinimum": "above {:g}", "maximum": "up to {:g}", "exclusiveMaximum": "below {:g}",
    "minLength": "characters from {}", "maxLength": "characters up to {}", "minItems": "items from {}",
    "maxItems": "items up to {}", "default": "by default {}",
}  # fmt: skip
STYLE = """:root{color-scheme:light dark}body{font:1rem/1.5 system-ui;max-width:62rem;margin:0 auto;padding:1rem}
h2{margin:2rem 0 .5rem;text-transform:capitalize}details{border:1px solid #8886;border-radius:.5rem;margin:.5rem 0;
padding:.5rem 1rem}summary{cursor:pointer;overflow-wrap:anywhere}table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-top:1px solid #8884}code{font-size:.95em}
.table{overflow-x:auto}.method{display:inline-block;min-width:3.5rem;font-weight:700}"""


def docs_page(document: Schema) -> str:
    """The page of an OpenAPI document."""
    return _Document(document).page()


class _Document:
    def __init__(self, document: Schema) -> None:
        self.document = document
        self.shapes: dict[str, Schema] = document["components"]["schemas"]

    def page(self) -> str:
        about = self.document["info"]
        title = escape(f"{about['title']} {about['version']}")
        routes = "".join(
            f"<section><h2>{escape(tag)}</h2>{''.join(self._route(*route) for route in routes)}</section>"
            for tag, routes in self._routes().items()
        )
        shapes = "".join(
            f'<details id="{name}"><summary><code>{name}</code> {escape(shape.get("description", ""))}</summary>'
            f"{self._fields('Fields', shape)}</details>"
            for name, shape in self.shapes.items()
        )
        begin = f"{escape(about.get('summary', ''))} For programs, the same is at "
        link = '<a href="/openapi.json">/openapi.json</a>'
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
            f"<main><h1>{title}</h1><p>{begin}{link}.</p>{routes}<section><h2>shapes</h2>{shapes}</section></main></html>"
        )

    def _routes(self) -> dict[str, list[tuple[str, str, Schema]]]:
        """Method, path and description of each, by its first tag."""
        found: dict[str, list[tuple[str, str, Schema]]] = {}
        for path, methods in self.document["paths"].items():
            for method, route in methods.items():
                found.setdefault(next(iter(route.get("tags", ())), "others"), []).append((method.upper(), path, route))
        return found

    def _route(self, method: str, path: str, route: Schema) -> str:
        parts = [f"<p>{escape(route['description'])}</p>"] if "description" in route else []
        asked = [self._row(one["name"], one["schema"], one) for one in route.get("parameters", ())]
        parts.append(_table("Parameters", asked))
        for kind, content in route.get("requestBody", {}).get("content", {}).items():
            parts.append(self._fields(f"Body, {kind}", content["schema"]))
        for status, answer in route.get("responses", {}).items():
            for kind, content in answer.get("content", {}).items():
                if content.get("schema") and status.isdecimal():
                    parts.append(self._fields(f"Answer {status}, {kind}", content["schema"]))
        head = f'<span class="method">{method}</span> <code>{escape(path)}</code> {escape(route.get("summary", ""))}'
        return f"<details><summary>{head}</summary>{''.join(parts)}</details>"

    def _fields(self, title: str, schema: Schema) -> str:
        whole = self._whole(schema)
        needed = whole.get("required", ())
        fields = whole.get("properties", {}).items()
        return _table(title, [self._row(name, field, {"required": name in needed}) for name, field in fields])

    def _row(self, name: str, schema: Schema, about: Schema) -> tuple[str, str, str]:
        """Name, type in HTML, and meaning of a field."""
        described = about.get("description") or schema.get("description", "")
        said = [
            words.format(one[key])
            for one in (schema, *_choices(schema))
            for key, words in BOUNDS.items()
            if one.get(key) is not None
        ]
        bounds = "; ".join(dict.fromkeys([*(["needed"] if about.get("required") else []), *said]))
        return name, self._type(schema), f"{described} ({bounds})" if bounds else described

    def _type(self, schema: Schema) -> str:
        """In HTML; what is None stands for what is left out."""
        kinds = (self._kind(one) for one in _choices(schema) or [schema])
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null")) or "anything"

    def _kind(self, schema: Schema) -> str:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return f'<a href="#{name}">{name}</a>'
        if "enum" in schema or "const" in schema:
            given = schema.get("enum", [schema.get("const")])
            return " or ".join(escape(json.dumps(value, ensure_ascii=False)) for value in given)
        if schema.get("type") == "array":
            return f"list of {self._type(schema.get('items', {}))}"
        return "file" if schema.get("format") == "binary" else escape(str(schema.get("type", "anything")))

    def _whole(self, schema: Schema) -> Schema:
        return self.shapes[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _choices(schema: Schema) -> Sequence[Schema]:
    """What a value may be, where there is a choice."""
    found: Sequence[Schema] = schema.get("anyOf") or schema.get("oneOf") or ()
    return found


def _table(title: str, rows: Sequence[tuple[str, str, str]]) -> str:
    body = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{escape(meaning)}</td></tr>"
        for name, kind, meaning in rows
    )
    return f'<h3>{escape(title)}</h3><div class="table"><table>{body}</table></div>' if rows else ""

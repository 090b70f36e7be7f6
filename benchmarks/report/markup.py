"""HTML that cannot be broken by what is in it: text is escaped unless it was made here."""

from __future__ import annotations

import base64
from html import escape

VOID = ("br", "img", "meta", "source")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def el(name: str, /, *inside: str, **attributes: str) -> Html:
    """An element; attributes' names without the underscore that Python may need at their ends."""
    said = "".join(f' {key.rstrip("_").replace("_", "-")}="{_safe(value)}"' for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{said}/>")
    return Html(f"<{name}{said}>{join(*inside)}</{name}>")


def join(*inside: str) -> Html:
    return Html("".join(each if isinstance(each, Html) else _safe(each) for each in inside))


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _safe(text: str) -> str:
    """Escaped, and without the control characters that no HTML may have."""
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))

"""Packages that may be missing, and a public link that may not be had."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from lowmem_bagel.errors import MissingExtraError
from lowmem_bagel.serve import extras
from lowmem_bagel.serve.options import ServeOptions
from lowmem_bagel.serve.sharing import share

KEY = "k" * 16


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name in missing else object())


def checked(**options: Any) -> list[str]:
    said: list[str] = []
    extras.check_extras(ServeOptions(**options), said.append)
    return said


@pytest.mark.parametrize("module", extras.OF_SERVER)
def test_without_the_servers_packages_nothing_begins(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, module)
    with pytest.raises(MissingExtraError, match=r'pip install "lowmem-bagel\[serve\]"'):
        checked()


def test_without_the_pages_package_there_is_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "gradio")
    assert "lowmem-bagel[webui]" in checked()[0]
    assert checked(page=False) == []
    with pytest.raises(MissingExtraError, match="a public link needs gradio"):
        checked(share=True, api_key=KEY)


def tunnels(monkeypatch: pytest.MonkeyPatch, opened: Callable[..., str]) -> str:
    """What is said of a link, with these tunnels in place of Gradio's."""
    networking: Any = ModuleType("gradio.networking")
    networking.setup_tunnel = opened
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    monkeypatch.setitem(sys.modules, "gradio.networking", networking)
    said: list[str] = []
    share(7860, said.append).join(10)
    return said[0]


def test_a_public_link_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[str] = []

    def opened(host: str, port: int, token: str, *_: object) -> str:
        tokens.append(token)
        return f"https://link.example/{host}/{port}"

    assert "https://link.example/127.0.0.1/7860" in tunnels(monkeypatch, opened)
    tunnels(monkeypatch, opened)
    assert len(set(tokens)) == 2


def test_no_public_link_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> str:
        raise RuntimeError("Could not get share link from Gradio API Server.")

    assert tunnels(monkeypatch, opened) == "note: no public link: Could not get share link from Gradio API Server."

"""Chats of pages: one each, left alone while it is answered, and not more than are remembered."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from support.serving import service_of

from lowmem_bagel.pictures.opening import Picture
from lowmem_bagel.serve.page.actions import Clients
from lowmem_bagel.serve.page.markup import Part, Shown

REQUEST: Any = SimpleNamespace(session_hash="a")


@pytest.fixture
def talk() -> Any:
    """Imported here, with Gradio, which no other process of tests needs."""
    from lowmem_bagel.serve.page import talk

    return talk


@pytest.fixture
def desk(talk: Any) -> Any:
    service = service_of()
    return talk.TalkDesk(service, Clients(service), None, status="status", log="log", open="open", saved="saved")


def test_pages_that_talked_least_recently_are_forgotten(desk: Any, talk: Any) -> None:
    first = desk._of("first")
    for number in range(talk.MOST - 1):
        desk._of(str(number))
    assert desk._of("first") is first
    desk._of("one more")
    assert desk._of("first") is first and len(desk._talks) == talk.MOST and "0" not in desk._talks
    desk.leave("first")
    assert desk._of("first") is not first


def test_a_picture_that_cannot_be_written_leaves_its_place(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    picture = Picture(Image.new("RGB", (8, 8)), ())
    assert talk._kept_terms([picture, "look"], "en")[0].picture is not None
    monkeypatch.setattr(Path, "mkdir", full)
    assert talk._kept_terms([picture, "look"], "zh") == [Part("（有一张图片无法写入，因此无法显示。）"), Part("look")]


def test_while_it_is_answered_a_chat_is_left_alone(desk: Any, talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = SimpleNamespace(undo=lambda: True)
    mine = desk._of("a", talk.Talk(chat, [Shown([Part("hello")])]))
    with monkeypatch.context() as patch:
        patch.setattr(desk.clients, "waits", lambda client, tab: (client, tab) == ("a", talk.TAB))
        for answer in (desk.take_back("en", REQUEST), desk.begin_anew("zh", REQUEST)):
            assert set(answer) == {"status"} and ("answered" in answer["status"] or "回答中" in answer["status"])
        assert desk._of("a") is mine and len(mine.turns) == 1
    assert "taken back" in desk.take_back("en", REQUEST)["status"] and not mine.turns
    desk.begin_anew("en", REQUEST)
    assert desk._of("a") is not mine
    assert "Nothing was said" in desk.take_back("en", REQUEST)["status"]

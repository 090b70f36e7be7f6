"""Chats as terms, and answers in pieces."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lowmem_bagel.serve.intake import Link
from lowmem_bagel.serve.openai_chat import Cut, settings_of, terms_of
from lowmem_bagel.serve.openai_schemas import Message, chat_request, text_options

PICTURE = {"type": "image_url", "image_url": {"url": "data:,1"}}
BARE = {"type": "image_url", "image_url": "data:,2"}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


@pytest.mark.parametrize(
    ("contents", "terms"),
    [
        (["a", "b"], ["a", "b"]),
        ([[text("a"), text("b")]], ["a\nb"]),
        ([[text("a"), PICTURE, text("b"), text("c")], "d"], ["a", Link("data:,1"), "b\nc", "d"]),
        ([[PICTURE, BARE, text(" ")], None, ""], [Link("data:,1"), Link("data:,2")]),
    ],
)
def test_each_turn_is_a_block(contents: list[Any], terms: list[Any]) -> None:
    messages = [Message.model_validate({"role": "user", "content": content}) for content in contents]
    assert terms_of(messages) == terms


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0, "top_p": 1.0}, {"do_sample": False, "top_p": 1.0}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"top_p": 0.5}, {"do_sample": True, "top_p": 0.5}),
        ({"top_p": 0}, {"do_sample": True, "top_p": 1e-6}),
        ({"temperature": 1, "do_sample": False}, {"do_sample": False, "temperature": 1.0}),
        ({"max_tokens": 5, "max_completion_tokens": 7}, {"do_sample": False, "max_new_tokens": 8}),
        ({"max_tokens": 5, "max_new_tokens": 3}, {"do_sample": False, "max_new_tokens": 3}),
        ({"seed": 4, "think": True}, {"do_sample": False, "seed": 4, "think": True}),
    ],
)
def test_names_of_openai_are_our_settings(asked: dict[str, Any], settings: dict[str, Any]) -> None:
    body = chat_request().model_validate({"messages": [{"role": "user", "content": "a"}], **asked})
    assert settings_of(body, text_options()) == settings


@pytest.mark.parametrize("seed", range(200))
def test_pieces_are_the_text_up_to_its_first_stop(seed: int) -> None:
    chance = random.Random(seed)
    whole = "".join(chance.choice("abc") for _ in range(chance.randrange(1, 30)))
    stops = tuple("".join(chance.choice("abc") for _ in range(chance.randrange(1, 4))) for _ in range(seed % 3))
    cut, pieces, end = Cut(stops), [], 0
    while end < len(whole) and not cut.stopped:
        end = min(len(whole), end + chance.randrange(1, 5))
        pieces.append(cut.feed(whole[:end], end == len(whole)))
    places = [place for place in map(whole.find, stops) if place >= 0]
    assert "".join(pieces) == whole[: min(places, default=len(whole))]
    assert cut.stopped == bool(places)
    assert cut.feed(whole + "more", True) == "" or not places


def test_half_a_character_waits_for_its_other_half() -> None:
    cut = Cut(())
    assert [cut.feed("a\ufffd", False), cut.feed("a\u4e00", False), cut.feed("a\u4e00\ufffd", True)] == [
        "a", "\u4e00", "\ufffd",
    ]  # fmt: skip

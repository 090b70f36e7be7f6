"""`lowmem-bagel chat`, by lines from a pipe and by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.command import Ran
from support.pictures import noise
from support.scripted import Script

from lowmem_bagel import BagelPipeline
from lowmem_bagel.generation.conversing import Conversing
from lowmem_bagel.pictures.saving import read_metadata

SMALL = ("--height", 32, "--width", 48, "--num-timesteps", 2, "--seed", 5, "--max-new-tokens", 12)


class Typed(io.StringIO):
    """Lines that come from a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(
    small_pictures: BagelPipeline, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)

    def run(*lines: str, by_hand: bool = False, flags: tuple[Any, ...] = ()) -> Ran:
        monkeypatch.setattr("sys.stdin", (Typed if by_hand else io.StringIO)("".join(f"{line}\n" for line in lines)))
        return cli("chat", "-m", small_pictures.model.folder.path, "--device", "cpu", *SMALL, *flags)

    return run


@pytest.fixture
def script(small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Answers with a picture, then with words, then with a picture."""
    script, tokenizer = Script(monkeypatch), small_pictures.model.tokenizer
    words, ask, end = tokenizer.encode("a circle"), tokenizer.vision_start, tokenizer.im_end
    script.say(words, ask, words, end, words, end, words, ask, words, end)
    return script


def test_lines_of_a_pipe_are_turns(talk: Callable[..., Ran], script: Script, tmp_path: Path) -> None:
    Image.fromarray(noise(40, 56)).save(tmp_path / "in put.png")
    (tmp_path / "chat-01.png").write_bytes(b"an earlier chat's")
    ran = talk(
        "/image in put.png", "look", "", "//and", "/undo", "/save c.zip", "/open c.zip", "again", "/quit", "never"
    )
    assert ran.code == 0, ran.err
    assert ran.out == "a circle\n[chat-02.png]\na circle\na circle\na circle\n[chat-03.png]\na circle\n"
    assert read_metadata("chat-02.png")["said"] == "a circle"
    for said in ("given: 1 for", "undone: 1 turns are left", "saved: c.zip", "opened: 1 turns"):
        assert said in ran.err


def test_events_are_a_line_each(talk: Callable[..., Ran], script: Script) -> None:
    ran = talk("look", "/save c.zip", flags=("--json",))
    assert ran.code == 0, ran.err
    events = [json.loads(line) for line in ran.out.splitlines()]
    shown = [event["event"] for event in events if event["event"] != "token"]
    assert shown == ["begin", "text", "step", "picture", "text", "end", "saved"]
    assert events[-2]["ended"] == "text" and events[-2]["seed"] == 5
    assert next(event for event in events if event["event"] == "picture")["settings"]["seed"] == 6


@pytest.mark.parametrize(("line", "wrong"), [
    ("/dance", "unknown command /dance; there are /image"), ("/image", "/image needs a path"),
    ("/image none.png", "none.png"), ("/open none.zip", "no such chat: none.zip"), ("/save no/c.zip", "cannot write"),
])  # fmt: skip
def test_what_fails_ends_a_pipe_and_not_a_terminal(talk: Callable[..., Ran], line: str, wrong: str) -> None:
    ran = talk(line, "/undo")
    assert ran.code == 2 and wrong in ran.err and "nothing to undo" not in ran.err
    ran = talk(line, "/undo", "/help", by_hand=True)
    assert ran.code == 0 and wrong in ran.err and "nothing to undo" in ran.err and "/save: Keep the chat" in ran.err


def test_by_hand_an_interrupt_ends_a_turn_alone(talk: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversing, "carry_out", interrupted)
    ran = talk("look", "/undo", by_hand=True)
    assert ran.code == 0 and "stopped; the chat is as it was" in ran.err and "nothing to undo" in ran.err
    assert talk("look", "/undo").code == 130


def test_what_is_refused_before_loading(talk: Callable[..., Ran], tmp_path: Path) -> None:
    assert "unknown style 'cubist'" in talk(flags=("--style", "cubist")).err
    ran = talk(flags=("--open", "none.zip"))
    assert ran.code == 2 and "no such chat" in ran.err
    assert talk(flags=("-o", "none/chat.png")).code == 2


def test_memory_is_planned_for_its_turns(talk: Callable[..., Ran]) -> None:
    ran = talk("hello", flags=("--turns", 1000, "--max-rounds", 4, "--max-ram", "2GB"))
    assert ran.code == 2 and "chats (turns: 1000, pictures each: 4)" in ran.err and "turns of a chat" in ran.err

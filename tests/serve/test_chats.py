"""Turns of chats through the queue: piece by piece, fair, stopped between steps, and each chat left whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.drawn_answers import WORDS, answers_with_pictures
from support.serving import LONG, PROMPT, QUICK, running_service, until

from lowmem_bagel.errors import BusyError, Cancelled, ChatError, SettingError, TimeLimitError
from lowmem_bagel.generation.chat import Chat
from lowmem_bagel.generation.conversing import Said
from lowmem_bagel.serve import service as serving
from lowmem_bagel.serve.jobs import Job, Progress
from lowmem_bagel.serve.kept_chats import KeptChats
from lowmem_bagel.serve.metrics import task_of
from lowmem_bagel.serve.service import Service

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_timesteps": 4, "seed": 3, "max_new_tokens": 40}
ENDLESS = SMALL | {"num_timesteps": 5000}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(queue=3) as made:
        yield made


@pytest.fixture
def drawing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert service.loaded is not None
    answers_with_pictures(monkeypatch, service.loaded.pipeline.model.tokenizer)


def seen(job: Job) -> list[Progress]:
    """All that is told of it, to its end."""
    found = [job.wait(-1)]
    while not found[-1].over:
        found.append(job.wait(found[-1].version, 60))
    return found


def kinds(progress: Progress) -> str:
    return "".join("T" if isinstance(piece, Said) else "P" for piece in progress.pieces)


def test_an_answer_comes_piece_by_piece_and_is_the_pipelines(service: Service, drawing: None) -> None:
    chat = service.chat({"think": False})
    told = seen(service.say(chat, ["draw a circle"], SMALL, "a", previews=True))
    shapes = [kinds(progress) for progress in told]
    assert shapes == sorted(shapes, key=len) and {"", "T", "TPT"} <= {*shapes}
    assert all(progress.text == "" for progress in told if progress.step)
    last = told[-1]
    assert last.answer is not None and tuple(last.pieces) == last.answer.pieces and last.answer.texts == [*WORDS]
    assert last.result is None and len(chat.turns) == 1
    assert service.loaded is not None
    alone = service.loaded.pipeline.chat()
    assert alone.say("draw a circle", **SMALL).images[0].tobytes() == last.answer.images[0].tobytes()
    # The next turn is in the context of this one, and what an edit's defaults are holds in it.
    job = service.say(chat, [Image.new("RGB", (64, 64), "red"), "and this?"], SMALL, "a")
    assert job.predicted > 0 and task_of(job) == "chat"
    assert seen(job)[-1].state == "done" and len(chat.turns) == 2
    assert chat.turns[1].settings.picture.cfg_img_scale == 2.0 != chat.turns[0].settings.picture.cfg_img_scale


@pytest.mark.parametrize("at", ["text", "step", "repeated"])
def test_stopped_anywhere_it_is_as_it_was(service: Service, drawing: None, at: str) -> None:
    chat = service.chat({})
    seen(service.say(chat, ["first"], SMALL, "a"))
    if at == "repeated":
        chat.forget()
    job = service.say(chat, ["second"], ENDLESS, "a")
    if at == "step":
        until(lambda: job.progress.step > 2)
    service.cancel(job)
    assert isinstance(seen(job)[-1].error, Cancelled)
    assert [turn.terms for turn in chat.turns] == [("first",)]
    assert seen(service.say(chat, ["third"], SMALL, "a"))[-1].state == "done" and len(chat.turns) == 2


def test_earlier_turns_that_are_read_again_can_be_stopped(
    service: Service, drawing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = service.chat({})
    seen(service.say(chat, ["first"], SMALL, "a"))
    chat.forget()
    events: list[str] = []

    def stopping(event: object) -> bool:
        events.append(type(event).__name__)
        return len(events) < 3

    with pytest.raises(Cancelled):
        chat.say("second", callback=stopping, **SMALL)
    assert events == ["Repeated"] * 3 and len(chat.turns) == 1


def test_who_talks_delays_nobody_by_more_than_a_turn(service: Service, drawing: None) -> None:
    running = service.submit([PROMPT], "image", LONG, "c")
    until(lambda: running.progress.step)
    mine = [service.say(service.chat({}), ["hello"], SMALL, "a") for _ in range(2)]
    other = service.submit([PROMPT], "image", QUICK, "b")
    assert service.queue.order() == [mine[0], other, mine[1]]
    with pytest.raises(BusyError):
        service.say(service.chat({}), ["hello"], SMALL, "d")
    service.cancel(running)
    assert all(seen(job)[-1].state == "done" for job in (*mine, other))


def test_what_is_impossible_is_refused_before_it_waits(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match="unknown style"):
        service.chat({"style": "cubist"})
    chat = service.chat({"think": False, "style": "auto"})
    for given, wrong in (({"think": True}, "think holds"), ({"num_timesteps": 1}, "num_timesteps")):
        with pytest.raises(SettingError, match=wrong):
            service.say(chat, ["x"], given, "a")
    with pytest.raises(SettingError, match="pictures; this server takes"):
        service.say(chat, [Image.new("RGB", (32, 32))] * 9, {}, "a")
    (tmp_path / "none.zip").write_bytes(b"none")
    with pytest.raises(ChatError, match="not a saved chat"):
        service.open_chat(tmp_path / "none.zip")
    assert not service.queue.order()


def test_a_saved_chat_goes_on_within_bounds(
    service: Service, drawing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = service.chat({})
    seen(service.say(chat, ["first"], SMALL, "a"))
    path = chat.save(tmp_path / "c.zip")
    again = service.open_chat(path)
    assert seen(service.say(again, ["second"], SMALL | {"style": "auto", "think": False}, "a"))[-1].state == "done"
    monkeypatch.setattr(serving, "MAX_CHAT_PIXELS", 100)
    with pytest.raises(ChatError, match="1,024 pixels; 100 are taken"):
        service.open_chat(path)
    with pytest.raises(SettingError, match="begin another one"):
        service.say(again, ["third"], SMALL, "a")


def test_a_turn_may_run_for_so_long(drawing: None) -> None:
    with running_service(time_limit=1) as made:
        chat = made.chat({})
        assert isinstance(seen(made.say(chat, ["x"], ENDLESS, "a"))[-1].error, TimeLimitError)
        assert chat.turns == ()


def test_keys_stay_with_those_that_were_answered_last(service: Service, drawing: None) -> None:
    chats = [service.chat({}) for _ in range(3)]
    for chat in chats:
        seen(service.say(chat, ["first"], SMALL, "a"))
    each = chats[0].kept_bytes
    assert each > 0 and {chat.kept_bytes for chat in chats} == {each}
    room = KeptChats(each)
    for chat in chats:
        room.make_room(chat)
    assert [chat.kept_bytes for chat in chats] == [0, each, each]
    room.make_room(chats[1])
    assert [chat.kept_bytes for chat in chats] == [0, each, each]
    room.make_room(chats[0])
    assert [chat.kept_bytes for chat in chats] == [0, each, 0]
    gone: Chat | None = chats.pop(1)
    del chat, gone
    room.make_room(chats[0])
    assert len(room._answered) == 2

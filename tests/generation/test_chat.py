"""A conversation: its contexts from turn to turn, and what it is when it was saved and opened again."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.devices import shared
from support.pictures import noise
from support.scripted import Script

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import Cancelled, ChatError, OutputError, SettingError
from lowmem_bagel.generation.chat import Chat
from lowmem_bagel.generation.conversing import Answer, Conversing, Drawn
from lowmem_bagel.model.decoder import Decoder

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_timesteps": 2, "seed": 5, "max_new_tokens": 8}
PICTURE = Image.fromarray(noise(40, 56))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(monkeypatch)


class Talk:
    """Says the same in any chat: a picture in the first answer, one in the third; all that is told of the last."""

    def __init__(self, pipe: BagelPipeline, script: Script) -> None:
        tokenizer = pipe.model.tokenizer
        self.script = script
        ask, end = tokenizer.vision_start, tokenizer.im_end
        self.turns: list[tuple[list[Any], list[int]]] = [
            ([PICTURE, "look"], [70, 71, ask, 72, end]),
            (["and?"], [73, 74, end]),
            (["more"], [75, ask, 76, ask, 77]),
        ]

    def say(self, chat: Chat, number: int, **settings: Any) -> tuple[Answer, list[torch.Tensor]]:
        terms, tokens = self.turns[number]
        # The last text of the third answer is one that is cut.
        self.script.say(tokens, [78] * 6 if number == 2 else [])
        return chat.say(terms, **settings), self.script.logits


def same(one: tuple[Answer, list[torch.Tensor]], other: tuple[Answer, list[torch.Tensor]]) -> bool:
    """To the bit."""
    logits = len(one[1]) == len(other[1]) and all(map(torch.equal, one[1], other[1]))
    pictures = [[image.tobytes() for image in answer.images] for answer, _ in (one, other)]
    return logits and pictures[0] == pictures[1] and one[0].texts == other[0].texts


@pytest.fixture
def talk(small_pictures: BagelPipeline, script: Script) -> Talk:
    return Talk(small_pictures, script)


@pytest.mark.parametrize("given", [{}, {"cfg_img_scale": 1.0}, {"think": True}], ids=["guided", "no image", "think"])
def test_opened_again_it_gives_the_same_next_answer_to_the_bit(
    small_pictures: BagelPipeline, talk: Talk, tmp_path: Path, given: dict[str, Any]
) -> None:
    pipe = small_pictures
    chat = pipe.chat(**SMALL | given)
    for number in (0, 1):
        talk.say(chat, number)
    path = chat.save(tmp_path / "chat.zip")
    wanted = talk.say(chat, 2)
    assert len(wanted[0].images) == 2 and wanted[0].ended == "max_new_tokens"
    again = pipe.open_chat(path)
    assert len(again.turns) == 2 and again.settings == chat.settings
    assert same(talk.say(again, 2), wanted)
    assert same(talk.say(again, 1), talk.say(chat, 1))
    kept = [c._kept for c in (chat, again)]
    assert kept[0] is not None and kept[1] is not None and kept[0].reached == kept[1].reached
    assert torch.equal(kept[0].kv_cache.keys, kept[1].kv_cache.keys)


def test_a_next_turn_computes_what_is_new_alone(
    small_pictures: BagelPipeline, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = small_pictures.chat(**SMALL, cfg_img_scale=2.0)
    talk.say(chat, 0)
    passes: list[int] = []
    forward = Decoder.forward

    def counting(decoder: Decoder, parts: Any, attend: Any) -> Any:
        passes.append(sum(part.hidden.shape[1] for part in parts))
        return forward(decoder, parts, attend)

    monkeypatch.setattr(Decoder, "forward", counting)
    talk.say(chat, 1)
    told = len(small_pictures.model.tokenizer.text_block("and?"))
    assert passes == [told, told, 1, 1, 1, 1, 4]  # in both contexts; a token a pass; the answer in that of texts alone


def test_image_guidance_may_come_later(small_pictures: BagelPipeline, talk: Talk) -> None:
    """The context of texts alone is then made of those that it has not seen; answers are as if it had been there."""
    late, early = (small_pictures.chat(**SMALL) for _ in range(2))
    for chat, scale in ((late, 1.0), (early, 2.0)):
        talk.say(chat, 0, cfg_img_scale=1.0)
        talk.say(chat, 1, cfg_img_scale=scale)  # which draws nothing
    one, other = (talk.say(chat, 2, cfg_img_scale=2.0)[0].images for chat in (late, early))
    assert len(one) == 2
    for ours, theirs in zip(one, other, strict=True):
        values = [torch.tensor(bytearray(image.tobytes())).float() for image in (ours, theirs)]
        assert (values[0] - values[1]).abs().max() <= 1


@pytest.mark.parametrize("lose", [Chat.undo, Chat.forget], ids=["undo", "forget"])
def test_what_was_undone_or_forgotten_changes_nothing(
    small_pictures: BagelPipeline, talk: Talk, lose: Callable[[Chat], object]
) -> None:
    plain, other = (small_pictures.chat(**SMALL) for _ in range(2))
    for chat in (plain, other):
        talk.say(chat, 0)
    wanted = talk.say(plain, 2)
    if lose is Chat.undo:
        talk.say(other, 1)
    assert lose(other)
    assert same(talk.say(other, 2), wanted)
    assert len(other.turns) == 2
    while other.undo():
        pass
    assert other.turns == () and not other.undo()
    first = small_pictures.chat(**SMALL)
    assert same(talk.say(other, 0), talk.say(first, 0))


def test_a_turn_that_is_stopped_leaves_the_chat_as_it_was(small_pictures: BagelPipeline, talk: Talk) -> None:
    plain, other = (small_pictures.chat(**SMALL) for _ in range(2))
    for chat in (plain, other):
        talk.say(chat, 0)
    wanted = talk.say(plain, 2)
    talk.script.say(70, small_pictures.model.tokenizer.vision_start, 71)
    with pytest.raises(Cancelled):
        other.say("stop", callback=lambda event: not isinstance(event, Drawn))
    assert len(other.turns) == 1 and other._kept is not None
    with pytest.raises(SettingError, match="prompt is empty"):
        other.say(" ")
    assert same(talk.say(other, 2), wanted)


def test_where_memory_runs_out_keys_are_made_again(
    small_pictures: BagelPipeline, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a turn, which then begins again; and of another request, for which chats let go of what they keep."""
    pipe = small_pictures
    plain, other = (pipe.chat(**SMALL) for _ in range(2))
    for chat in (plain, other):
        talk.say(chat, 0)
    wanted = talk.say(plain, 2)
    carry_out, tries = Conversing.carry_out, []

    def failing(turn: Conversing, *arguments: Any) -> Any:
        tries.append(turn)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("none left. Really")
        return carry_out(turn, *arguments)

    monkeypatch.setattr(Conversing, "carry_out", failing)
    monkeypatch.setattr(type(pipe.model), "lower_residency", lambda *_: 1)
    with pytest.warns(UserWarning, match="ran out"):
        assert same(talk.say(other, 2), wanted)
    assert len(tries) == 3  # one that failed, the first turn again, and this one
    assert other._kept is not None and other._kept.kv_cache.nbytes > 0
    assert pipe.model.forget_contexts() > 0
    assert other._kept is None and plain._kept is None


@pytest.mark.parametrize("divide", ["layers", "guidance"])
def test_several_devices_give_the_bits_of_one(small_pictures: BagelPipeline, talk: Talk, divide: str) -> None:
    folder = small_pictures.model.folder.path
    alone, several = shared(folder, "cpu"), shared(folder, "cpu,cpu,cpu", divide=divide)
    chats = [pipe.chat(**SMALL, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0)) for pipe in (alone, several)]
    for number in (0, 1, 2):
        assert same(*(talk.say(chat, number) for chat in chats))
    several.close()


@pytest.mark.parametrize(("given", "wrong"), [({"style": "twiff"}, "style holds"), ({"think": True}, "think holds")])
def test_what_holds_for_all_of_a_chat(small_pictures: BagelPipeline, given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(SettingError, match=wrong):
        small_pictures.chat(**SMALL).say("hello", **given)
    with pytest.raises(SettingError, match="unknown setting"):
        small_pictures.chat(sytle="base")


def test_a_pipeline_that_cannot_draw_has_no_chats(small_pictures: BagelPipeline) -> None:
    path = small_pictures.model.folder.path
    asking = BagelPipeline.from_pretrained(path, device="cpu", dtype="float32", tasks=("ask",))
    with pytest.raises(SettingError, match="loaded for ask only"):
        asking.chat()


def test_tokens_that_the_tokenizer_has_no_word_for_are_saved_too(
    small_pictures: BagelPipeline, script: Script, tmp_path: Path
) -> None:
    """Weights may have rows for more tokens than the tokenizer knows, as the published ones do."""
    model = small_pictures.model
    last = model.folder.config.decoder.vocab_size - 1
    assert last >= model.tokenizer.size
    script.say(70, last, model.tokenizer.im_end)
    chat = small_pictures.chat(**SMALL)
    chat.say("hello")
    (turn,) = small_pictures.open_chat(chat.save(tmp_path / "chat.zip")).turns
    assert turn.pieces == chat.turns[0].pieces


@pytest.fixture(scope="module")
def saved(small_pictures: BagelPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    chat = small_pictures.chat(**SMALL)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Talk(small_pictures, Script(monkeypatch)).say(chat, 0)
    return chat.save(tmp_path_factory.mktemp("saved") / "chat.zip")


def changed(path: Path, other: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy whose JSON was changed."""
    with zipfile.ZipFile(path) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    told = json.loads(files["chat.json"])
    change(told)
    files["chat.json"] = json.dumps(told).encode()
    with zipfile.ZipFile(other, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return other


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda told: told.update(lowmem_bagel_chat=2), "its version is 2, and 1 is read here"),
    "no turns": (lambda told: told.update(turns=None), "a list is missing"),
    "turn": (lambda told: told["turns"].append(3), "an object is missing"),
    "seed": (lambda told: told["turns"][0]["settings"].update(seed="x"), "cannot be asked for"),
    "frames": (lambda told: told["settings"].update(frames=9), "cannot be asked for"),
    "style": (lambda told: told["turns"][0]["settings"].update(style="auto"), "another style"),
    "think": (lambda told: told["settings"].update(think=True), "thinks otherwise"),
    "prompt": (lambda told: told["turns"][0]["terms"][1].update(text=" "), "cannot be asked for"),
    "ids": (lambda told: told["turns"][0]["pieces"][0].update(ids=[400, 10**9]), "none of this model's"),
    "text": (lambda told: told["turns"][0]["pieces"][0].update(text="other"), "none of this model's"),
    "half": (lambda told: told["turns"][0]["pieces"][0].update(ids=[400, 1.5]), "none of this model's"),
    "start": (lambda told: told["turns"][0]["pieces"][0].update(ids=[7]), "does not begin"),
    "stop": (lambda told: told["turns"][0]["pieces"][0].update(stop=7), "does not begin or end"),
    "long": (lambda told: told["turns"][0]["settings"].update(max_new_tokens=2), "longer than its settings"),
    "pieces": (lambda told: told["turns"][0]["pieces"].reverse() or told["turns"][0]["pieces"].pop(), "in turn"),
    "ended": (lambda told: told["turns"][0].update(ended="badly"), "how it ended"),
    "elsewhere": (lambda told: told["turns"][0]["terms"][0].update(picture="../../etc/passwd"), "is missing"),
    "no file": (lambda told: told["turns"][0]["terms"][0].update(picture=3), "one without a file"),
    "not a picture": (lambda told: told["turns"][0]["terms"][0].update(picture="chat.json"), "cannot be asked for"),
    "notes": (lambda told: told["turns"][0]["terms"][0].update(notes="x"), "no list of texts"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_was_not_saved_so_is_refused(
    small_pictures: BagelPipeline, saved: Path, tmp_path: Path, name: str
) -> None:
    change, wrong = HOSTILE[name]
    with pytest.raises(ChatError, match=wrong):
        small_pictures.open_chat(changed(saved, tmp_path / "other.zip", change))


def test_files_that_are_no_chats(
    small_pictures: BagelPipeline, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saved.read_bytes()
    spoilt = tmp_path / "spoilt.zip"
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:100] + b"\0" * 50 + whole[150:], b"{}" * 100):
        spoilt.write_bytes(content)
        with pytest.raises(ChatError):
            small_pictures.open_chat(spoilt)
    for path in (tmp_path, tmp_path / "none.zip", Path("/dev/zero"), 3):
        with pytest.raises(ChatError):
            small_pictures.open_chat(path)  # type: ignore[arg-type]
    with zipfile.ZipFile(spoilt, "w", zipfile.ZIP_DEFLATED) as packed:  # 20 MiB of blanks in 20 kB
        packed.writestr("chat.json", b" " * (20 << 20))
    with pytest.raises(ChatError, match="larger than 16 MiB"):
        small_pictures.open_chat(spoilt)
    monkeypatch.setattr("lowmem_bagel.generation.chat_file.MAX_PIXELS", 10)
    with pytest.raises(ChatError, match="too many pictures"):
        small_pictures.open_chat(saved)


def test_a_place_that_cannot_be_written(small_pictures: BagelPipeline, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        small_pictures.chat(**SMALL).save(tmp_path / "none" / "chat.zip")

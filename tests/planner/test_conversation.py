"""Conversations in a plan: contexts take what the pipeline makes of them, and what does not fit says what would."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from PIL import Image
from support.pictures import noise
from support.scripted import Script

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import DoesNotFitError, SettingError
from lowmem_bagel.generation.chat import Chat
from lowmem_bagel.generation.conversing import Outline
from lowmem_bagel.hardware.profile import HardwareProfile
from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.kv_cache import KVCache
from lowmem_bagel.planner.estimate import asked_of, conversation_workload, plan_inputs
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.plan import Plan
from lowmem_bagel.planner.solve import Limits, Request, breakdown, make_plan
from lowmem_bagel.planner.workload import Conversation
from lowmem_bagel.settings import LoadOptions

CARD = HardwareProfile.hypothetical(12, (8, 9), 64, 25, name="RTX 4070")
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_timesteps": 2, "seed": 5, "max_new_tokens": 6}
PICTURE = Image.fromarray(noise(40, 56))


def planned(**asked: Any) -> tuple[Plan, dict[str, Any]]:
    facts = ModelFacts.of_shape("int8")
    request = Request(tasks=("edit", "ask"), height=512, width=512, conversation=Conversation(**asked))
    plan = make_plan(facts, CARD, Limits(), request)
    return plan, {row.phase: row for row in breakdown(plan, facts, CARD, Limits(), request) if row.task == "chat"}


@pytest.fixture
def outlines(small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> list[Outline]:
    """Of every turn that is said."""
    seen: list[Outline] = []
    monkeypatch.setattr(BagelPipeline, "_check_rounds", lambda pipe, outline: seen.append(outline))
    return seen


class Caches:
    """The key/value caches that were made: tokens of each, and the most bytes that were alive at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        self.now = self.peak = 0

        def counted(bagel: Bagel, capacity: int) -> KVCache:
            made = KVCache(bagel.config.decoder, capacity, bagel.dtype, bagel.device)
            self.tokens.append(capacity)
            self._add(made.nbytes)
            weakref.finalize(made, self._add, -made.nbytes)
            return made

        monkeypatch.setattr(Bagel, "kv_cache", counted)

    def _add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Caches:
    return Caches(monkeypatch)


def say(chat: Chat, script: Script, *said: Any, **settings: Any) -> None:
    """A picture in the answer, where it may be; its last text is cut, so that it is of the greatest length."""
    tokenizer, settings_now = chat.model.tokenizer, {**chat.settings, **settings}
    rounds, most = settings_now["max_rounds"], settings_now["max_new_tokens"]
    script.say(*[[70] * (most - 2), tokenizer.vision_start] * rounds, [71] * 2 * most)
    answer = chat.say(said, **settings)
    assert len(answer.images) == rounds and answer.ended == "max_new_tokens"


@pytest.mark.parametrize(("first", "given"), [
    ([PICTURE, "look"], {}), ([PICTURE, "look"], {"max_rounds": 0}), ([PICTURE, "look"], {"cfg_img_scale": 1.0}),
    (["draw it"], {}), (["draw it"], {"cfg_img_scale": 2.0}), (["draw it"], {"cfg_text_scale": 1.0, "think": True}),
])  # fmt: skip
def test_keys_of_each_turn_are_as_many_as_the_pipeline_takes(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch, caches: Caches, outlines: list[Outline],
    first: list[Any], given: dict[str, Any],
) -> None:  # fmt: skip
    given = {"max_rounds": 1, "max_new_tokens": 3, **given}
    script, chat = Script(monkeypatch), small_pictures.chat(**SMALL | given)
    turns: list[tuple[list[Any], dict[str, Any]]] = [
        (first, {}), ([PICTURE, PICTURE, "these"], {"max_new_tokens": 5}),
    ]  # fmt: skip
    for said, settings in turns:
        del caches.tokens[:], outlines[:]
        say(chat, script, *said, **given | settings)
        (outline,) = outlines
        assert caches.tokens[0] == conversation_workload(outline).cached_tokens
    again = small_pictures.chat(**chat.settings)
    again.take_up(chat.turns)
    del caches.tokens[:], outlines[:]
    say(chat, script, "last", **given)
    wanted = caches.tokens[0]
    say(again, script, "last", **given)
    assert {conversation_workload(outline).cached_tokens for outline in outlines} == {wanted}


def test_what_is_kept_for_a_next_turn_is_held_to_live_memory(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch, caches: Caches
) -> None:
    """Turns of the greatest length, as planned: the contexts, and beside them the copy that the next begins from."""
    script = Script(monkeypatch)
    pipe = small_pictures
    texts = len(pipe.model.tokenizer.text_block("look"))
    chat = pipe.chat(**SMALL, cfg_img_scale=2.0, max_rounds=2)
    asked = Request(
        height=32, width=48, text_tokens=texts, conversation=Conversation(2, SMALL["max_new_tokens"], turns=3)
    )
    last = asked.workloads(pipe.model.folder.config)[-1]
    square = Image.fromarray(noise(32, 48))
    for _ in range(3):
        say(chat, script, square, "look")
    token = caches.now / caches.tokens[-1]
    # Texts that a picture follows end a token sooner, and there is one to spare in each.
    assert 0.9 * (last.cached_tokens + last.kept_tokens) < caches.peak / token < last.cached_tokens + last.kept_tokens


def test_longer_chats_take_more_of_everything() -> None:
    asked = [{"rounds": 0}, {"rounds": 1}, {"rounds": 3}, {"rounds": 3, "turns": 4}, {"rounds": 3, "turns": 6}]
    rows = [planned(**one)[1] for one in asked]
    keys = [phases["text"].arena for phases in rows]
    assert keys == sorted(set(keys))
    assert all(phases["keep"].arena > phases["text"].arena for phases in rows)
    assert "denoise" not in rows[0] and rows[1]["decode"].arena == rows[1]["denoise"].arena
    # One picture is drawn at a time.
    assert rows[2]["denoise"].activations == rows[1]["denoise"].activations
    longer = [planned(rounds=3, new_tokens=count)[1]["text"].arena for count in (64, 512, 4096)]
    assert longer == sorted(set(longer))


def test_seconds_are_those_of_all_pictures_and_texts(small_pictures: BagelPipeline) -> None:
    from lowmem_bagel.planner.solve import placed_as

    facts = ModelFacts.of_shape("int8")
    request = Request(tasks=("edit", "ask"), height=512, width=512)
    plan = make_plan(facts, CARD, Limits(), request)
    found = placed_as(plan, facts, CARD, Limits(), request)

    def seconds(rounds: int) -> dict[str, float]:
        asked = Request(height=512, width=512, tasks=("edit",), conversation=Conversation(rounds, 100))
        return found.seconds(asked.workloads(facts.config)[-1])

    none, one, three = (seconds(rounds) for rounds in (0, 1, 3))
    assert none["denoise"] == none["decode"] == 0
    assert 3 * one["denoise"] < three["denoise"] < 6 * one["denoise"]
    assert three["decode"] == pytest.approx(3 * one["decode"])
    assert three["text"] > 1.9 * one["text"] and three["prefill"] > one["prefill"] > none["prefill"]


def test_a_plan_that_cannot_hold_a_chat_says_what_it_could() -> None:
    facts, limits = ModelFacts.of_shape("int8"), Limits(max_vram=8_000_000_000)

    def asked(**talk: int) -> Request:
        return Request(tasks=("edit", "ask"), conversation=Conversation(**talk))

    with pytest.raises(
        DoesNotFitError, match=r"turns: 400, pictures each: 3.* plan for (\d+) turns? of a chat"
    ) as failure:
        make_plan(facts, CARD, limits, asked(rounds=3, turns=400))
    most = int(str(failure.value).split("plan for ")[1].split()[0])
    make_plan(facts, CARD, limits, asked(rounds=3, turns=most))
    with pytest.raises(DoesNotFitError):
        make_plan(facts, CARD, limits, asked(rounds=3, turns=most + 1))
    with pytest.raises(DoesNotFitError, match=r"plan for one turn with max_rounds (\d+)") as failure:
        make_plan(facts, CARD, limits, asked(rounds=100))
    most = int(str(failure.value).split("max_rounds ")[1].split(";")[0])
    make_plan(facts, CARD, limits, asked(rounds=most))
    with pytest.raises(DoesNotFitError):
        make_plan(facts, CARD, limits, asked(rounds=most + 1))


def test_a_turn_that_cannot_be_held_says_how_many_pictures_would_fit(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, script = small_pictures.model, Script(monkeypatch)
    options = LoadOptions(device="cpu", dtype="float32")
    inputs = plan_inputs(model.folder, options)

    def piped(ram: int) -> BagelPipeline:
        return BagelPipeline(model, inputs._replace(limits=Limits(max_ram=ram, overrides=inputs.limits.overrides)))

    def fits(ram: int, rounds: int) -> bool:
        script.say(70, model.tokenizer.im_end)
        try:
            piped(ram).converse("draw", **SMALL, max_rounds=rounds)
        except DoesNotFitError:
            return False
        return True

    low, high = 0, 1 << 40
    while high - low > 20_000:  # the least that holds an answer of four pictures
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle, 4) else (middle, high)
    with pytest.raises(DoesNotFitError, match=r"an answer of 40 pictures of 48x32 .* max_rounds 4 would fit"):
        piped(high).converse("draw", **SMALL, max_rounds=40)
    with pytest.raises(DoesNotFitError, match=r"nor does a text alone: undo a turn"):
        piped(1000).converse("draw", **SMALL, max_rounds=3)


@pytest.mark.parametrize("task", ["edit", "ask"])
def test_a_chat_needs_both_tasks(task: Any) -> None:
    facts = ModelFacts.of_shape("int8")
    with pytest.raises(SettingError, match="need the tasks edit and ask"):
        asked_of(facts, LoadOptions(tasks=(task,), max_rounds=3))
    _, request = asked_of(facts, LoadOptions(max_rounds=2, max_new_tokens=100, chat_turns=4))
    assert request.conversation == Conversation(2, 100, 4)
    assert asked_of(facts, LoadOptions())[1].conversation is None

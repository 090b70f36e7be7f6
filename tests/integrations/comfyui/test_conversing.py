"""The node that answers in texts and pictures, and conversations from node to node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.comfy import Comfy, ExecutionBlocker
from support.scripted import Script

from lowmem_bagel import BagelPipeline
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.errors import SettingError
from lowmem_bagel.generation.conversing import Conversing
from lowmem_bagel.integrations.comfyui import models
from lowmem_bagel.integrations.comfyui.conversation import Conversation
from lowmem_bagel.integrations.comfyui.pictures import to_image

FIRST: dict[str, Any] = {"text": "draw", "width": 48, "height": 32, "seed": 5, "max_new_tokens": 8}
NEXT: dict[str, Any] = {"text": "and?", "width": 48, "height": 32, "seed": 7, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def pipe() -> BagelPipeline:
    return BagelPipeline.from_pretrained(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def model(comfy: Comfy) -> Any:
    (model,) = comfy.run("LowmemBagelLoad", name=models.DEMO)
    return model


@pytest.fixture
def few(comfy: Comfy) -> Any:
    (settings,) = comfy.run("LowmemBagelDrawingSettings", num_timesteps=3)
    return settings


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(monkeypatch)


def drawing(pipe: BagelPipeline) -> list[int]:
    """Tokens of an answer with a picture between two texts."""
    tokenizer = pipe.model.tokenizer
    words = tokenizer.encode("a circle")
    return [*words, tokenizer.vision_start, *words, tokenizer.im_end]


def talking(pipe: BagelPipeline) -> list[int]:
    tokenizer = pipe.model.tokenizer
    return [*tokenizer.encode("a square"), tokenizer.im_end]


def test_an_answer_has_texts_and_pictures(
    comfy: Comfy, model: Any, few: Any, pipe: BagelPipeline, script: Script
) -> None:
    script.say(drawing(pipe))
    answer, pictures, _ = comfy.run("LowmemBagelConverse", model=model, settings=few, **FIRST)
    script.say(drawing(pipe))
    wanted = pipe.converse("draw", num_timesteps=3, width=48, height=32, seed=5, max_new_tokens=8)
    assert answer == "a circle<image>a circle" and wanted.texts == ["a circle"] * 2
    assert torch.equal(pictures, to_image(wanted.images)) and pictures.shape == (1, 32, 48, 3)
    assert [(value, total) for value, total, preview in comfy.shown.calls if preview is not None] == [(1, 2), (2, 2)]


def test_what_has_no_picture_runs_nothing_with_it(
    comfy: Comfy, model: Any, pipe: BagelPipeline, script: Script
) -> None:
    script.say(talking(pipe))
    answer, pictures, _ = comfy.run("LowmemBagelConverse", model=model, **FIRST)
    assert answer == "a square"
    assert isinstance(pictures, ExecutionBlocker) and pictures.message is None


def test_a_conversation_goes_on_over_nodes(
    comfy: Comfy, model: Any, few: Any, pipe: BagelPipeline, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.say(drawing(pipe))
    _, pictures, begun = comfy.run("LowmemBagelConverse", model=model, settings=few, **FIRST)
    shown = {"picture_1": pictures}
    script.say(drawing(pipe))
    marked = NEXT | {"text": "and <image>?"}
    _, drawn, said = comfy.run("LowmemBagelConverse", model=model, settings=few, conversation=begun, **marked, **shown)
    chat = pipe.chat()
    script.say(drawing(pipe))
    first = chat.say("draw", num_timesteps=3, width=48, height=32, seed=5, max_new_tokens=8)
    script.say(drawing(pipe))
    terms = ["and ", first.images[0], "?"]
    second = chat.say(terms, num_timesteps=3, width=48, height=32, seed=7, max_new_tokens=8)
    assert torch.equal(drawn, to_image(second.images)) and len(said.turns) == 2
    assert not torch.equal(drawn, to_image(first.images)), "what was said before counts"

    # From one conversation in two directions, and again: nothing was changed in it.
    assert len(begun.turns) == 1
    read: list[int] = []
    whole = Conversing.carry_out
    monkeypatch.setattr(
        Conversing, "carry_out", lambda turn, *given: (read.append(given[1] is not None), whole(turn, *given))[1]
    )
    for again in (False, True):
        script.say(drawing(pipe))
        _, another, _ = comfy.run(
            "LowmemBagelConverse", model=model, settings=few, conversation=begun, **marked, **shown
        )
        assert torch.equal(another, drawn), again
    assert read == [True, False, True, False], "the chat was used up by the first, so it is read again"
    read.clear()
    script.say(talking(pipe))
    comfy.run("LowmemBagelConverse", model=model, conversation=said, **NEXT)
    assert read == [False], "no key was computed twice"


def test_a_conversation_outlives_its_loaded_model(comfy: Comfy, few: Any, pipe: BagelPipeline, script: Script) -> None:
    """ComfyUI may have taken the memory meanwhile."""
    (model,) = comfy.run("LowmemBagelLoad", name=models.DEMO)
    script.say(drawing(pipe))
    _, _, begun = comfy.run("LowmemBagelConverse", model=model, settings=few, **FIRST)
    script.say(drawing(pipe))
    _, wanted, _ = comfy.run("LowmemBagelConverse", model=model, settings=few, conversation=begun, **NEXT)
    model.detach()
    script.say(drawing(pipe))
    _, drawn, _ = comfy.run("LowmemBagelConverse", model=model, settings=few, conversation=begun, **NEXT)
    assert torch.equal(drawn, wanted)


def test_style_is_the_first_nodes(comfy: Comfy, model: Any, pipe: BagelPipeline, script: Script) -> None:
    script.say(talking(pipe))
    _, _, begun = comfy.run("LowmemBagelConverse", model=model, style="thinkmorph", **FIRST)
    script.say(talking(pipe))
    _, _, said = comfy.run("LowmemBagelConverse", model=model, style="twiff", conversation=begun, **NEXT)
    assert [turn.settings.style for turn in said.turns] == ["thinkmorph"] * 2


def test_a_conversation_of_another_model_is_refused(
    comfy: Comfy, model: Any, pipe: BagelPipeline, script: Script
) -> None:
    script.say(talking(pipe))
    _, _, begun = comfy.run("LowmemBagelConverse", model=model, **FIRST)
    (made,) = comfy.run("LowmemBagelConvert", name=models.DEMO, to="bf16", out="another")
    (another,) = comfy.run("LowmemBagelLoad", name="another", path=made)
    assert isinstance(begun, Conversation)
    with pytest.raises(SettingError, match="go on with the model that it was begun with"):
        comfy.run("LowmemBagelConverse", model=another, conversation=begun, **NEXT)

"""Chats on a card, where texts are decoded by a graph: opened again they give the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.cards import RESIDENT, STREAMED, pipeline_on
from support.pictures import noise

from lowmem_bagel import BagelPipeline
from lowmem_bagel.generation.chat import Chat
from lowmem_bagel.generation.conversing import Conversing

pytestmark = pytest.mark.gpu

SETTINGS: dict[str, Any] = {
    "height": 64, "width": 96, "num_timesteps": 4, "seed": 4, "cfg_img_scale": 2.0, "max_new_tokens": 24,
    "max_rounds": 1,
}  # fmt: skip
PICTURE = Image.fromarray(noise(64, 96))


def last(chat: Chat) -> tuple[list[str], list[bytes], torch.Tensor]:
    """Of one more turn: its texts and pictures, and all keys."""
    answer = chat.say("and now?")
    assert chat._kept is not None and len(answer.images) == 1
    return answer.texts, [image.tobytes() for image in answer.images], chat._kept.kv_cache.keys.cpu()


def assert_same(one: tuple[Any, Any, torch.Tensor], other: tuple[Any, Any, torch.Tensor]) -> None:
    assert one[:2] == other[:2] and torch.equal(one[2], other[2])


@pytest.fixture
def every_text_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conversing, "_asks", lambda *_: True)


@pytest.mark.parametrize("residency", [RESIDENT, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 1.0}], ids=["greedy", "sampled"])
def test_an_opened_chat_goes_on_to_the_same_bits(
    small_pictures: BagelPipeline, every_text_asks: None, tmp_path: Path, residency: Any, sampled: dict[str, Any]
) -> None:
    pipe = pipeline_on("cuda:0", small_pictures.model.folder.path, "bfloat16", residency)
    chat = pipe.chat(**SETTINGS, **sampled)
    chat.say([PICTURE, "what is it?"])
    path = chat.save(tmp_path / "chat.zip")
    wanted = last(chat)
    assert_same(last(pipe.open_chat(path)), wanted)
    chat.undo()
    assert pipe.model.forget_contexts() > 0
    assert_same(last(chat), wanted)
    pipe.close()

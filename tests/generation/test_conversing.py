"""An answer in texts and pictures: what is computed for it, in which contexts, and how it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from support.numeric import relative_l2
from support.pictures import noise
from support.scripted import Script

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import Cancelled, SettingError
from lowmem_bagel.generation import inputs
from lowmem_bagel.generation.conversing import Answer, Drawn, Said
from lowmem_bagel.generation.executor import THINK_BEFORE_ANSWERING, Token
from lowmem_bagel.generation.inputs import Contexts, PictureBlock, encoding_noise, read_terms
from lowmem_bagel.model.decoder import Decoder
from lowmem_bagel.pictures.saving import read_metadata
from lowmem_bagel.sampling.denoise import Step
from lowmem_bagel.sampling.frames import Frames

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_timesteps": 3, "seed": 5, "max_new_tokens": 40}
PICTURE = Image.fromarray(noise(40, 56))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(monkeypatch)


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the generator: so that a picture in an answer is comparable with the same asked for alone."""

    def fixed() -> torch.Generator:
        return torch.Generator().manual_seed(9)

    monkeypatch.setattr(inputs, "encoding_noise", lambda block, _: encoding_noise(block, fixed()))
    monkeypatch.setattr(
        Frames, "noise", lambda frames, values, _: torch.randn(frames.latents, values, generator=fixed())
    )


def kinds(answer: Answer) -> str:
    return "".join("T" if isinstance(piece, Said) else "P" for piece in answer.pieces)


def test_texts_and_pictures_come_in_turn_with_their_settings(
    small_pictures: BagelPipeline, script: Script, tmp_path: Any
) -> None:
    tokenizer = small_pictures.model.tokenizer
    words, ask, end = tokenizer.encode("a circle"), tokenizer.vision_start, tokenizer.im_end
    script.say(words, ask, words, ask, words, end)
    events: list[Any] = []
    answer = small_pictures.converse("draw", callback=events.append, **SMALL)
    assert kinds(answer) == "TPTPT" and answer.ended == "text"
    assert answer.texts == ["a circle"] * 3 and answer.text == "a circle\na circle\na circle"
    assert [image.size for image in answer.images] == [(48, 32)] * 2
    drawn = [piece for piece in answer.pieces if isinstance(piece, Drawn)]
    assert [piece.settings["seed"] for piece in drawn] == [6, 8] and answer.seed == 5
    assert drawn[0].settings["said"] == "a circle" and drawn[0].settings["prompt"] == "draw"
    assert answer.settings["style"] == "base" and answer.settings["max_new_tokens"] == 40
    pieces = [event for event in events if isinstance(event, (Said, Drawn))]
    assert pieces == list(answer.pieces)
    assert sum(isinstance(event, Token) for event in events) == 3 * len(words)
    assert sum(isinstance(event, Step) for event in events) == 2 * 2
    saved = answer.save(tmp_path / "out.png")
    assert [path.name for path in saved] == ["out-01.png", "out-02.png"]
    assert read_metadata(saved[1])["seed"] == 8


@pytest.mark.parametrize(
    ("rounds", "shape", "ended"), [(0, "T", "max_rounds"), (1, "TPT", "max_rounds"), (2, "TPTPT", "text")]
)
def test_no_more_pictures_than_rounds(
    small_pictures: BagelPipeline, script: Script, rounds: int, shape: str, ended: str
) -> None:
    tokenizer = small_pictures.model.tokenizer
    script.say(70, tokenizer.vision_start, 71, tokenizer.vision_start, 72, tokenizer.im_end)
    answer = small_pictures.converse(["draw"], **SMALL, max_rounds=rounds)
    assert (kinds(answer), answer.ended) == (shape, ended)


def test_a_mark_that_is_cut_asks_for_nothing(small_pictures: BagelPipeline, script: Script) -> None:
    tokenizer = small_pictures.model.tokenizer
    mark = tokenizer.encode("so <image_start>")
    assert len(mark) > 2
    given = SMALL | {"style": "thinkmorph"}
    script.say(mark, tokenizer.im_end, 70, tokenizer.im_end)
    answer = small_pictures.converse(["draw"], **given)
    assert kinds(answer) == "TPT" and answer.texts[0] == "so <image_start>"
    script.say(mark)
    cut = small_pictures.converse(["draw"], **given | {"max_new_tokens": len(mark)})
    assert kinds(cut) == "T" and cut.ended == "max_new_tokens"
    with pytest.raises(SettingError, match="no picture to save"):
        cut.save("out.png")
    # The one token too few, im_end, is not the mark's.
    script.say(mark, 70, tokenizer.im_end)
    whole = small_pictures.converse(["draw"], **given | {"max_new_tokens": len(mark) + 1})
    assert kinds(whole)[:2] == "TP"


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("terms", [["draw it"], [PICTURE, "draw it"]], ids=["text", "picture and text"])
def test_no_key_is_computed_twice(
    small_pictures: BagelPipeline, script: Script, monkeypatch: pytest.MonkeyPatch, terms: list[Any], scale: float
) -> None:
    """What is given, once; of a text each of its tokens, once; of a picture its two blocks, once. With image guidance
    the texts alone as well, from the first picture on."""
    model = small_pictures.model
    passes: list[int] = []
    forward = Decoder.forward

    def counting(decoder: Decoder, parts: Any, attend: Any) -> Any:
        passes.append(sum(part.hidden.shape[1] for part in parts))
        return forward(decoder, parts, attend)

    monkeypatch.setattr(Decoder, "forward", counting)
    ask, end = model.tokenizer.vision_start, model.tokenizer.im_end
    script.say(70, 71, ask, 72, end)
    small_pictures.converse(terms, **SMALL | {"cfg_img_scale": scale})
    side = scale > 1
    pictured = len(terms) > 1
    given = PictureBlock(PICTURE, True, model.folder.config)
    drawn = PictureBlock(Image.new("RGB", (48, 32)), True, model.folder.config)
    told = len(model.tokenizer.text_block("draw it"))
    wanted = [given.latent_tokens, given.vit_tokens] if pictured else []
    wanted += [told] * (1 + (side and pictured))
    wanted += [1, 1, 1, 1] + [4] * (side and pictured)  # im_start, two tokens, im_end
    wanted += [drawn.latent_tokens, drawn.vit_tokens]
    wanted += [1, 1, 1] + [3] * side
    assert passes == wanted


def test_a_round_is_what_is_asked_for_by_hand(small_pictures: BagelPipeline, script: Script, same_noise: None) -> None:
    """Pictures as of `run` with all that came before as terms, and texts from the contexts that such terms make."""
    pipe, model = small_pictures, small_pictures.model
    tokenizer = model.tokenizer
    first, second = tokenizer.encode("make it red"), tokenizer.encode("now a square")
    ask, end = tokenizer.vision_start, tokenizer.im_end
    settings = SMALL | {"cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0)}
    steps: list[Step] = []
    script.say(first, ask, second, ask, 70, end)
    answer = pipe.converse(
        [PICTURE, "draw it"], callback=lambda e: steps.append(e) if isinstance(e, Step) else None, **settings
    )
    logits = script.logits
    drawing = {name: value for name, value in settings.items() if name != "max_new_tokens"}
    terms: list[Any] = [PICTURE, "draw it"]
    for number, text in enumerate(["make it red", "now a square"]):
        _same_logits(pipe, terms, logits[number * (len(first) + 1)])
        terms.append(text)
        by_hand: list[Step] = []
        picture = pipe.run(terms, callback=by_hand.append, **drawing)
        for ours, theirs in zip(steps[2 * number : 2 * number + 2], by_hand, strict=True):
            assert relative_l2(ours.velocity, theirs.velocity) < 1e-5
        assert picture.image is not None and picture.image.size == answer.images[number].size
        terms.append(answer.images[number])
    _same_logits(pipe, terms, logits[-2])


@torch.inference_mode()
def _same_logits(pipe: BagelPipeline, terms: list[Any], wanted: torch.Tensor) -> None:
    model = pipe.model
    blocks = read_terms(pipe.prepare(terms).terms, model.folder.config, model.tokenizer, drawing=True)
    contexts = Contexts(model, blocks, 0, image_branch=False, spare=1)
    for block in blocks:
        contexts.append(block, torch.Generator())
    assert relative_l2(model.bagel.logits(contexts.start())[0, 0], wanted) < 1e-5


def test_thinking_begins_with_what_answers_think_by(
    small_pictures: BagelPipeline, script: Script, same_noise: None
) -> None:
    pipe, tokenizer = small_pictures, small_pictures.model.tokenizer
    script.say(70, tokenizer.vision_start, 71, tokenizer.im_end)
    thought = pipe.converse(["draw"], **SMALL, think=True)
    logits = script.logits[0]
    _same_logits(pipe, [THINK_BEFORE_ANSWERING, "draw"], logits)
    assert kinds(thought) == "TPT" and thought.settings["think"] is True


def test_sampled_texts_have_a_seed_each(small_pictures: BagelPipeline) -> None:
    given = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6, "seed": 3}
    answers = [small_pictures.converse("what?", **given) for _ in range(2)]
    assert answers[0].pieces[0] == answers[1].pieces[0]
    assert isinstance(answers[0].pieces[0], Said) and len(answers[0].pieces[0].decoded.ids) <= 6


def test_a_callback_stops_it_in_text_and_in_picture(small_pictures: BagelPipeline, script: Script) -> None:
    ask = small_pictures.model.tokenizer.vision_start
    for kind in (Token, Step, Said, Drawn):
        script.say(70, ask, 71, ask, 72)
        with pytest.raises(Cancelled):
            small_pictures.converse("draw", callback=lambda event, kind=kind: not isinstance(event, kind), **SMALL)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"style": "cubist"}, "unknown style 'cubist'; choose one of auto, base, thinkmorph"),
        ({"max_rounds": -1}, "max_rounds must be a whole number from 0 to 100"),
        ({"frames": 2}, "unknown setting 'frames'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"do_sample": True, "temperature": 0.0}, "divides by zero"),
        ({"height": 10**6}, "over the model's"),
    ],
)
def test_impossible_answers(small_pictures: BagelPipeline, given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(SettingError, match=wrong):
        small_pictures.converse(["draw"], **given)


def test_terms_that_are_none(small_pictures: BagelPipeline) -> None:
    with pytest.raises(SettingError, match="nothing to work from"):
        small_pictures.converse([])
    with pytest.raises(SettingError, match="callback must be a function"):
        small_pictures.converse(["draw"], callback=3)  # type: ignore[arg-type]

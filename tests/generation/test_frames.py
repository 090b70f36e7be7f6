"""Frames of one request: together, in turn, and with whatever else a picture is drawn with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.frames_reference import Asked, FramesReference, Picture
from support.numeric import relative_l2
from support.paths import CHECKPOINT
from support.pictures import noise, pixels

from lowmem_bagel import BagelPipeline, Result
from lowmem_bagel.errors import Cancelled, DoesNotFitError, SettingError
from lowmem_bagel.generation import inputs
from lowmem_bagel.generation.executor import Execution
from lowmem_bagel.generation.inputs import PictureBlock, encode_latents, encoding_noise, shown_patches
from lowmem_bagel.model.decoder import Decoder
from lowmem_bagel.pictures.saving import read_metadata
from lowmem_bagel.sampling.denoise import Step
from lowmem_bagel.sampling.frames import Frames

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_timesteps": 4, "seed": 3}
PROMPT = "a red circle"
PICTURE = Image.fromarray(noise(40, 56))


def drawn(pipe: BagelPipeline, count: int = 3, **changed: Any) -> Result:
    return pipe.generate(PROMPT, **SMALL | {"frames": count} | changed)


def test_a_result_has_every_frame_and_says_how_it_was_made(small_pictures: BagelPipeline) -> None:
    result = drawn(small_pictures, frame_delta=2)
    assert [image.size for image in result.images] == [(48, 32)] * 3
    assert result.images[0] is result.image
    assert result.latent is not None and result.latent.shape == (3 * 6, 64)
    assert len({image.tobytes() for image in result.images}) == 3
    assert {name: result.settings[name] for name in ("frames", "frame_mode", "frame_delta")} == {
        "frames": 3, "frame_mode": "together", "frame_delta": 2,
    }  # fmt: skip
    assert drawn(small_pictures, 1).images[0].tobytes() == small_pictures.generate(PROMPT, **SMALL).images[0].tobytes()
    assert small_pictures.ask("what?", max_new_tokens=2).images == []


def test_a_frame_begins_from_the_same_noise_however_many_there_are(small_pictures: BagelPipeline) -> None:
    first: list[torch.Tensor] = []
    for count in (1, 2, 4):
        steps: list[Step] = []
        drawn(small_pictures, count, num_timesteps=2, callback=steps.append)
        first.append(steps[0].x_t)
    assert torch.equal(first[0], first[1][:6])
    assert torch.equal(first[1], first[2][:12])


@pytest.mark.parametrize("changed", [
    {"step_cache": "taylorseer", "num_timesteps": 12}, {"step_cache": "first-block", "step_cache_threshold": 0.3},
    {"think": True, "max_think_tokens": 4}, {"cfg_text_scale": 1.0},
], ids=["taylorseer", "first-block", "think", "no guidance"])  # fmt: skip
@pytest.mark.parametrize("mode", ["together", "turn"])
def test_with_what_else_a_picture_is_drawn_with(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch, mode: str, changed: Any
) -> None:
    """The branches in one batch or one by one, to rounding."""
    model = small_pictures.model
    results = []
    for batch in (True, False):
        monkeypatch.setattr(model, "plan", replace(model.plan, guidance_batch=batch))
        results.append(drawn(small_pictures, 2, frame_mode=mode, **changed))
    assert relative_l2(results[0].latent, results[1].latent) < 1e-4
    assert results[0].latent is not None and results[0].latent.isfinite().all()
    if "step_cache" in changed:
        assert 0 < results[0].settings["evaluations_computed"] < results[0].settings["evaluations"]


def test_kept_contexts_are_the_same_to_the_bit(small_pictures: BagelPipeline) -> None:
    folder = small_pictures.model.folder.path
    kept = BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32", context_store="20MB")
    for mode in ("together", "turn"):
        asked = {"frames": 2, "frame_mode": mode, "height": 32, "width": 32, "num_timesteps": 3, "seed": 1}
        asked |= {"turns": ["then"]} if mode == "turn" else {}
        wanted = small_pictures.run([PROMPT], **asked).latent
        for _ in range(2):  # found, the second time
            assert torch.equal(kept.run([PROMPT], **asked).latent, wanted)
    store = kept.model.context_store
    assert store is not None and (store.found, store.missed) == (3, 1)  # of the prompt alone


class Passes:
    """What went through the decoder outside of sampling: the tokens of each block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        forward = Decoder.forward

        def counting(decoder: Decoder, parts: Any, attend: Any) -> Any:
            self.tokens.append(sum(part.hidden.shape[1] for part in parts))
            return forward(decoder, parts, attend)

        monkeypatch.setattr(Decoder, "forward", counting)


@pytest.mark.parametrize("count", [2, 4])
def test_frames_in_turn_compute_no_context_twice(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The prompt once; of each frame but the last what it looks like, in the two contexts that see it."""
    passes = Passes(monkeypatch)
    drawn(small_pictures, count, frame_mode="turn")
    prompt = len(small_pictures.model.tokenizer.text_block(PROMPT))
    block = PictureBlock(Image.new("RGB", (48, 32)), True, small_pictures.model.folder.config)
    of_frame = [block.latent_tokens, block.latent_tokens, block.vit_tokens, block.vit_tokens]
    assert passes.tokens == [prompt, *of_frame * (count - 1)]


def test_frames_in_turn_with_texts_share_all_contexts(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    small_pictures.run([PROMPT], turns=["left", "right"], **SMALL)
    texts = [len(small_pictures.model.tokenizer.text_block(text)) for text in (PROMPT, "left", "right")]
    block = PictureBlock(Image.new("RGB", (48, 32)), True, small_pictures.model.folder.config)
    frame = [block.latent_tokens, block.vit_tokens]
    assert passes.tokens == [texts[0], *frame, texts[1], *frame, texts[2]]


@pytest.mark.parametrize(("terms", "image_scale"), [([PROMPT], 1.0), ([PICTURE, PROMPT], 2.0), ([PICTURE], 1.0)])
@torch.inference_mode()
def test_a_frame_in_turn_sees_those_before_it(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch, terms: list[Any], image_scale: float
) -> None:
    """By the implementation that frames together are held to: branches see the frame as they see an input picture."""
    pipe, model = small_pictures, small_pictures.model
    steps: list[Step] = []
    # A drawn picture is encoded with noise, from the one generator between the frames' own.
    result = pipe.run(
        terms, frames=2, frame_mode="turn", cfg_text_scale=4.0, cfg_img_scale=image_scale, cfg_interval=(0.0, 1.0),
        cfg_renorm_type="global", callback=steps.append, **SMALL,
    )  # fmt: skip
    assert [(step.index, step.total) for step in steps] == [(i, 6) for i in range(6)]
    generator = torch.Generator().manual_seed(SMALL["seed"])

    def seen(image: Image.Image) -> Picture:
        block = PictureBlock(image, True, model.folder.config)
        latents = encode_latents(model, block.image, encoding_noise(block, generator))
        return Picture(
            latents, block.latent_grid, model.bagel.embed_picture(shown_patches(model, block), *block.vit_grid)
        )

    told = [model.tokenizer.text_block(term) if isinstance(term, str) else seen(term) for term in terms]
    torch.randn(6, 64, generator=generator)
    frame = seen(result.images[0])
    reference = FramesReference(CHECKPOINT, model.tokenizer.vision_start, model.tokenizer.vision_end)
    full, no_text, texts = reference.branches(told)
    branches = ([*full, frame], [*no_text, frame], texts)
    asked = Asked(1, 1, (2, 3), 4, 3.0, 4.0, image_scale, "global")
    _, velocities = reference.draw(branches, steps[3].x_t, asked)
    for step, velocity in zip(steps[3:], velocities, strict=True):
        assert relative_l2(step.velocity, velocity) < 1e-5


def test_a_turn_s_text_comes_after_the_frame_before(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second frame is what one gets who gives the first back as a picture, and the noise is the same."""
    monkeypatch.setattr(inputs, "encoding_noise", lambda block, _: encoding_noise(block, fixed()))
    monkeypatch.setattr(
        Frames, "noise", lambda frames, values, _: torch.randn(frames.latents, values, generator=fixed())
    )
    for think in (False, True):
        settings = SMALL | {"cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0), "think": think, "max_think_tokens": 3}
        turned = small_pictures.run([PICTURE, "turn left"], turns=["go on"], **settings)
        if not think:  # a plan would be thought out anew, after the other terms
            again = small_pictures.run([PICTURE, "turn left", turned.images[0], "go on"], **settings)
            assert turned.latent is not None
            assert relative_l2(turned.latent[6:], again.latent) < 1e-5
        assert turned.settings["turns"] == ["go on"] and turned.settings["frames"] == 2


def fixed() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def test_a_preview_shows_all_frames(small_pictures: BagelPipeline) -> None:
    shown: list[Image.Image] = []
    drawn(small_pictures, 3, callback=lambda step: shown.append(step.preview().image()))
    assert shown[0].size == (2 * 6, 2 * 4)


def test_a_callback_stops_frames_in_turn(small_pictures: BagelPipeline) -> None:
    with pytest.raises(Cancelled):
        drawn(small_pictures, 3, frame_mode="turn", callback=lambda step: step.index < 5)


def test_frames_are_saved_in_one_file_and_in_many(small_pictures: BagelPipeline, tmp_path: Path) -> None:
    result = drawn(small_pictures, 3)
    sheet = Image.open(result.save(tmp_path / "all.png"))
    assert sheet.size == (2 * 48 + 4, 2 * 32 + 4)
    assert (np.asarray(sheet)[:32, :48] == pixels(result.images[0])).all()
    moving = Image.open(result.save(tmp_path / "all.webp"))
    assert moving.n_frames == 3
    written = [path.name for path in result.save_frames(tmp_path / "out.png", fps=4)]
    assert written[:5] == ["out-01.png", "out-02.png", "out-03.png", "out-sheet.png", "out.webp"]
    for number, image in enumerate(result.images, 1):
        path = tmp_path / f"out-0{number}.png"
        assert (pixels(Image.open(path)) == pixels(image)).all()
        assert read_metadata(path) == json.loads(json.dumps({**result.settings, "frame": number}))
    assert read_metadata(tmp_path / "out.webp")["frames"] == 3


@pytest.mark.parametrize(("given", "wrong"), [
    ({"frames": 0}, "frames must be a whole number from 1"), ({"frame_mode": "row"}, "unknown frame_mode 'row'"),
    ({"frame_delta": 0}, "frame_delta must be"), ({"turns": "left"}, "turns must be a list of texts"),
    ({"turns": ["left"], "frames": 3}, "frames must be 2 with 1 turns"), ({"turns": [" "]}, "prompt is empty"),
    ({"turns": ["left"], "output": "text"}, "turns are texts of frames"),
])  # fmt: skip
def test_impossible_frames(small_pictures: BagelPipeline, given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(SettingError, match=wrong):
        small_pictures.run([PROMPT], **given)


def test_what_does_not_fit_says_how_many_frames_would(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float32", max_ram="1.5GB")
    monkeypatch.setattr(Execution, "draw", lambda *_, **__: pytest.fail("it was begun"))
    with pytest.raises(DoesNotFitError, match=r"900 frames of 256x256 do not fit: .*; (\d+) would fit") as failure:
        pipe.generate(PROMPT, frames=900, height=256, width=256)
    most = int(str(failure.value).split("; ")[-1].split()[0])
    assert 1 < most < 900
    asked: Sequence[Any] = [pipe.prepare([PROMPT], frames=most, height=256, width=256).settings]
    assert asked[0].frames == most
    with pytest.raises(DoesNotFitError, match=f"; {most} would fit"):
        pipe.prepare([PROMPT], frames=most + 1, height=256, width=256)
    with pytest.raises(DoesNotFitError, match=f"plan for {most} frames"):
        BagelPipeline.from_pretrained(
            CHECKPOINT, device="cpu", dtype="float32", max_ram="1.5GB", frames=900, size=(256, 256), tasks=("generate",)
        )

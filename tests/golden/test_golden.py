"""Every reference case reproduced through `pipe.run`, in float32 and, looser, in bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.golden import CASES, FP32_TOLERANCE, request_of
from support.numeric import relative_l2
from support.paths import GOLDEN

from lowmem_bagel import BagelPipeline
from lowmem_bagel.generation.executor import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING, Token
from lowmem_bagel.sampling.denoise import Step

PICTURES = [name for name, case in CASES["cases"].items() if "velocities" in case["tensors"]]
ANSWERS = [name for name, case in CASES["cases"].items() if "velocities" not in case["tensors"]]

BF16_VELOCITY, BF16_LATENT, BF16_LEVELS = 0.07, 0.05, 4.0
"""Relative L2 of the first guided velocity and of the final latent, and the mean difference of the picture's levels
in 255. Each weight and activation is rounded to 2^-9, and guidance 4 amplifies the differences of its branches."""


@pytest.fixture(scope="module")
def fp32() -> BagelPipeline:
    return BagelPipeline.from_pretrained(GOLDEN / "checkpoint", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def bf16() -> BagelPipeline:
    return BagelPipeline.from_pretrained(GOLDEN / "checkpoint", device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("name", PICTURES)
def test_picture_in_float32(fp32: BagelPipeline, name: str) -> None:
    reference = load_file(GOLDEN / "cases" / f"{name}.safetensors")
    events: list[Step | Token] = []
    terms, settings = request_of(name)
    result = fp32.run(terms, callback=events.append, **settings)
    steps = [event for event in events if isinstance(event, Step)]
    torch.testing.assert_close(
        torch.tensor([s.t for s in steps]), reference["timesteps_all"], rtol=0, atol=1e-7, msg="timesteps"
    )
    for row, index in enumerate(reference["steps_kept"].tolist()):
        assert relative_l2(steps[index].x_t, reference["x_t"][row]) < FP32_TOLERANCE
        assert relative_l2(steps[index].velocity, reference["velocities"][row]) < FP32_TOLERANCE
    assert relative_l2(result.latent, reference["latent"]) < FP32_TOLERANCE
    assert [result.text] == (CASES["cases"][name]["text"] or [""])
    assert result.token_ids == reference.get("token_ids", torch.empty(0)).tolist()
    wanted = np.asarray(Image.open(GOLDEN / "cases" / f"{name}_out.png").convert("RGB"), dtype=int)
    levels = np.abs(np.asarray(result.image, dtype=int) - wanted)
    assert (levels <= 1).mean() >= 0.999


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_in_float32(fp32: BagelPipeline, name: str) -> None:
    reference = load_file(GOLDEN / "cases" / f"{name}.safetensors")
    terms, settings = request_of(name)
    result = fp32.run(terms, **settings)
    assert result.token_ids == reference["token_ids"].tolist()
    assert [result.text] == CASES["cases"][name]["text"]
    assert result.image is None


@pytest.mark.parametrize("name", PICTURES)
def test_picture_in_bfloat16(bf16: BagelPipeline, name: str) -> None:
    reference = load_file(GOLDEN / "cases" / f"{name}.safetensors")
    assert reference["steps_kept"][0] == 0
    terms, settings = request_of(name)
    events: list[Step | Token] = []
    result = bf16.run(terms, callback=events.append, **settings)
    first = next(event for event in events if isinstance(event, Step))
    assert torch.equal(first.x_t, reference["x_t"][0])
    assert relative_l2(first.velocity, reference["velocities"][0]) < BF16_VELOCITY
    assert relative_l2(result.latent, reference["latent"]) < BF16_LATENT
    wanted = np.asarray(Image.open(GOLDEN / "cases" / f"{name}_out.png").convert("RGB"), dtype=int)
    assert np.abs(np.asarray(result.image, dtype=int) - wanted).mean() < BF16_LEVELS


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_in_bfloat16(bf16: BagelPipeline, name: str) -> None:
    """Only the beginning: from the first close call on, a rounding decides."""
    reference = load_file(GOLDEN / "cases" / f"{name}.safetensors")
    terms, settings = request_of(name)
    result = bf16.run(terms, **settings)
    assert result.token_ids[:4] == reference["token_ids"].tolist()[:4]


def test_system_prompts_are_the_published_ones() -> None:
    constants = CASES["constants"]
    assert constants["think_system_prompt_generation"] == THINK_BEFORE_DRAWING
    assert constants["think_system_prompt_understanding"] == THINK_BEFORE_ANSWERING


def test_tokenizer(fp32: BagelPipeline) -> None:
    tokenizer = fp32.model.tokenizer
    for prompt, ids in CASES["prompts"].items():
        assert tokenizer.encode(prompt) == ids
    wanted = CASES["token_ids"]
    assert tokenizer.im_start == wanted["bos_token_id"]
    assert tokenizer.im_end == wanted["eos_token_id"]
    assert tokenizer.vision_start == wanted["start_of_image"]
    assert tokenizer.vision_end == wanted["end_of_image"]

"""Every reference case reproduced through `pipe.run`, in float32 and, looser, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from support.golden import CASES, CaseRun, run_case
from support.numeric import relative_l2
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline
from lowmem_bagel.generation.executor import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING
from lowmem_bagel.hardware.host import BF16_FEATURES, processor

PICTURES = [name for name, case in CASES["cases"].items() if "velocities" in case["tensors"]]
ANSWERS = [name for name, case in CASES["cases"].items() if "velocities" not in case["tensors"]]
LARGE = {"edit_rgba_think", "edit_two_images"}
"""Edits that take a processor which emulates bfloat16 longer than all the rest of this file does, "edit" aside."""

BF16_VELOCITY, BF16_LATENT, BF16_LEVELS, BF16_LOGITS = 0.07, 0.05, 4.0, 0.03
"""Relative L2 of the first guided velocity and of the final latent, the mean difference of the picture's levels in 255,
and relative L2 of each token's logits. Each weight and activation is rounded to 2^-9, and guidance 4 amplifies the
differences of its branches."""


@pytest.fixture(scope="module")
def in_float32(pipe: BagelPipeline) -> Callable[[str], CaseRun]:
    """Each case once."""
    return cache(lambda name: run_case(pipe, name))


@pytest.fixture(scope="module")
def bf16() -> BagelPipeline:
    return BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("name", PICTURES)
def test_picture_in_float32(in_float32: Callable[[str], CaseRun], name: str) -> None:
    run = in_float32(name)
    times = torch.tensor([step.t for step in run.steps])
    torch.testing.assert_close(times, run.reference["timesteps_all"], rtol=0, atol=1e-7)
    run.check_picture_in_float32()
    run.check_text()


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_in_float32(in_float32: Callable[[str], CaseRun], name: str) -> None:
    run = in_float32(name)
    run.check_text()
    assert run.result.image is None


@pytest.mark.parametrize("name", CASES["cases"])
def test_bfloat16(bf16: BagelPipeline, in_float32: Callable[[str], CaseRun], name: str) -> None:
    if name in LARGE and not BF16_FEATURES.intersection(processor()[1]):
        pytest.skip("this processor has no bfloat16 arithmetic: one edit stands for the others")
    run = run_case(bf16, name, led=True)
    run.check_text()
    if run.logits is not None:
        for found, wanted in zip(run.logits, in_float32(name).logits, strict=True):
            assert 1e-4 < relative_l2(found, wanted) < BF16_LOGITS
    if name in PICTURES:
        reference, first = run.reference, run.steps[0]
        assert reference["steps_kept"][0] == 0
        assert torch.equal(first.x_t, reference["x_t"][0])
        assert relative_l2(first.velocity, reference["velocities"][0]) < BF16_VELOCITY
        assert relative_l2(run.result.latent, reference["latent"]) < BF16_LATENT
        assert run.levels.mean() < BF16_LEVELS


def test_system_prompts_are_the_published_ones() -> None:
    constants = CASES["constants"]
    assert constants["think_system_prompt_generation"] == THINK_BEFORE_DRAWING
    assert constants["think_system_prompt_understanding"] == THINK_BEFORE_ANSWERING


def test_tokenizer(pipe: BagelPipeline) -> None:
    tokenizer = pipe.model.tokenizer
    for prompt, ids in CASES["prompts"].items():
        assert tokenizer.encode(prompt) == ids
    wanted = CASES["token_ids"]
    assert tokenizer.im_start == wanted["bos_token_id"]
    assert tokenizer.im_end == wanted["eos_token_id"]
    assert tokenizer.vision_start == wanted["start_of_image"]
    assert tokenizer.vision_end == wanted["end_of_image"]

"""Every reference case reproduced through `pipe.run`, in float32 and, looser, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256

import pytest
import torch
from support.golden import CASES, CaseRun, first_step, run_case
from support.numeric import relative_l2
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline
from lowmem_bagel.generation.executor import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING
from lowmem_bagel.hardware.host import BF16_FEATURES, processor

PICTURES = [name for name, case in CASES["cases"].items() if "velocities" in case["tensors"]]
LARGE = {"edit_rgba_think", "edit_two_images"}
"""Edits of which bfloat16 is held to the first step: "edit" goes on to a picture in their place. They still take a
processor which emulates bfloat16 longer than all the rest of this file does, "edit" aside."""

BF16_VELOCITY, BF16_LATENT, BF16_LEVELS, BF16_LOGITS = 0.07, 0.05, 4.0, 0.03
"""Relative L2 of the first guided velocity and of the final latent, the mean difference of the picture's levels in 255,
and relative L2 of each token's logits. Each weight and activation is rounded to 2^-9, and guidance 4 amplifies the
differences of its branches."""


# Tests of one case follow each other: what they share is computed once, whichever worker has them.
each_case = pytest.mark.parametrize("name", CASES["cases"], scope="module")


@pytest.fixture(scope="module")
def in_float32(encoded_once: BagelPipeline) -> Callable[[str], CaseRun]:
    """Each case once."""
    return cache(lambda name: run_case(encoded_once, name))


@pytest.fixture(scope="module")
def bf16() -> BagelPipeline:
    return BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def encoded_once(pipe: BagelPipeline, bf16: BagelPipeline) -> Iterator[BagelPipeline]:
    """The float32 one. The autoencoder of `bf16` is the same, in float32 too: what both are shown is encoded once."""
    vae, other = pipe.model.vae, bf16.model.vae
    assert vae is not None and other is not None and repr(vae) == repr(other)
    tensors, others = vae.state_dict(), other.state_dict()
    for name, tensor in tensors.items():
        assert others[name].dtype == torch.float32 and torch.equal(others[name], tensor), name
    encode, known = vae.encode, dict[bytes, torch.Tensor]()

    def encoded(pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == noise.dtype == torch.float32
        key = b"".join(sha256(x.contiguous().numpy()).digest() for x in (pixels, noise))
        if key not in known:
            known[key] = encode(pixels, noise)
        return known[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "encode", encoded)
        patch.setattr(other, "encode", encoded)
        yield pipe


@each_case
def test_float32(in_float32: Callable[[str], CaseRun], name: str) -> None:
    run = in_float32(name)
    run.check_text()
    if name in PICTURES:
        times = torch.tensor([step.t for step in run.steps])
        torch.testing.assert_close(times, run.reference["timesteps_all"], rtol=0, atol=1e-7)
        run.check_picture_in_float32()
    else:
        assert run.result.image is None


@each_case
def test_bfloat16(bf16: BagelPipeline, in_float32: Callable[[str], CaseRun], name: str) -> None:
    if name in LARGE and not BF16_FEATURES.intersection(processor()[1]):
        pytest.skip("this processor has no bfloat16 arithmetic: one edit stands for the others")
    run = first_step(bf16, name, led=True) if name in LARGE else run_case(bf16, name, led=True)
    assert (run.logits is not None) == ("token_ids" in run.reference)
    if run.logits is not None:
        for found, wanted in zip(run.logits, in_float32(name).logits, strict=True):
            assert 1e-4 < relative_l2(found, wanted) < BF16_LOGITS
    if name in PICTURES:
        reference, first = run.reference, run.steps[0]
        assert reference["steps_kept"][0] == 0
        assert torch.equal(first.x_t, reference["x_t"][0])
        assert relative_l2(first.velocity, reference["velocities"][0]) < BF16_VELOCITY
    if isinstance(run, CaseRun):
        run.check_text()
    if isinstance(run, CaseRun) and name in PICTURES:
        assert relative_l2(run.result.latent, run.reference["latent"]) < BF16_LATENT
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

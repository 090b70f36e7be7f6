"""Timesteps, guidance, choice of tokens, and what a request does between its steps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.numeric import relative_l2
from support.paths import CHECKPOINT
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import Cancelled, SettingError
from lowmem_bagel.generation.executor import Token
from lowmem_bagel.sampling.denoise import Step
from lowmem_bagel.sampling.guidance import Guidance
from lowmem_bagel.sampling.schedule import timesteps
from lowmem_bagel.sampling.text import TokenChoice

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=np.uint8))
OTHER = PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_timesteps": 4, "seed": 0}


class TestSchedule:
    @pytest.mark.parametrize(("count", "shift"), [(2, 3.0), (50, 3.0), (50, 1.0), (24, 0.5)])
    def test_formula(self, count: int, shift: float) -> None:
        found = timesteps(count, shift)
        wanted = [shift * u / (1 + (shift - 1) * u) for u in (1 - i / (count - 1) for i in range(count))]
        assert (found[0], found[-1]) == (1, 0)
        assert np.abs(found.double().numpy() - wanted).max() < 1e-6

    def test_published_defaults_guide_41_of_49_steps(self) -> None:
        guidance = Guidance(4.0, 1.0, (0.4, 1.0), "global", 0.0)
        times = timesteps(50, 3.0).tolist()[:-1]
        guided = [t for t in times if guidance.active(t)]
        assert (len(times), len(guided), len(times) + len(guided)) == (49, 41, 90)


def guided_by_definition(
    c: np.ndarray, ct: np.ndarray, ci: np.ndarray | None, text: float, image: float, kind: str, low: float
) -> np.ndarray:
    """The specification's sentences, in float64."""

    def renorm(reference: np.ndarray, v: np.ndarray, axis: int | None) -> np.ndarray:
        ratio = np.linalg.norm(reference, axis=axis, keepdims=True) / (
            np.linalg.norm(v, axis=axis, keepdims=True) + 1e-8
        )
        return v * np.clip(ratio, low, 1.0)

    v = ct + text * (c - ct)
    if kind == "text_channel":
        v = renorm(c, v, 1)
    if ci is not None:
        v = ci + image * (v - ci)
    if kind == "global":
        v = renorm(c, v, None)
    if kind == "channel":
        v = renorm(c, v, 1)
    return v


class TestGuidance:
    @pytest.mark.parametrize("kind", ["global", "channel", "text_channel"])
    @pytest.mark.parametrize("with_image", [False, True])
    @pytest.mark.parametrize("low", [0.0, 0.9])
    def test_formula(self, kind: Any, with_image: bool, low: float) -> None:
        torch.manual_seed(4)
        c, ct, ci = torch.randn(3, 24, 64).unbind(0)
        guidance = Guidance(4.0, 1.7, (0.0, 1.0), kind, low)
        found = guidance.combine(c, ct, ci if with_image else None)
        branches = [x.double().numpy() for x in (c, ct, ci)]
        wanted = guided_by_definition(*branches[:2], branches[2] if with_image else None, 4.0, 1.7, kind, low)
        assert relative_l2(found, torch.from_numpy(wanted)) < 1e-6

    def test_a_zero_velocity_is_no_nan(self) -> None:
        zero = torch.zeros(4, 64)
        for kind in ("global", "channel", "text_channel"):
            assert not Guidance(4.0, 2.0, (0.0, 1.0), kind, 0.0).combine(zero, zero, zero).isnan().any()  # type: ignore[arg-type]

    def test_interval_is_open_below_and_closed_above(self) -> None:
        guidance = Guidance(4.0, 1.0, (0.4, 0.8), "global", 0.0)
        assert [guidance.active(t) for t in (0.4, 0.41, 0.8, 0.81)] == [False, True, True, False]

    def test_scale_one_turns_it_off(self, small_pictures: BagelPipeline) -> None:
        assert not Guidance(1.0, 2.0, (0.0, 1.0), "global", 0.0).active(0.5)
        off = small_pictures.edit(PICTURE, "make it green", **SMALL, cfg_text_scale=1.0)
        outside = small_pictures.edit(PICTURE, "make it green", **SMALL, cfg_interval=(0.0, 0.0))
        assert torch.equal(off.latent, outside.latent)


class TestTokens:
    LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])

    def test_greedy(self) -> None:
        assert TokenChoice()(self.LOGITS, torch.Generator()) == 1

    def test_frequencies_are_the_softmax(self) -> None:
        generator = torch.Generator().manual_seed(0)
        choose = TokenChoice(do_sample=True, temperature=2.0)
        counts = np.bincount([choose(self.LOGITS, generator) for _ in range(4000)], minlength=4) / 4000
        wanted = (self.LOGITS / 2.0).softmax(0).numpy()
        assert np.abs(counts - wanted).max() < 4 * math.sqrt(0.25 / 4000)

    @pytest.mark.parametrize(("top_p", "allowed"), [(0.1, {1}), (0.65, {1}), (0.66, {1, 2}), (0.95, {0, 1, 2})])
    def test_top_p_keeps_the_smallest_set(self, top_p: float, allowed: set[int]) -> None:
        """softmax is about 0.089, 0.657, 0.242, 0.012."""
        generator = torch.Generator().manual_seed(0)
        choose = TokenChoice(do_sample=True, temperature=1.0, top_p=top_p)
        assert {choose(self.LOGITS, generator) for _ in range(400)} == allowed

    def test_sampling_follows_the_seed(self, pipe: BagelPipeline) -> None:
        settings = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 12}
        first, again, other = (pipe.ask("what?", seed=seed, **settings).token_ids for seed in (0, 0, 1))
        assert first == again
        assert first != other

    def test_the_limit_counts_the_first_token(self, pipe: BagelPipeline) -> None:
        assert pipe.ask("what?", max_new_tokens=1).token_ids == [pipe.model.tokenizer.im_start]
        assert len(pipe.ask("what?", max_new_tokens=7).token_ids) == 7


class TestRequests:
    def test_seed_zero_means_zero(self, pipe: BagelPipeline) -> None:
        first, again = (pipe.generate("a circle", **SMALL) for _ in range(2))
        other = pipe.generate("a circle", **SMALL | {"seed": 1})
        assert first.seed == 0
        assert torch.equal(first.latent, again.latent)
        assert not torch.equal(first.latent, other.latent)

    def test_a_random_seed_is_told_and_repeats_the_picture(self, pipe: BagelPipeline) -> None:
        first = pipe.generate("a circle", **SMALL | {"seed": None})
        assert torch.equal(first.latent, pipe.generate("a circle", **SMALL | {"seed": first.seed}).latent)
        assert first.settings["seed"] == first.seed

    def test_callback_sees_every_step_and_token(self, pipe: BagelPipeline) -> None:
        events: list[Step | Token] = []
        result = pipe.generate("a circle", **SMALL, think=True, max_think_tokens=6, callback=events.append)
        tokens = [event for event in events if isinstance(event, Token)]
        steps = [event for event in events if isinstance(event, Step)]
        assert events == [*tokens, *steps]
        assert [token.id for token in tokens] == result.token_ids[1:]
        assert [token.index for token in tokens] == list(range(2, 2 + len(tokens)))
        assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]
        assert steps[0].t == 1.0

    @pytest.mark.parametrize("at", [0, 2])
    def test_cancelling_between_steps(self, pipe: BagelPipeline, at: int) -> None:
        seen: list[int] = []

        def stop(event: Any) -> bool:
            seen.append(event.index)
            return event.index < at

        before = pipe.generate("a circle", **SMALL).latent
        with pytest.raises(Cancelled):
            pipe.generate("a circle", **SMALL, callback=stop)
        assert seen == list(range(at + 1))
        assert torch.equal(pipe.generate("a circle", **SMALL).latent, before)

    def test_cancelling_an_answer(self, pipe: BagelPipeline) -> None:
        with pytest.raises(Cancelled):
            pipe.ask("what?", callback=lambda event: False)

    def test_only_false_stops(self, pipe: BagelPipeline) -> None:
        assert pipe.generate("a circle", **SMALL, callback=lambda event: 0).image is not None

    def test_any_order_of_texts_and_pictures(self, small_pictures: BagelPipeline) -> None:
        """Every order runs, and every order is a different request. A third of them: two that begin with each."""
        latents: list[Tensor] = []
        for terms in [*itertools.permutations([PICTURE, OTHER, "a circle", "a square"])][::3]:
            latent = small_pictures.run(list(terms), **SMALL).latent
            assert latent is not None
            assert latent.isfinite().all()
            latents.append(latent)
        assert min(relative_l2(a, b) for a, b in itertools.combinations(latents, 2)) > 1e-6

    def test_any_order_can_be_asked_about(self, small_pictures: BagelPipeline) -> None:
        for terms in ([PICTURE, "what?"], ["what?", PICTURE], [PICTURE, "and", OTHER, "same?"], [PICTURE]):
            result = small_pictures.run(terms, output="text", max_new_tokens=4)
            assert len(result.token_ids) <= 4
            assert result.image is None

    def test_an_edit_has_the_pictures_resized_size(self, small_pictures: BagelPipeline) -> None:
        """40 x 56 pixels are within the limits, so only the stride rounds: 2.5 to 2 and 3.5 to 4, both to even."""
        result = small_pictures.edit(PICTURE, "make it green", num_timesteps=2, seed=0)
        assert result.image is not None
        assert result.image.size == (64, 32)
        assert (result.settings["height"], result.settings["width"]) == (32, 64)

    @pytest.mark.parametrize(
        ("terms", "message"), [([], "nothing to work from"), ([""], "the prompt is empty"), ([PICTURE, " "], "empty")]
    )
    def test_nothing_to_work_from(self, small_pictures: BagelPipeline, terms: list[Any], message: str) -> None:
        with pytest.raises(SettingError, match=message):
            small_pictures.run(terms, **SMALL)

    def test_stats_name_the_phases(self, pipe: BagelPipeline) -> None:
        result = pipe.generate("a circle", **SMALL, think=True, max_think_tokens=3)
        assert list(result.stats.phases) == ["prefill", "think", "denoise", "decode"]
        assert list(pipe.ask("what?", max_new_tokens=2).stats.phases) == ["prefill", "answer"]
        assert result.stats.seconds == sum(phase.seconds for phase in result.stats.phases.values()) > 0

    def test_float16(self, pipe: BagelPipeline) -> None:
        """Half has eight times bfloat16's precision: the first velocity is within 0.07 / 8 of float32's."""
        half = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float16")
        steps: list[list[Step]] = [[], []]
        for run, seen in zip((pipe, half), steps, strict=True):
            assert run.generate("a circle", **SMALL, callback=seen.append).image is not None
        assert relative_l2(steps[1][0].velocity, steps[0][0].velocity) < 0.07 / 8
        assert half.ask("what?", max_new_tokens=3).token_ids == pipe.ask("what?", max_new_tokens=3).token_ids

    def test_what_it_was_not_loaded_for(self) -> None:
        answers = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float32", tasks=("ask",))
        assert answers.ask("what?", max_new_tokens=2).token_ids
        with pytest.raises(SettingError, match="loaded for ask only"):
            answers.generate("a circle")

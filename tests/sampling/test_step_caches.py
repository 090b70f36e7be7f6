"""Step caches: what each does, and its declaration held against the objects that it makes."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.live_memory import LiveMemory
from support.numeric import relative_l2

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import SettingError
from lowmem_bagel.model.decoder import Pass
from lowmem_bagel.ops.linear import Add
from lowmem_bagel.sampling.schedule import timesteps
from lowmem_bagel.sampling.step_caches.base import BranchCache, StepCache
from lowmem_bagel.sampling.step_caches.first_block import FIRST_BLOCK, FirstBlock
from lowmem_bagel.sampling.step_caches.none import NoCache
from lowmem_bagel.sampling.step_caches.registry import step_cache, step_caches
from lowmem_bagel.sampling.step_caches.taylorseer import MAX_ORDER, TaylorSeer
from lowmem_bagel.sampling.step_caches.velocity import EARLY, VELOCITY, Pattern, Velocity

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=np.uint8))
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_timesteps": 4, "seed": 0}
TOKENS, WIDTH = 8, 64
STATE = TOKENS * WIDTH * 4
"""Bytes of a branch's hidden states below."""


def counted(declared: StepCache, cache: BranchCache, evaluations: int, seed: int) -> tuple[int, float]:
    """Of so many evaluations of random hidden states: how many were computed, and the most states that were held."""
    generator = torch.Generator().manual_seed(seed)
    computed, most, scale = 0, 0.0, random.Random(seed).random()
    with LiveMemory() as memory:
        latents = torch.randn(TOKENS, WIDTH, generator=generator)
        for _ in range(evaluations):
            if cache.predict() is None:
                leaving = latents + 1 + scale * torch.randn(TOKENS, WIDTH, generator=generator)
                if cache.after_first_layer(latents, leaving) is None:
                    cache.store(leaving + torch.randn(TOKENS, WIDTH, generator=generator))
                    computed += 1
                leaving = None
            most = max(most, memory.now / STATE - 1)  # the latents themselves
    return computed, most


@pytest.mark.parametrize("evaluations", [1, 2, 4, 5, 6, *random.Random(1).sample(range(7, 60), 4)])
@pytest.mark.parametrize("name", step_caches())
def test_objects_do_what_their_cache_declares(name: str, evaluations: int) -> None:
    declared = step_cache(name)
    given = {setting.name: setting.default for setting in declared.settings}
    computed, held = counted(declared, declared.branch(**given), evaluations, seed=evaluations)
    assert held == pytest.approx(declared.stored(evaluations), abs=0.02)
    if declared.depends_on_picture:
        assert computed <= declared.computed(evaluations) == evaluations
    else:
        assert computed == declared.computed(evaluations)


def test_the_count_sees_what_a_cache_skips() -> None:
    """The test above would hold for a first-block cache that never skips."""
    assert counted(FIRST_BLOCK, FirstBlock(1e3), 20, seed=0)[0] == 1
    assert counted(FIRST_BLOCK, FirstBlock(0.0), 20, seed=0)[0] == 20


def test_names_and_settings_are_each_there_once() -> None:
    assert [*step_caches()] == ["none", "taylorseer", "first-block", *(cache.name for cache in VELOCITY)]
    names = [setting.name for cache in step_caches().values() for setting in cache.settings]
    assert len(names) == len(set(names))
    for cache in step_caches().values():
        assert all(s.low <= s.default <= s.high for s in cache.settings)


@pytest.mark.parametrize("name", ["fancy", ["taylorseer"], 3])
def test_an_unknown_name_is_refused(name: Any) -> None:
    with pytest.raises(SettingError, match=r"unknown step_cache .*; choose one of none, taylorseer, first-block"):
        step_cache(name)


def taylorseer_by_definition(values: list[np.ndarray]) -> list[np.ndarray]:
    """What stands for each evaluation, from the specification: the value itself, or the extrapolation."""
    computed = [i for i in range(len(values)) if i <= 4 or (i - 4) % 3 == 0]
    stored: list[np.ndarray] = []
    found, last = [], 0
    for i, value in enumerate(values):
        if i in computed:
            differences = [value]
            if i >= 4:
                for order in range(min(6, len(stored))):
                    differences.append((differences[order] - stored[order]) / (i - last))
            stored, last = differences, i
            found.append(value)
        else:
            found.append(sum(d * (i - last) ** n / math.factorial(n) for n, d in enumerate(stored)))
    return found


class TestFirstBlock:
    def test_skips_while_the_first_layer_changes_little(self) -> None:
        cache = FirstBlock(0.1)
        entering, added = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
        assert cache.predict() is None
        assert cache.after_first_layer(entering, entering + added) is None, "nothing is known yet"
        cache.store(entering + added + 7)
        skipped = cache.after_first_layer(entering + 1, entering + 1 + 1.05 * added)
        assert skipped is not None
        torch.testing.assert_close(skipped, entering + 1 + 1.05 * added + 7)
        assert cache.after_first_layer(entering, entering + 1.15 * added) is None
        cache.store(entering + 9)
        assert cache.after_first_layer(entering, entering + 1.2 * added) is not None, "measured from the last computed"

    @pytest.mark.parametrize("task", ["generate", "edit"])
    def test_threshold_of_zero_is_no_cache(self, small_pictures: BagelPipeline, task: str) -> None:
        terms = ["a circle"] if task == "generate" else [PICTURE, "a circle"]
        settings = SMALL | {"num_timesteps": 8}
        plain = small_pictures.run(terms, **settings)
        cached = small_pictures.run(terms, **settings, step_cache="first-block", step_cache_threshold=0)
        assert torch.equal(cached.latent, plain.latent)
        assert cached.settings["evaluations_computed"] == cached.settings["evaluations"]

    @pytest.mark.parametrize("step_cache", ["none", "taylorseer", "first-block"])
    def test_linears_may_overwrite_the_residual(
        self, small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch, step_cache: str
    ) -> None:
        """What a cache keeps of hidden states must not change when the pass goes on."""
        settings = SMALL | {"num_timesteps": 16, "step_cache": step_cache, "step_cache_threshold": 0.1}
        plain = small_pictures.run([PICTURE, "a circle"], **settings)
        monkeypatch.setattr(Add, "__call__", lambda self, y: self.residual.add_(y))
        overwritten = small_pictures.run([PICTURE, "a circle"], **settings)
        assert torch.equal(overwritten.latent, plain.latent)
        computed = plain.settings.get("evaluations_computed", 0), plain.settings.get("evaluations", 0)
        assert step_cache == "none" or computed[0] < computed[1]

    def test_every_branch_computes_first_and_skips_after(self, small_pictures: BagelPipeline) -> None:
        settings = SMALL | {"num_timesteps": 8, "cfg_interval": (0.0, 1.0), "step_cache": "first-block"}
        cached = small_pictures.generate("a circle", **settings, step_cache_threshold=100)
        assert cached.settings["evaluations"] == 14
        assert cached.settings["evaluations_computed"] == 2

    @pytest.mark.parametrize("task", ["generate", "edit"])
    def test_batch_of_branches_changes_nothing(
        self, small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch, task: str
    ) -> None:
        """Also where one branch of a batch goes on and another does not: each has its own state."""
        terms = ["a circle"] if task == "generate" else [PICTURE, "a circle"]
        settings = SMALL | {"num_timesteps": 16, "step_cache": "first-block"}
        results, kept = [], []
        keep = Pass.keep
        monkeypatch.setattr(Pass, "keep", lambda run, rows, attend: (kept.append(rows), keep(run, rows, attend)))
        for batch in (True, False):
            thresholds = itertools.cycle((0.05, 0.2, 0.0))
            own = replace(FIRST_BLOCK, branch=lambda step_cache_threshold, t=thresholds: FirstBlock(next(t)))
            monkeypatch.setattr("lowmem_bagel.generation.drawing.step_cache", lambda name, own=own: own)
            plan = replace(small_pictures.model.plan, guidance_batch=batch)
            monkeypatch.setattr(small_pictures.model, "plan", plan)
            results.append(small_pictures.run(terms, **settings))
        together, apart = results
        assert together.settings["evaluations_computed"] == apart.settings["evaluations_computed"]
        assert 2 < apart.settings["evaluations_computed"] < apart.settings["evaluations"]
        assert relative_l2(together.latent, apart.latent) < 1e-5
        assert kept, "no step on which the branches differed"


class TestTaylorSeer:
    def test_which_evaluations_are_computed(self) -> None:
        cache = TaylorSeer()
        computed = []
        for evaluation in range(20):
            if cache.predict() is None:
                cache.store(torch.zeros(1))
                computed.append(evaluation)
        assert computed == [0, 1, 2, 3, 4, 7, 10, 13, 16, 19]

    def test_predictions_follow_the_definition(self) -> None:
        generator = np.random.default_rng(0)
        values = [np.cumsum(generator.normal(size=(5, 8)), axis=0) + i for i in range(40)]
        wanted = taylorseer_by_definition(values)
        cache = TaylorSeer()
        for value, expected in zip(values, wanted, strict=True):
            found = cache.predict()
            if found is None:
                cache.store(torch.from_numpy(value))
                found = torch.from_numpy(value)
            assert relative_l2(found, torch.from_numpy(expected)) < 1e-12
        assert len(cache.differences) == MAX_ORDER + 1

    def test_a_straight_line_is_continued_exactly(self) -> None:
        cache = TaylorSeer()
        for evaluation in range(13):
            found = cache.predict()
            if found is None:
                cache.store(torch.tensor([2.0 * evaluation + 1]))
            else:
                assert found.item() == 2.0 * evaluation + 1

    def test_short_runs_are_computed_whole(self, small_pictures: BagelPipeline) -> None:
        settings = SMALL | {"num_timesteps": 6}
        plain = small_pictures.generate("a circle", **settings)
        cached = small_pictures.generate("a circle", **settings, step_cache="taylorseer")
        assert torch.equal(plain.latent, cached.latent)

    def test_each_branch_counts_its_own_evaluations(
        self, small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Unguided steps evaluate the full branch alone; stale state of an earlier request plays no part."""
        made: list[TaylorSeer] = []
        start = TaylorSeer.__init__

        def started(self: TaylorSeer) -> None:
            start(self)
            made.append(self)

        monkeypatch.setattr(TaylorSeer, "__init__", started)
        settings = SMALL | {"num_timesteps": 12, "step_cache": "taylorseer"}
        first = small_pictures.generate("a circle", **settings)
        guided = sum(0.4 < t <= 1 for t in timesteps(12, 3.0).tolist()[:-1])
        assert [cache.evaluation for cache in made] == [11, guided]
        assert torch.equal(small_pictures.generate("a circle", **settings).latent, first.latent)
        small_pictures.ask("what?", max_new_tokens=2)


def test_no_cache_computes_everything() -> None:
    cache = NoCache()
    cache.store(torch.zeros(1))
    assert cache.predict() is None


@pytest.mark.parametrize(("threshold", "skips"), [(0.5, False), (0.5 + 1e-6, True), (0.0, False)])
def test_a_change_that_reaches_the_threshold_is_computed(threshold: float, skips: bool) -> None:
    """So that a threshold of 0 skips nothing, not even a first layer that repeats itself."""
    cache = FirstBlock(threshold)
    entering = torch.zeros(1, 2, 4)
    assert cache.after_first_layer(entering, entering + 1.0) is None
    cache.store(entering + 3.0)
    change = 0.5 if threshold else 0.0
    assert (cache.after_first_layer(entering, entering + 1.0 + change) is not None) == skips


def test_the_patterns_of_the_speeds() -> None:
    def steps(pattern: Pattern) -> list[int]:
        found = [0]
        while (following := pattern.following(found[-1])) < 49:
            found.append(following)
        return found

    assert steps(EARLY) == [0, 2, 4, 6, 8, 12, 16, 20, 24, 30, 36, 42, 48]
    assert steps(Pattern(3, ((0, 7),))) == [0, 1, 2, 9, 16, 23, 30, 37, 44]
    for pattern in (EARLY, Pattern(3, ((0, 7),))):
        for evaluations in range(1, 50):
            assert pattern.computed(evaluations) == sum(step < evaluations for step in steps(pattern))


@pytest.mark.parametrize("pattern", [EARLY, Pattern(2, ((0, 3), (20, 5)))])
def test_velocities_on_a_line_are_predicted_exactly_and_a_bend_is_not(pattern: Pattern) -> None:
    slope, start = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    line, bend = Velocity(pattern), Velocity(pattern)
    for step in range(49):
        found, bent = line.predict(), bend.predict()
        assert (found is None) == (bent is None)
        if found is None:
            line.store(start + slope * step)
            bend.store(start + slope * step**2)
        elif len(line.known) > 1:
            assert relative_l2(found, start + slope * step) < 1e-12
            assert bent is not None and relative_l2(bent, start + slope * step**2) > 1e-6
        else:
            assert found.equal(start)

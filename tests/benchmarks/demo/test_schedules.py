"""The search for schedules: what it computes, and that it draws as the pipeline does."""

from __future__ import annotations

import pytest
import torch
from lowmem_bagel.benchmarks.demo.draw import Canvas
from lowmem_bagel.benchmarks.demo.dual import Middle
from lowmem_bagel.benchmarks.demo.export import load_checkpoint
from lowmem_bagel.benchmarks.demo.extending import extended
from lowmem_bagel.benchmarks.demo.sampler import Sampler
from lowmem_bagel.benchmarks.demo.schedules import (
    EXACT,
    FAMILIES,
    MASKS,
    OF_EDITS,
    OURS,
    Dual,
    Schedule,
    families,
    ordered,
)
from lowmem_bagel.benchmarks.demo.search import draw
from lowmem_bagel.benchmarks.demo.tasks import Drawings, Edits, Task
from lowmem_bagel.benchmarks.demo.tokens import special_ids
from support.numeric import relative_l2
from tokenizers import Tokenizer

from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.sampling.step_caches.first_block import FirstBlock
from lowmem_bagel.sampling.step_caches.taylorseer import TaylorSeer
from lowmem_bagel.sampling.step_caches.velocity import EARLY, Pattern, Velocity


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    bagel, vae, config = load_checkpoint(FOLDER, torch.device("cpu"))
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    factors = config.vae.scale_factor, config.vae.shift_factor
    canvas = Canvas(96, 96)  # smaller than it has learnt: nobody judges what is drawn, and scenes still find room
    return Sampler(bagel, vae, *factors, tokenizer, special_ids(tokenizer), canvas)


@pytest.mark.parametrize("pattern", [EARLY, Pattern(2, ((0, 3), (20, 5)))])
def test_a_schedule_is_the_step_cache_of_its_pattern(pattern: Pattern) -> None:
    steps = Schedule(pattern.first, pattern.intervals).steps(49)
    generator = torch.Generator().manual_seed(1)
    cache, known = Velocity(pattern), list[tuple[float, torch.Tensor]]()
    for step in range(49):
        found = cache.predict()
        assert (found is None) == (step in steps)
        if found is None:
            value = torch.randn(6, 4, generator=generator, dtype=torch.float64)
            cache.store(value)
            known.append((1 - step / 49, value))
        else:
            assert relative_l2(found, extended(known, 1 - step / 49, 1)) < 1e-12


def test_which_steps() -> None:
    assert Schedule(2, ((0, 3), (5, 4))).steps(14) == [0, 1, 4, 7, 11]
    assert Schedule(1, ((0, 4),), last=True).steps(8) == [0, 4, 7]
    assert Schedule(2, ((0, 2),)).rare_steps(9, 2) == [0, 1, 5]
    assert Schedule(1, (), runs=(2, 1, 1, 2)).steps(6) == [0, 1, 3]
    assert Schedule(1, (), runs=(2, 1, 1, 2)).steps(12) == [0, 1, 2, 3, 6, 7]
    assert [len(Schedule(1, (), runs=runs).steps(28)) for runs in MASKS] == [18, 15, 11, 8]


def test_a_polynomial_is_extended_exactly() -> None:
    def cubic(at: float) -> torch.Tensor:
        return torch.tensor([1.0, -2.0], dtype=torch.float64) * at**3 + at

    known = [(at, cubic(at)) for at in (1.0, 0.8, 0.7, 0.4)]
    assert relative_l2(extended(known, 0.1, 3), cubic(0.1)) < 1e-12
    assert extended(known, 0.1, 0).equal(known[-1][1])


def test_every_row_of_a_batch_has_its_own_places() -> None:
    generator = torch.Generator().manual_seed(3)
    values, places = torch.randn(3, 2, 5, generator=generator), torch.tensor([[1.0, 2, 4], [1, 4, 6]])
    known = [(places[:, i, None], values[i]) for i in range(3)]
    for damped in (0.0, 0.5):
        found = extended(known, 7.0, 2, damped)
        for row in range(2):
            alone = [(float(places[row, i]), values[i, row]) for i in range(3)]
            assert relative_l2(found[row], extended(alone, 7.0, 2, damped)) < 1e-5


def test_hermites_differences_are_taylorseers() -> None:
    values = torch.randn(12, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    cache = TaylorSeer()
    for value in values[:5]:
        assert cache.predict() is None
        cache.store(value)
    for _ in range(2):
        assert cache.predict() is not None
    cache.store(values[7])
    zeroth, first, second = cache.differences[:3]
    known = [(float(at), values[at]) for at in (3, 4, 7)]
    damped, ahead = 0.6, 2.0
    linear, square = 2 * damped**2 * ahead, damped**2 * (4 * damped**2 * ahead**2 - 2)
    # TaylorSeer's second difference needs two firsts, and its first first is of evaluations 3 and 4.
    assert relative_l2(extended(known, 9.0, 2, damped), zeroth + linear * first + square / 2 * second) < 1e-12


@pytest.mark.parametrize("kind", [Drawings, Edits])
def test_what_is_predicted_is_not_computed_and_changes_little(sampler: Sampler, kind: type[Task]) -> None:
    task, half = kind(sampler, 1, 1), ((0, 2),)
    plans = [
        EXACT, Schedule(2, half), Schedule(2, half, rarer=(2, 2)), Schedule(2, half, ends=0.7),
        Schedule(2, half, stops=1e9),
    ]  # fmt: skip
    exact, line, rarer, ended, stopped = draw(task, plans, timesteps=9)
    (alone,) = draw(task, plans[1:2], timesteps=9)
    assert relative_l2(alone.latents, line.latents) < 1e-4, "schedules that are drawn together do not change each other"
    assert line.evaluations == line.whole < 0.7 * exact.evaluations
    assert max(rarer.evaluations, ended.evaluations) < line.evaluations
    assert stopped.evaluations < line.evaluations, "of the text's branch, one evaluation"
    for one in (line, rarer):
        assert 0 < relative_l2(one.latents, exact.latents) < 0.6


def test_guidance_by_an_images_difference_is_computed_more_rarely(sampler: Sampler) -> None:
    task, half = Edits(sampler, 1, 1), ((0, 2),)
    plans = [Schedule(1, half), Schedule(1, half, rarer=(1, 2)), Schedule(1, half, rarer=(2, 1))]
    line, image, text = draw(task, plans, timesteps=6)
    assert (line.evaluations, image.evaluations, text.evaluations) == (9, 8, 8)
    assert relative_l2(image.latents, text.latents) > 1e-4


def test_scenes_end_their_guidance_one_by_one(sampler: Sampler) -> None:
    task = Drawings(sampler, 3, 1)
    differences = [_difference(task, scene) for scene in range(3)]
    limits = [difference * 1.001 for difference in differences]
    plans = [EXACT, *(Schedule(1, ((0, 1),), stops=stops) for stops in (1e-9, 1e9, *limits))]
    exact, never, at_once, *found = draw(task, plans, timesteps=6)
    assert never.latents.equal(exact.latents)
    assert at_once.evaluations == 5 + 1
    for stops, one in zip(limits, found, strict=True):
        ended = sum(difference < stops for difference in differences)
        assert one.evaluations <= exact.evaluations - ended / 3
    assert any(one.evaluations % 1 > 0.1 for one in found), "where all end at once, as many are computed of each"


def _difference(task: Task, scene: int) -> float:
    """|c - ct| / |c| of a scene's first step."""
    at, one = torch.tensor([scene]), torch.ones(1)
    with torch.no_grad():
        c, ct = (task.sampler.velocities([task.group(n, at, task.noise[at], one)])[0][0] for n in task.names)
    return float((c - ct).norm() / c.norm())


@pytest.mark.parametrize(("kind", "evaluations"), [(Drawings, 10), (Edits, 15)])
def test_a_dual_cache_computes_what_it_must(sampler: Sampler, kind: type[Task], evaluations: int) -> None:
    """Below a threshold that nothing reaches, all is as without; above, only the front and the back are computed."""
    task = kind(sampler, 1, 1)
    (exact,) = draw(task, [EXACT], timesteps=6)
    assert exact.evaluations == evaluations
    nothing, all_but_some = draw(task, [Dual(1, 1, 0.0, 2, 2), Dual(1, 1, 1e9, 2, 2)], timesteps=6)
    assert relative_l2(nothing.latents, exact.latents) < 1e-5
    assert nothing.evaluations == nothing.whole == evaluations
    skipped = evaluations - all_but_some.whole
    assert skipped == 2 * len(task.names), "of five steps the first two and the last are computed"
    assert all_but_some.evaluations == pytest.approx(all_but_some.whole + skipped * 2 / 6)
    assert 0 < relative_l2(all_but_some.latents, exact.latents) < 0.5


class Beside:
    """A first-block cache that is told what a search's `Middle` sees, and must answer as it does."""

    def __init__(self, threshold: float, tokens: int) -> None:
        self.middle = Middle([Dual(1, 0, threshold, 1, 99)], 1, 6, 999, tokens)
        self.cache, self.tokens, self.skipped = FirstBlock(threshold), tokens, 0

    def __call__(self, layer: int, und: torch.Tensor, gen: torch.Tensor) -> None:
        before = gen[0, -self.tokens :].clone()
        self.middle(layer, und, gen)
        after = gen[0, -self.tokens :]
        if layer == 0:
            self.entering = before
        if layer == 1:
            self.answer = self.cache.after_first_layer(self.entering, before)
        if layer == 6:
            self.skipped += self.answer is not None
            if self.answer is None:
                self.cache.store(before)
            assert relative_l2(after, before if self.answer is None else self.answer) < 1e-5


def test_a_dual_cache_of_one_layer_is_the_first_block_cache(sampler: Sampler) -> None:
    task, at = Drawings(sampler, 1, 1), torch.tensor([0])
    beside = Beside(0.1, task.noise.shape[1])
    for step in range(7):
        t = 1 - 0.02 * step
        beside.middle.begin(step)
        task.sampler.velocities([task.group("full", at, task.noise * t, torch.tensor([t]))], beside)
    assert 0 < beside.skipped < 6


def test_what_is_searched_is_thousands_of_every_family() -> None:
    for editing in (False, True):
        found = families(editing)
        assert all(found.values())
        assert set(FAMILIES) - set(found) == (set() if editing else set(OF_EDITS))
        plans = [plan for plans in found.values() for plan in plans]
        assert len(plans) == len(set(plans)) > 2000
        assert len({str(plan) for plan in plans}) == len(plans)


def test_any_beginning_of_the_search_has_ours_and_every_family() -> None:
    plans = ordered(True, 1)
    assert sorted(map(str, plans)) == sorted(str((n, plan)) for n, all_ in families(True).items() for plan in all_)
    assert [plan for _, plan in plans[: len(OURS)]] == [Schedule(p.first, p.intervals) for p in OURS]
    assert {name for name, _ in plans[: len(OURS) + len(FAMILIES)]} == set(FAMILIES)
    assert ordered(True, 1) == plans != ordered(True, 2)

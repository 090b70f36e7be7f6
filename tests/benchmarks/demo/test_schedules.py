"""The search for schedules: what it computes, and that it draws as the pipeline does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowmem_bagel.benchmarks.demo.draw import Canvas
from lowmem_bagel.benchmarks.demo.export import load_checkpoint
from lowmem_bagel.benchmarks.demo.sampler import Sampler
from lowmem_bagel.benchmarks.demo.scenes import CANVASES
from lowmem_bagel.benchmarks.demo.schedules import (
    EXACT,
    Drawings,
    Edits,
    Schedule,
    Task,
    all_schedules,
    draw_all,
    extended,
    frontier,
)
from lowmem_bagel.benchmarks.demo.tokens import special_ids
from support.numeric import relative_l2
from tokenizers import Tokenizer

from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.sampling.step_caches.velocity import EARLY, Pattern, Velocity


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    bagel, vae, config = load_checkpoint(FOLDER, torch.device("cpu"))
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    factors = config.vae.scale_factor, config.vae.shift_factor
    return Sampler(bagel, vae, *factors, tokenizer, special_ids(tokenizer), Canvas(*CANVASES[0]))


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
    assert Schedule(2, ((0, 2),), rarer=2).rare_steps(9) == [0, 1, 5]


def test_a_polynomial_is_extended_exactly() -> None:
    def cubic(at: float) -> torch.Tensor:
        return torch.tensor([1.0, -2.0], dtype=torch.float64) * at**3 + at

    known = [(at, cubic(at)) for at in (1.0, 0.8, 0.7, 0.4)]
    assert relative_l2(extended(known, 0.1, 3), cubic(0.1)) < 1e-12
    assert extended(known, 0.1, 0).equal(known[-1][1])


@pytest.mark.parametrize("kind", [Drawings, Edits])
def test_what_is_predicted_is_not_computed_and_changes_little(sampler: Sampler, kind: type[Task]) -> None:
    task = kind(sampler, 2, 1)
    schedules = [EXACT, Schedule(2, ((0, 2),)), Schedule(2, ((0, 2),), rarer=2), Schedule(2, ((0, 2),), ends=0.7)]
    latents, evaluations = draw_all(task, schedules, timesteps=12)
    alone, _ = draw_all(task, [schedules[1]], timesteps=12)
    assert relative_l2(alone[0], latents[1]) < 1e-5, "schedules that are drawn together do not change each other"
    assert evaluations[1] < 0.7 * evaluations[0]
    assert max(evaluations[2:]) < evaluations[1]
    assert 0 < relative_l2(latents[1], latents[0]) < 0.6
    assert 0 < relative_l2(latents[2], latents[0]) < 0.6


def test_the_frontier_has_what_nothing_beats() -> None:
    def row(evaluations: int, *far: float) -> dict[str, Any]:
        return {"evaluations": evaluations, "chosen_on": [*far]}

    rows = [row(90, 0, 0), row(20, 3, 9), row(20, 4, 9), row(30, 3, 5), row(40, 1, 6), row(50, 2, 7)]
    assert frontier(rows) == [rows[1], rows[3], rows[4], rows[0]]


def test_what_is_searched_is_thousands() -> None:
    for editing in (False, True):
        found = list(all_schedules(editing))
        assert len(found) == len(set(found)) > 2000

"""Promises of memory, with a stand-in for torch's limit; and that loading and closing make and end them."""

from __future__ import annotations

import gc
import random
import threading
from pathlib import Path

import pytest
import torch

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import CheckpointError
from lowmem_bagel.hardware.profile import CONTEXT_BYTES
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.runtime import loaded, loader
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.runtime.memory_promise import MemoryPromises, Promise
from lowmem_bagel.settings import LoadOptions

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
GB = 1_000_000_000
TOTAL = 24 * GB


class Allocator:
    """torch's limits, by card."""

    def __init__(self) -> None:
        self.limits: dict[torch.device, float] = {}
        self.promises = MemoryPromises(self._limit, lambda device: TOTAL)

    def _limit(self, fraction: float, device: torch.device) -> None:
        self.limits[device] = fraction

    def limit(self, device: torch.device = FIRST) -> int:
        """Bytes that torch and the process's context may take together; the card's memory where there is no limit."""
        fraction = self.limits.get(device, 1.0)
        return TOTAL if fraction == 1 else round(fraction * TOTAL) + CONTEXT_BYTES


@pytest.fixture
def card() -> Allocator:
    return Allocator()


def test_without_a_promise_torchs_limit_is_left_alone(card: Allocator) -> None:
    card.promises.end(card.promises.begin(FIRST, None))
    assert card.limits == {}


def test_a_promise_is_held_to_until_it_ends(card: Allocator) -> None:
    promise = card.promises.begin(FIRST, 8 * GB)
    assert card.limit() == 8 * GB
    assert card.limit(SECOND) == TOTAL
    card.promises.end(promise)
    assert card.limit() == TOTAL


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_two_on_one_card_have_the_sum_and_either_may_end_first(card: Allocator, first_ends_first: bool) -> None:
    small, large = card.promises.begin(FIRST, 6 * GB), card.promises.begin(FIRST, 9 * GB)
    assert card.limit() == 15 * GB, "the context is the process's, and so counts once"
    ending, left = (small, large) if first_ends_first else (large, small)
    card.promises.end(ending)
    assert card.limit() == left.max_vram
    card.promises.end(ending)
    assert card.limit() == left.max_vram, "closed twice"
    card.promises.end(left)
    assert card.limit() == TOTAL


def test_there_is_no_limit_while_one_promises_nothing(card: Allocator) -> None:
    promised, free = card.promises.begin(FIRST, 8 * GB), card.promises.begin(FIRST, None)
    assert card.limit() == TOTAL
    card.promises.end(free)
    assert card.limit() == 8 * GB
    card.promises.end(promised)


def test_cards_are_apart(card: Allocator) -> None:
    promises = [card.promises.begin(FIRST, 8 * GB), card.promises.begin(SECOND, 5 * GB)]
    assert (card.limit(FIRST), card.limit(SECOND)) == (8 * GB, 5 * GB)
    card.promises.end(promises[0])
    assert (card.limit(FIRST), card.limit(SECOND)) == (TOTAL, 5 * GB)


@pytest.mark.parametrize(("promised", "fraction"), [(100 * GB, 1.0), (CONTEXT_BYTES // 2, 0.0)])
def test_the_share_stays_between_none_and_all(card: Allocator, promised: int, fraction: float) -> None:
    promise = card.promises.begin(FIRST, promised)
    assert card.limits == {FIRST: fraction}
    card.promises.end(promise)
    assert card.limits == {FIRST: 1.0}


def test_a_pipeline_that_is_dropped_unclosed_promises_nothing_any_more(card: Allocator) -> None:
    dropped = card.promises.begin(FIRST, 8 * GB)
    del dropped
    gc.collect()
    promise = card.promises.begin(FIRST, 5 * GB)
    assert card.limit() == 5 * GB
    card.promises.end(promise)


def test_a_processor_has_no_limit(card: Allocator) -> None:
    card.promises.end(card.promises.begin(torch.device("cpu"), 8 * GB))
    assert card.limits == {}


def test_threads_leave_the_limit_of_those_that_are_left(card: Allocator) -> None:
    stays = card.promises.begin(FIRST, 3 * GB)

    def come_and_go(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(200):
            promise = card.promises.begin(FIRST, chance.choice((None, GB, 2 * GB)))
            assert card.limit() >= 3 * GB
            card.promises.end(promise)

    threads = [threading.Thread(target=come_and_go, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert card.limit() == stays.max_vram


class Watched(MemoryPromises):
    """Those of pipelines on a processor."""

    def __init__(self) -> None:
        super().__init__(lambda fraction, device: None, lambda device: TOTAL)
        self.begun: list[int | None] = []

    def begin(self, device: torch.device, max_vram: int | None) -> Promise:
        self.begun.append(max_vram)
        return super().begin(device, max_vram)

    def held(self) -> list[int | None]:
        return [promise.max_vram for promise in self._held]


def test_loading_begins_a_promise_and_closing_ends_it(
    reference_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promises = Watched()
    for module in (loader, loaded):
        monkeypatch.setattr(module, "PROMISES", promises)
    pipe = BagelPipeline.from_pretrained(reference_checkpoint, device="cpu", max_vram="3GB", tasks=("ask",))
    assert promises.held() == [3 * GB]
    pipe.close()
    assert promises.held() == []


@pytest.mark.parametrize("step", ["stored_linears", "select_backend", "UnitBuffers"])
def test_a_load_that_fails_ends_its_promise(
    step: str, reference_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> object:
        raise CheckpointError("injected")

    promises = Watched()
    for module in (loader, loaded):
        monkeypatch.setattr(module, "PROMISES", promises)
    monkeypatch.setattr(loader, step, fail)
    folder = ModelFolder.open(reference_checkpoint)
    plan = plan_for(folder, LoadOptions(device="cpu", max_vram="3GB"))
    with pytest.raises(CheckpointError) as kept:  # whose traceback keeps all that the load had made
        load_model(folder, plan)
    assert promises.begun == [3 * GB]
    assert promises.held() == []
    assert kept.value.args == ("injected",)

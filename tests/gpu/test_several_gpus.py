"""Several cards share a model: the bits of one card that takes the branches in turn, in every format, either way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cards import ARITHMETIC, STREAMED, UNITS, every_format
from support.devices import REQUESTS, SMALL, same

from lowmem_bagel import BagelPipeline, Result
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import Cancelled
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.planner.plan import Residency
from lowmem_bagel.runtime import elsewhere
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.sampling.evaluating import Evaluator
from lowmem_bagel.sampling.step_caches.registry import step_caches
from lowmem_bagel.settings import LoadOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

LEFT = 192 << 20
"""Bytes that cuBLAS may keep on a card for as long as the process lives: its workspaces, 32 MiB a stream and more."""
HELD = {"resident": Residency(), "streamed": STREAMED}
ROUTES = {"straight": "", "through the host": "peer", "through memory that is not locked": "peer,pinning"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = {torch.cuda.get_device_name(index) for index in range(min(3, torch.cuda.device_count()))}
    if len(names) > 1:
        pytest.skip(f"cards of several kinds may round differently: {', '.join(sorted(names))}")
    return every_format(tmp_path_factory.mktemp("variants"))


def loaded(folder: Path, format: str, cards: int, residency: Residency) -> BagelPipeline:
    """On so many cards, all of which hold what they hold in the same way, branch by branch."""
    opened = ModelFolder.open(folder)
    several = {"devices": ",".join(map(str, range(cards))), "divide": "guidance"} if cards > 1 else {"device": "cuda:0"}
    tasks = ("edit", "generate", "ask")
    plan = plan_for(opened, LoadOptions(dtype=ARITHMETIC[format], tasks=tasks, **several))
    assert len(plan.others) == cards - 1, plan.reasons
    others = tuple(replace(other, residency=replace(residency, staged=())) for other in plan.others)
    changed = replace(plan, guidance_batch=False, residency=residency, others=others)
    return BagelPipeline(load_model(opened, changed))


@pytest.fixture(scope="module", params=ARITHMETIC)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=HELD)
def held(request: pytest.FixtureRequest) -> Residency:
    return HELD[request.param]


@pytest.fixture(scope="module")
def wanted(format: str, held: Residency, folders: dict[str, Path]) -> dict[str, Result]:
    """Held in the same way: a text is decoded by other kernels where weights are streamed."""
    pipe = loaded(folders[format], format, 1, held)
    found = {name: request(pipe) for name, request in REQUESTS.items()}
    pipe.close()
    return found


@pytest.mark.parametrize("route", ROUTES)
def test_two_cards(
    folders: dict[str, Path], format: str, held: Residency, wanted: dict[str, Result], route: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if ROUTES[route]:
        monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", ROUTES[route])
    pipe = loaded(folders[format], format, 2, held)
    there = pipe.model.on_card(1)
    assert str(there.bagel.device) == "cuda:1" and len(there.residency.streamed) == len(held.streamed)
    assert ("switched off" in there.plan.reasons["exchange"]) == bool(ROUTES[route])
    for _ in range(2):
        for name, request in REQUESTS.items():
            assert same(request(pipe), wanted[name]), name
    pipe.close()


def test_a_thread_a_card(folders: dict[str, Path], format: str, held: Residency, wanted: dict[str, Result]) -> None:
    pipe = loaded(folders[format], format, 2, held)
    there = pipe.model.on_card(1)
    there.plan = replace(there.plan, launcher="thread")
    for name, request in REQUESTS.items():
        assert same(request(pipe), wanted[name]), name
    pipe.close()


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three CUDA GPUs")
def test_three_cards(folders: dict[str, Path], format: str, held: Residency, wanted: dict[str, Result]) -> None:
    pipe = loaded(folders[format], format, 3, held)
    assert pipe.model.plan.branches == {"text": 1, "image": 2}
    for name, request in REQUESTS.items():
        assert same(request(pipe), wanted[name]), name
    pipe.close()


def divided(folder: Path, format: str, cards: int, streamed: bool) -> BagelPipeline:
    """Layers on so many cards."""
    opened = ModelFolder.open(folder)
    several = {"devices": ",".join(map(str, range(cards))), "divide": "layers"}
    plan = plan_for(opened, LoadOptions(dtype=ARITHMETIC[format], **several))
    each = []
    for own in (plan, *plan.others):
        units = tuple(unit for unit in UNITS if unit[0] in range(*own.layers))
        each.append(
            replace(own, guidance_batch=False, residency=Residency(units, 3, "pinned") if streamed else Residency())
        )
    return BagelPipeline(load_model(opened, replace(each[0], others=tuple(each[1:]))))


@pytest.fixture(scope="module")
def wanted_drawn(format: str, folders: dict[str, Path]) -> dict[str, Result]:
    """Where no text is generated: layers that are divided decode it without a graph, by other kernels."""
    pipe = loaded(folders[format], format, 1, Residency())
    found = {name: REQUESTS[name](pipe) for name in ("generate", "edit", "several pictures")}
    pipe.close()
    return found


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_layers_on_two_cards(
    folders: dict[str, Path], format: str, wanted_drawn: dict[str, Result], route: str, streamed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if ROUTES[route]:
        monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", ROUTES[route])
    pipe = divided(folders[format], format, 2, streamed)
    assert str(pipe.model.on_card(1).bagel.device) == "cuda:1"
    for name, wanted in wanted_drawn.items():
        assert same(REQUESTS[name](pipe), wanted), name
    answer = REQUESTS["answer"](pipe).token_ids
    assert len(answer) > 1 and REQUESTS["answer"](pipe).token_ids == answer
    pipe.close()
    assert torch.cuda.memory_allocated(1) < LEFT


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three CUDA GPUs")
def test_layers_on_three_cards(folders: dict[str, Path], format: str, wanted_drawn: dict[str, Result]) -> None:
    pipe = divided(folders[format], format, 3, streamed=False)
    for name, wanted in wanted_drawn.items():
        assert same(REQUESTS[name](pipe), wanted), name
    pipe.close()


@pytest.fixture
def pair(folders: dict[str, Path]) -> Iterator[BagelPipeline]:
    pipe = loaded(folders["source"], "source", 2, Residency())
    yield pipe
    pipe.close()


@pytest.mark.parametrize("name", step_caches())
def test_step_caches(folders: dict[str, Path], pair: BagelPipeline, name: str) -> None:
    alone = loaded(folders["source"], "source", 1, Residency())
    settings = {**SMALL, "num_timesteps": 14, "step_cache": name}
    assert same(pair.generate("a red circle", **settings), alone.generate("a red circle", **settings))
    alone.close()


def test_it_does_not_matter_which_card_is_current(pair: BagelPipeline) -> None:
    found = []
    for current in range(2):
        with torch.cuda.device(current):
            found.append(REQUESTS["edit"](pair))
            assert torch.cuda.current_device() == current
    assert same(*found)


def test_a_stream_of_the_callers_own(pair: BagelPipeline) -> None:
    wanted = REQUESTS["edit"](pair)
    with torch.cuda.stream(torch.cuda.Stream(0)):
        assert same(REQUESTS["edit"](pair), wanted)


def test_a_callback_stops_it(pair: BagelPipeline) -> None:
    wanted = REQUESTS["generate"](pair)
    with pytest.raises(Cancelled):
        pair.generate("a red circle", callback=lambda step: step.index < 2, **SMALL)
    assert same(REQUESTS["generate"](pair), wanted)


def test_memory_that_runs_out_on_the_second_card(pair: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, there = REQUESTS["edit"](pair), pair.model.on_card(1)
    assert there.plan.launcher == "request"
    failures = [torch.OutOfMemoryError("CUDA out of memory. Tried")]

    def made(*given: Any, **named: Any) -> Evaluator:
        if failures:
            raise failures.pop()
        return Evaluator(*given, **named)

    monkeypatch.setattr(elsewhere, "Evaluator", made)
    with pytest.warns(UserWarning, match="the memory of cuda:1 ran out"):
        assert same(REQUESTS["edit"](pair), wanted)
    assert there.residency.streamed == UNITS and not pair.model.residency.streamed
    assert there.plan.launcher == "thread"


def test_closing_gives_back_the_memory_of_both(folders: dict[str, Path]) -> None:
    pipe = loaded(folders["source"], "source", 2, Residency())
    REQUESTS["edit"](pipe)
    for card in range(2):
        torch.cuda.synchronize(card)
    pipe.close()
    assert [torch.cuda.memory_allocated(card) for card in range(2)] == pytest.approx([0, 0], abs=LEFT)

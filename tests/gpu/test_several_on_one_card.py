"""Stand-ins for several cards on one: branches of guidance that both evaluate, to the bit, whoever launches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cards import ARITHMETIC, STREAMED, every_format
from support.devices import REQUESTS, same

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.planner.estimate import on_devices, plan_inputs
from lowmem_bagel.planner.plan import Launcher, Residency
from lowmem_bagel.planner.several import make_plans
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.settings import LoadOptions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CARD = "cuda:0"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return every_format(tmp_path_factory.mktemp("variants"))


def loaded(folder: Path, format: str, others: int, residency: Residency, launcher: Launcher) -> BagelPipeline:
    opened = ModelFolder.open(folder)
    options = LoadOptions(device=CARD, dtype=ARITHMETIC[format], tasks=("edit", "generate"), divide="guidance")
    inputs = plan_inputs(opened, options)
    plan = make_plans(on_devices(inputs, [CARD] * (1 + others), [inputs.profile] * (1 + others)))
    one, *_ = plan.others or (None,)
    assert one is None or one.launcher == "request"
    # One card each, though the planner may see no gain in the last one with a model so small.
    beside = () if one is None else (replace(one, residency=residency, launcher=launcher),) * others
    branches = {"text": 1, "image": others} if others else {}
    return BagelPipeline(load_model(opened, replace(plan, guidance_batch=False, branches=branches, others=beside)))


@pytest.fixture(scope="module", params=ARITHMETIC)
def alone(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[tuple[str, BagelPipeline]]:
    pipe = loaded(folders[request.param], request.param, 0, Residency(), "request")
    yield request.param, pipe
    pipe.close()


@pytest.mark.parametrize("launcher", ["request", "thread"])
@pytest.mark.parametrize("held", ["resident", "streamed"])
def test_two_on_one_card(
    folders: dict[str, Path], alone: tuple[str, BagelPipeline], held: str, launcher: Launcher
) -> None:
    format, one = alone
    residency = Residency() if held == "resident" else replace(STREAMED, staged=())
    two = loaded(folders[format], format, 1, residency, launcher)
    for name in ("generate", "edit", "several pictures"):
        for _ in range(2):
            assert same(REQUESTS[name](two), REQUESTS[name](one)), name
    two.close()


def test_three_on_one_card(folders: dict[str, Path], alone: tuple[str, BagelPipeline]) -> None:
    format, one = alone
    three = loaded(folders[format], format, 2, Residency(), "request")
    assert same(REQUESTS["edit"](three), REQUESTS["edit"](one))
    three.close()

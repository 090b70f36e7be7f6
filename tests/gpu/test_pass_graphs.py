"""Passes of a picture replayed by CUDA graphs: the bits of launched ones, in every format, with what caches keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cards import ARITHMETIC, every_format
from support.devices import REQUESTS, SMALL, same

from lowmem_bagel import BagelPipeline, Result
from lowmem_bagel.sampling import pass_graphs
from lowmem_bagel.sampling.step_caches.registry import step_caches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return every_format(tmp_path_factory.mktemp("variants"))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    made: list[torch.cuda.CUDAGraph] = []
    capture = pass_graphs.captured

    def counted(*given: Any) -> torch.cuda.CUDAGraph:
        made.append(capture(*given))
        return made[-1]

    monkeypatch.setattr(pass_graphs, "captured", counted)
    return made


def drawn_both_ways(pipe: BagelPipeline, name: str, **settings: Any) -> tuple[Result, Result]:
    """By graphs, and launched."""
    plan, found = pipe.model.plan, []
    assert plan.graph_tokens > 16, plan.reasons
    for tokens in (plan.graph_tokens, 0):
        pipe.model.plan = replace(plan, graph_tokens=tokens)
        found.append(REQUESTS[name](pipe) if not settings else pipe.generate("a red circle", **SMALL | settings))
        if tokens:
            assert pipe.model.plan.graph_tokens == tokens, pipe.model.plan.reasons["pictures by graph"]
    pipe.model.plan = plan
    by_graphs, launched = found
    return by_graphs, launched


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "one by one"])
@pytest.mark.parametrize("format", ARITHMETIC)
def test_the_same_bits(
    folders: dict[str, Path], format: str, batch: bool, captures: list[torch.cuda.CUDAGraph]
) -> None:
    pipe = BagelPipeline.from_pretrained(folders[format], device="cuda:0", dtype=ARITHMETIC[format])
    pipe.model.plan = replace(pipe.model.plan, guidance_batch=batch)
    for name in ("generate", "edit", "several pictures", "frames in turn"):
        before = len(captures)
        assert same(*drawn_both_ways(pipe, name)), name
        assert len(captures) > before, name
    pipe.close()


def test_with_step_caches(folders: dict[str, Path], captures: list[torch.cuda.CUDAGraph]) -> None:
    """What they keep is not written over by the next pass."""
    pipe = BagelPipeline.from_pretrained(folders["int8"], device="cuda:0", dtype=ARITHMETIC["int8"])
    for cache in step_caches():
        if cache != "none":
            assert same(*drawn_both_ways(pipe, "generate", step_cache=cache, num_timesteps=24)), cache
    assert captures
    pipe.close()

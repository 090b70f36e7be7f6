"""Passes of a picture replayed by graphs: the same bits, one capture a pass of the same branches, and what refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from support.devices import BRIEF, REQUESTS, SMALL, same
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline, Result
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.model.decoder import ResidentLayers
from lowmem_bagel.ops.device import GraphMemory
from lowmem_bagel.ops.linear import Dense
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.sampling import pass_graphs
from lowmem_bagel.settings import LoadOptions

LARGE = 1 << 20
PARTLY_GUIDED = SMALL | {"cfg_interval": (0.7, 1.0)}
"""Three of five steps."""


class Graph:
    """In place of a CUDA graph: what was launched while it was captured is launched again, and leaves its results where
    the capture's were, over those of the time before."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self.graph, self.launch, self.replays = launch.__self__, launch, 0  # type: ignore[attr-defined]
        launch()
        for made in self.graph._made:
            made.fill_(torch.nan)  # nothing is computed while it is captured

    def replay(self) -> None:
        fixed = self.graph._made
        self.launch()
        for old, new in zip(fixed, self.graph._made, strict=True):
            old.copy_(new)
        self.graph._made = fixed
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Captures on the processor; what was captured."""
    made: list[Graph] = []

    def captured(
        device: torch.device, launch: Callable[[], None], warm_up: Callable[[], None], memory: GraphMemory
    ) -> Graph:
        assert isinstance(memory, GraphMemory)
        warm_up()
        made.append(Graph(launch))
        return made[-1]

    monkeypatch.setattr(pass_graphs, "captured", captured)
    return made


@pytest.fixture(scope="module")
def pipe(small_pictures: BagelPipeline) -> Iterator[BagelPipeline]:
    """One whose plan tests may change."""
    loaded = BagelPipeline.from_pretrained(small_pictures.model.folder.path, device="cpu", dtype="float32")
    yield loaded
    loaded.close()


def by_graphs(pipe: BagelPipeline, tokens: int = LARGE) -> None:
    pipe.model.plan = replace(pipe.model.plan, graph_tokens=tokens)


@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "batch"])
@pytest.mark.parametrize("name", ["generate", "edit", "several pictures", "frames", "frames in turn"])
def test_the_same_picture(pipe: BagelPipeline, graphs: list[Graph], name: str, batch: bool) -> None:
    pipe.model.plan = replace(pipe.model.plan, guidance_batch=batch, graph_tokens=0)
    wanted = BRIEF[name](pipe)
    assert not graphs
    by_graphs(pipe)
    assert same(BRIEF[name](pipe), wanted)
    assert graphs and all(graph.replays for graph in graphs)


@pytest.mark.parametrize("cache", ["taylorseer", "first-block", "velocity-3"])
def test_with_a_step_cache(pipe: BagelPipeline, graphs: list[Graph], cache: str) -> None:
    """What a cache stores stays as it was when the next pass goes."""

    def drawn() -> Result:
        return pipe.generate("a red circle", **(SMALL | {"num_timesteps": 16}), step_cache=cache)

    by_graphs(pipe, 0)
    wanted = drawn()
    by_graphs(pipe)
    assert same(drawn(), wanted)
    assert sum(graph.replays for graph in graphs) >= 4


def test_a_graph_for_each_pass_of_the_same_branches(pipe: BagelPipeline, graphs: list[Graph]) -> None:
    """Guided steps in one batch and then those of the full context alone; two drawings share none."""
    pipe.model.plan = replace(pipe.model.plan, guidance_batch=True, graph_tokens=LARGE)
    pipe.generate("a red circle", **PARTLY_GUIDED)
    assert [graph.replays for graph in graphs] == [2, 1]  # each first one is not
    pipe.generate("a red circle", frames=2, frame_mode="turn", **PARTLY_GUIDED)
    assert [graph.replays for graph in graphs] == [2, 1] * 3


def test_greater_passes_are_launched(pipe: BagelPipeline, graphs: list[Graph]) -> None:
    """32x48 pixels are 6 latent tokens and 2 markers."""
    pipe.model.plan = replace(pipe.model.plan, guidance_batch=True, graph_tokens=8)
    pipe.generate("a red circle", **PARTLY_GUIDED)
    assert [graph.replays for graph in graphs] == [1]
    by_graphs(pipe, 7)
    pipe.generate("a red circle", **PARTLY_GUIDED)
    assert len(graphs) == 1


def test_what_cannot_be_captured_is_launched(pipe: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    by_graphs(pipe, 0)
    wanted = REQUESTS["edit"](pipe)
    monkeypatch.setattr(pass_graphs, "captured", refuse)
    by_graphs(pipe)
    assert same(REQUESTS["edit"](pipe), wanted)
    assert pipe.model.plan.graph_tokens == 0
    why = "cannot be captured: operation not permitted when stream is capturing"
    assert pipe.model.plan.reasons["pictures by graph"] == why


def test_weights_that_stream_are_launched(pipe: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    by_graphs(pipe)
    assert pipe.model.pass_graphs() is not None
    monkeypatch.setattr(pipe.model.bagel.decoder, "source", object())
    assert not isinstance(pipe.model.bagel.decoder.source, ResidentLayers) and pipe.model.pass_graphs() is None


def test_linears_say_that_no_graph_can_capture_them(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ModelFolder.open(CHECKPOINT)
    plan = replace(plan_for(folder, LoadOptions(device="cpu", tasks=("generate",))), graph_tokens=LARGE)
    monkeypatch.setattr(Dense, "graph_blocker", "it asks the host")
    model = load_model(folder, plan)
    assert model.plan.graph_tokens == 0 and model.plan.reasons["pictures by graph"] == "no: it asks the host"
    model.close()

"""Two cards: every format gives on the second what it gives on the first, to the bit, whichever is current."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.cards import ARITHMETIC, RESIDENT, STREAMED, Told, every_format, pipeline_on, told
from support.threads import at_once

from lowmem_bagel import BagelPipeline
from lowmem_bagel.runtime.streaming.layers import MixedSource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

HELD = {"resident": RESIDENT, "streamed": STREAMED}
FIRST, SECOND = "cuda:0", "cuda:1"
ROUNDS = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = [torch.cuda.get_device_name(index) for index in range(2)]
    if len(set(names)) > 1:
        pytest.skip(f"cards of two kinds may round differently: {', '.join(names)}")
    return every_format(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module", params=ARITHMETIC)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=HELD)
def pair(request: pytest.FixtureRequest, format: str, folders: dict[str, Path]) -> Iterator[list[BagelPipeline]]:
    """The same on both cards; each was loaded while the other card was the current one."""
    loaded = []
    for current, device in ((1, FIRST), (0, SECOND)):
        with torch.cuda.device(current):
            loaded.append(pipeline_on(device, folders[format], ARITHMETIC[format], HELD[request.param]))
            assert torch.cuda.current_device() == current
    for pipe, device in zip(loaded, (FIRST, SECOND), strict=True):
        assert str(pipe.model.bagel.device) == device
        if request.param == "streamed":
            assert isinstance(pipe.model.bagel.decoder.source.source, MixedSource)
        else:
            assert pipe.model.step_kernels is not None, pipe.model.plan.reasons
    yield loaded
    for pipe in loaded:
        pipe.close()


@pytest.fixture(scope="module")
def wanted(pair: list[BagelPipeline]) -> Told:
    """What the first card gives while it is the current one."""
    with torch.cuda.device(0):
        return told(pair[0])


def assert_captured(pipe: BagelPipeline) -> None:
    """No capture has failed, after which text would be decoded another way."""
    assert "cannot be captured" not in pipe.model.plan.reasons.get("text decoding by graph", "")


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("index", [0, 1])
def test_a_card_gives_the_same_whichever_is_current(
    pair: list[BagelPipeline], wanted: Told, index: int, current: int
) -> None:
    with torch.cuda.device(current):
        assert told(pair[index]) == wanted
        assert torch.cuda.current_device() == current
    assert_captured(pair[index])


def test_two_threads_on_two_cards_at_once(pair: list[BagelPipeline], wanted: Told) -> None:
    def rounds(pipe: BagelPipeline) -> Callable[[], list[Told]]:
        return lambda: [told(pipe) for _ in range(ROUNDS)]

    assert at_once([rounds(pipe) for pipe in pair]) == [[wanted] * ROUNDS] * 2
    for pipe in pair:
        assert_captured(pipe)


@pytest.mark.parametrize("name", ["source", "dfloat11"])
def test_loading_on_two_cards_at_once(folders: dict[str, Path], name: str) -> None:
    def loaded(device: str) -> Callable[[], Told]:
        return lambda: told(pipeline_on(device, folders[name], ARITHMETIC[name], RESIDENT))

    first, second = at_once([loaded(FIRST), loaded(SECOND)])
    assert isinstance(first, Told), first
    assert second == first


@pytest.mark.parametrize("name", ["source", "int8"])
def test_the_kernels_that_need_no_triton(folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", "triton")
    pair = [pipeline_on(device, folders[name], "bfloat16", RESIDENT) for device in (FIRST, SECOND)]
    assert all("elementwise kernels" not in pipe.model.plan.reasons for pipe in pair)
    assert told(pair[1]) == told(pair[0])


def test_a_card_without_a_number_is_the_first_one(folders: dict[str, Path]) -> None:
    with torch.cuda.device(1):
        pipe = BagelPipeline.from_pretrained(folders["source"], device="cuda")
        assert str(pipe.model.bagel.device) == FIRST
        assert told(pipe).answer

"""A trial that passed is not repeated on the same machine, and is on any other; failures are not kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowmem_bagel.kernels import remembered, trials, triton_language
from lowmem_bagel.kernels.remembered import Passed, name_of, passed_on
from lowmem_bagel.kernels.trial_inputs import SMALL, Pair, Sizes

CARD = torch.device("cuda", 0)
SIZES = Sizes(SMALL, torch.bfloat16)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A card that is made up, and a cache of its own."""
    properties = SimpleNamespace(name="Card", major=8, minor=0, multi_processor_count=3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(triton_language, "MISSING", None)
    monkeypatch.setattr(triton_language, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(trials, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(remembered, "driver_version", lambda: "580.1")
    return properties


class Tried:
    """Counts how often it is tried."""

    def __init__(self, right: bool = True) -> None:
        self.times, self.right = 0, right
        self.kernel = trials.Kernel((8, 0), partial(_trial, self))

    def __repr__(self) -> str:
        return "Tried"


def _trial(tried: Tried, device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    tried.times += 1
    one = torch.ones(10)
    yield one, one if tried.right else one * 2


def test_what_passed_is_not_tried_again(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Tried()
    for _ in range(3):
        assert trials.why_not(tried.kernel, CARD, SIZES) is None
    assert tried.times == 1
    trials.why_not(tried.kernel, CARD, SIZES, again=True)
    trials.why_not(tried.kernel, CARD, Sizes(SMALL, torch.float32))
    assert tried.times == 3, "asked for, and of another dtype"
    for what, value in (("driver_version", lambda: "581.0"), ("VERSION", "other"), ("sources_hash", lambda: "other")):
        with monkeypatch.context() as patched:
            patched.setattr(remembered, what, value)
            before = tried.times
            trials.why_not(tried.kernel, CARD, SIZES)
            assert tried.times == before + 1, what
    card.name = "Another"
    before = tried.times
    trials.why_not(tried.kernel, CARD, SIZES)
    assert tried.times == before + 1


def test_a_failure_is_tried_every_time(card: SimpleNamespace) -> None:
    tried = Tried(right=False)
    assert "wrong by" in (trials.why_not(tried.kernel, CARD, SIZES) or "")
    assert "wrong by" in (trials.why_not(tried.kernel, CARD, SIZES) or "")
    assert tried.times == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"passed": ["x"]}', '{"for": {"a": "b"}, "passed": 3}'])
def test_a_damaged_or_foreign_file_remembers_nothing(tmp_path: Path, content: str) -> None:
    passed = Passed(tmp_path / "trials.json", {"a": "b"})
    passed.path.write_text(content)
    assert not passed.has("x")
    passed.add("x")
    assert passed.has("x") and not Passed(passed.path, {"a": "c"}).has("x")


def test_a_driver_that_is_not_known_is_not_relied_on(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "driver_version", lambda: "unknown")
    assert passed_on(CARD) is None


def test_names_tell_trials_and_sizes_apart() -> None:
    kernels = trials.KERNELS.values()
    assert len({name_of(kernel.trial, SIZES) for kernel in kernels}) == len(kernels)
    assert " at 0x" not in name_of(trials.KERNELS["gemv"].trial, SIZES)
    assert name_of(partial(_trial, 1), SIZES) != name_of(partial(_trial, 2), SIZES)  # type: ignore[arg-type]

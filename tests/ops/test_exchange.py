"""Tensors on their way between devices: whole, in order, and by the way that the devices have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_bagel.ops import exchange
from lowmem_bagel.ops.exchange import Bridge, Mark, OutOfMemoryOn, Route, memory_of, route_between

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def bridge(route: Route) -> Bridge:
    return Bridge(CPU, CPU, route, pytest.fail)


@pytest.mark.parametrize("route", ["peer", "host"])
@pytest.mark.parametrize("count", [1, 24, 25, 1000])
def test_a_tensor_arrives(monkeypatch: pytest.MonkeyPatch, route: Route, count: int) -> None:
    """Also in several pieces of which the last is short, and after a smaller one."""
    monkeypatch.setattr(exchange, "PIECE_BYTES", 100)
    there = bridge(route)
    for values in (torch.randn(3), torch.randn(count), torch.randn(count).bfloat16()):
        found = there.carry(values)
        assert torch.equal(found, values) and found.data_ptr() != values.data_ptr()


def test_it_arrives_where_it_is_wanted() -> None:
    wanted, into = torch.randn(4, 6)[:, ::2], torch.zeros(2, 4, 3)
    assert bridge("host").carry(wanted, into[1]).data_ptr() == into[1].data_ptr()
    assert torch.equal(into, torch.stack((torch.zeros(4, 3), wanted)))


class Card:
    """Two cards' streams, and what is queued on them in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued: list[str] = []
        self.current = FIRST
        monkeypatch.setattr(exchange, "on", self.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, device))
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch, "empty", self.empty)
        copy = Tensor.copy_

        def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            assert non_blocking
            self.queued.append(f"{self.current}: copy")
            return copy(target, source)

        monkeypatch.setattr(Tensor, "copy_", copied)
        self.locked: list[int] = []
        self.refused = False
        self._empty = torch.zeros

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def empty(self, size: Any, dtype: torch.dtype, device: Any = None, pin_memory: bool = False) -> Tensor:
        if pin_memory and self.refused:
            raise RuntimeError("CUDA error: out of memory\nmore")
        self.locked += [size] if pin_memory else []
        return self._empty(size, dtype=dtype)


class Stream:
    def __init__(self, card: Card, device: torch.device) -> None:
        self.card, self.device = card, device

    def wait_event(self, event: Event) -> None:
        self.card.queued.append(f"{self.device}: wait for {event.at}")


class Event:
    def __init__(self, card: Card) -> None:
        self.card, self.at = card, ""

    def record(self, stream: Stream) -> None:
        self.at = f"{stream.device} {len(self.card.queued)}"


def test_neither_card_goes_ahead_of_the_other_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pieces in two buffers: the third waits until the first was read; the host waits for nothing."""
    monkeypatch.setattr(exchange, "PIECE_BYTES", 4)
    card = Card(monkeypatch)
    wanted = torch.arange(12).byte()
    assert torch.equal(Bridge(FIRST, SECOND, "host", pytest.fail).carry(wanted, torch.zeros(12).byte()), wanted)
    assert card.locked == [4, 4]
    assert card.queued == [
        "cuda:0: copy", "cuda:1: wait for cuda:0 1", "cuda:1: copy",
        "cuda:0: copy", "cuda:1: wait for cuda:0 4", "cuda:1: copy",
        "cuda:0: wait for cuda:1 3", "cuda:0: copy", "cuda:1: wait for cuda:0 8", "cuda:1: copy",
    ]  # fmt: skip


def test_straight_from_card_to_card_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    Bridge(FIRST, SECOND, "peer", pytest.fail).carry(torch.ones(12), torch.zeros(12))
    assert card.queued == ["cuda:0: copy"] and not card.locked


@pytest.mark.parametrize("off", [True, False])
def test_memory_that_cannot_be_locked_is_said(monkeypatch: pytest.MonkeyPatch, off: bool) -> None:
    card, notes = Card(monkeypatch), list[str]()
    card.refused = True
    if off:
        monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", "pinning")
    found = Bridge(FIRST, SECOND, "host", notes.append).carry(torch.ones(12), torch.zeros(12))
    assert found.tolist() == [1.0] * 12
    why = "switched off by LOWMEM_BAGEL_DISABLE" if off else "CUDA error: out of memory"
    assert set(notes) == {f"not page-locked ({why}); copies wait on the host"}


def test_the_way_is_what_both_cards_can(monkeypatch: pytest.MonkeyPatch) -> None:
    able: set[tuple[torch.device, torch.device]] = set()
    arrives = [False, True]
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *pair: pair in able)
    monkeypatch.setattr(exchange, "_arrives", lambda *pair: arrives.pop(0))
    assert route_between(FIRST, SECOND)[0] == "host"
    able.add((FIRST, SECOND))
    assert route_between(FIRST, SECOND)[0] == "host", "velocities could not come back"
    able.add((SECOND, FIRST))
    route, why = route_between(FIRST, SECOND)
    assert route == "host" and "came out wrong" in why
    assert route_between(FIRST, SECOND) == ("peer", "straight from card to card")
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", "peer")
    route, why = route_between(FIRST, SECOND)
    assert route == "host" and "switched off by LOWMEM_BAGEL_DISABLE" in why


def test_the_trial_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exchange._arrives(CPU, CPU)
    copy = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda target, source: copy(target, source + (target.storage_offset() == 0)))
    assert not exchange._arrives(CPU, CPU)


def test_whose_memory_ran_out() -> None:
    with pytest.raises(OutOfMemoryOn, match="Tried") as found, memory_of(2):
        raise torch.OutOfMemoryError("Tried to allocate")
    assert found.value.card == 2
    with pytest.raises(ValueError, match="other"), memory_of(2):
        raise ValueError("other")


def test_a_mark_of_a_processor_holds_nobody_up() -> None:
    Mark(CPU).wait(CPU)

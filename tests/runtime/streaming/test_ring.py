"""The order of streaming: every unit is there when it is needed, and no slot is overwritten while it is used."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowmem_bagel.checkpoint.tensors import EXPERTS
from lowmem_bagel.planner.plan import Unit
from lowmem_bagel.runtime.streaming.ring import SlotRing


class Device:
    """What slots hold, and the copies made so far."""

    def __init__(self, slots: int) -> None:
        self.held: list[Unit | None] = [None] * slots
        self.busy: set[int] = set()
        self.copies: list[Unit] = []
        self.ring = SlotRing(slots)

    def copy(self, unit: Unit, slot: int) -> None:
        assert slot not in self.busy, "copied over a slot in use"
        self.held[slot] = unit
        self.copies.append(unit)

    def run(self, passes: list[tuple[frozenset[str], int | None]], streamed: frozenset[Unit], layers: int) -> None:
        """Each pass uses some experts, and may be broken off in a layer."""
        for experts, broken_at in passes:
            sequence = [(n, e) for n in range(layers) for e in EXPERTS if e in experts and (n, e) in streamed]
            self.ring.begin(sequence)
            self.busy.clear()
            self.ring.fill(self.copy)
            for layer in range(layers):
                for expert in EXPERTS:
                    if expert in experts and (layer, expert) in streamed:
                        slot = self.ring.acquire((layer, expert))
                        assert self.held[slot] == (layer, expert)
                        self.busy.add(slot)
                if layer == broken_at:
                    break
                self.ring.release()
                self.busy.clear()
                self.ring.fill(self.copy)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, frozenset[Unit], list[tuple[frozenset[str], int | None]]]:
    layers = draw(st.integers(1, 7))
    slots = draw(st.integers(2, 6))
    units = [(layer, expert) for layer in range(layers) for expert in EXPERTS]
    streamed = draw(st.frozensets(st.sampled_from(units), min_size=1))
    experts = st.sampled_from([frozenset({"und"}), frozenset({"gen"}), frozenset(EXPERTS)])
    passes = draw(st.lists(st.tuples(experts, st.none() | st.integers(0, layers - 1)), min_size=1, max_size=8))
    return layers, slots, streamed, passes


@given(runs())
def test_every_unit_is_there_when_needed(run: tuple) -> None:
    layers, slots, streamed, passes = run
    Device(slots).run(passes, streamed, layers)


def test_equal_passes_copy_each_unit_once_a_pass_and_run_ahead_into_the_next() -> None:
    layers, passes = 5, 6
    streamed = frozenset((layer, expert) for layer in range(layers) for expert in EXPERTS)
    device = Device(3)
    device.run([(frozenset(EXPERTS), None)] * passes, streamed, layers)
    wanted = [(layer, expert) for layer in range(layers) for expert in EXPERTS] * (passes + 1)
    assert device.copies == wanted[: passes * len(streamed) + 3]


def test_a_pass_of_another_kind_keeps_what_it_can_use() -> None:
    streamed = frozenset((layer, expert) for layer in range(4) for expert in EXPERTS)
    device = Device(4)
    device.run([(frozenset({"und"}), None), (frozenset(EXPERTS), None)], streamed, 4)
    first_of_second = device.copies[4 + 4 :]
    assert first_of_second[:6] == [(0, "gen"), (1, "gen"), (2, "und"), (2, "gen"), (3, "und"), (3, "gen")]

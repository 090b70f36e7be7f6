"""All placements of a model on a machine, predicted, and the fastest that fits. Pure; no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import inf
from typing import Literal, NamedTuple

from ..checkpoint.tensors import EXPERTS, Expert
from ..hardware.profile import HardwareProfile
from ..settings import Task
from .calibration import Calibration
from .facts import ModelFacts
from .latency import SLOWER_HOST, LatencyModel, Rates, Streaming, rates
from .memory import STAGEABLE, ComputeConfig, PhaseNeed, Workload, base_bytes, part_bytes, phases, scratch_bytes
from .plan import HOST_PLACES, Place, Plan, Residency, Unit
from .workload import Limits, Request

STORED_ITEMSIZE = 2
"""Bytes of a plain weight on disk, bfloat16 or float16."""
SLOTS_OF_SINGLES = 2
"""Device slots where no layer streams both experts: one in use, one being filled."""
SLOTS_OF_PAIRS = (3, 4)
FEWEST_GRAPH_TOKENS = 256
"""Of 256x256 pixels: nobody draws smaller ones, so that below it nothing is worth replaying."""
GRAPH_COPIES = 3
"""How often a layer's activations are held where passes are replayed; see `memory.graph_bytes`."""


class Candidate(NamedTuple):
    """One combination that fits, and what it is predicted to take."""

    seconds: float
    step_bytes: int
    peak: int
    batch: bool
    residency: Residency
    graph_tokens: int = 0

    def rank(self) -> tuple[float, ...]:
        """Lower is better: speed first, then whatever asks least of the machine; of what asks the same, what serves
        other requests better."""
        return self.seconds, self.step_bytes, len(self.residency.staged), self.peak, -self.graph_tokens


@dataclass(frozen=True)
class PhaseBytes:
    """One phase under a plan: bytes on the device, and the stageable parts that are there."""

    task: Task | Literal["chat"]
    phase: str
    weights: int
    """With the CUDA context and the scratch that weights are decoded into."""
    slots: int
    arena: int
    """Of keys and values, also those kept for later. Fields are keys of `plan --json`: they keep their names."""
    activations: int
    parts: tuple[str, ...]

    @property
    def total(self) -> int:
        return self.weights + self.slots + self.arena + self.activations


class Search:
    """All placements of one model for one way of computing it.

    Args:
        workloads: other ones than the request's, where the device does only part of what it asks for.
        batches: whether guidance may run as one batch, and whether branch by branch.
        cards: among how many branches are handed out, which one thread launches for.
    """

    def __init__(
        self,
        facts: ModelFacts,
        profile: HardwareProfile,
        limits: Limits,
        request: Request,
        how: ComputeConfig,
        calibration: Calibration,
        workloads: Sequence[Workload] | None = None,
        batches: Sequence[bool] = (True, False),
        cards: int = 1,
    ) -> None:
        self.facts, self.profile, self.limits, self.request = facts, profile, limits, request
        self.how, self.calibration = how, calibration
        self.workloads = request.workloads(facts.config) if workloads is None else workloads
        self.batches, self.cards = batches, cards
        self.device_limit = self._device_limit()
        self.lowest_peak: float = inf
        self._refused = False
        """Whether memory ruled out something of the parts that wait in RAM now."""
        self._resided: dict[tuple[int, int, tuple[str, ...]], tuple[Residency, Streaming]] = {}
        self.machine: Rates = rates(profile, how, calibration)
        self.latency = LatencyModel(facts, how, self.machine, calibration)

    @property
    def on_card(self) -> bool:
        return self.how.device != "cpu"

    @cached_property
    def ram(self) -> int:
        """Bytes of RAM that weights may take, and on a CPU everything."""
        usable = int(self.profile.ram_available * self.calibration.usable_ram)
        allowed = usable if self.limits.max_ram is None else min(usable, self.limits.max_ram)
        return allowed - (self.calibration.host_bytes if self.on_card else 0)

    def _device_limit(self) -> int:
        """The promise less a reserve."""
        if not self.on_card:
            return self.ram
        promise = self.promise
        return promise - min(self.calibration.reserve_bytes, int(promise * self.calibration.reserve_share))

    @property
    def reserve(self) -> int:
        """Bytes of the card that a limit counts beside what is planned."""
        return self.calibration.reserve_bytes if self.on_card else 0

    @property
    def promise(self) -> int:
        """Bytes of the card that the process may use, its context included."""
        # A probed card's free memory is what is left beside the context that the probe itself made.
        context = 0 if self.profile.assumed else self.calibration.context_bytes
        free = min(self.profile.vram_free + context, self.profile.vram_total)
        return free if self.limits.max_vram is None else min(free, self.limits.max_vram)

    @cached_property
    def units(self) -> dict[Unit, int]:
        """Bytes of the units that the tasks need."""
        how = self.how
        needed = {unit: stored for unit, stored in self.facts.units.items() if unit[1] in self.request.experts}
        return {unit: stored.nbytes(how.itemsize, how.decoded_at_load) for unit, stored in needed.items()}

    @cached_property
    def order(self) -> tuple[Unit, ...]:
        """Units in the order in which they give way: any first few lie evenly among the layers, so that copies hide.

        gen goes first: texts and answers, which have little arithmetic to hide copies behind, need und alone.
        """
        layers = _evenly(self.facts.config.decoder.num_layers)
        return tuple(
            (layer, expert) for expert in reversed(EXPERTS) for layer in layers if (layer, expert) in self.units
        )

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes of the stageable parts that the tasks use at all, on the device."""
        loaded = [part for part in STAGEABLE if part != "vae" or "gen" in self.request.experts]
        loaded = [part for part in loaded if part not in self.facts.left_out]
        return {part: part_bytes(self.facts, self.how, part) for part in loaded}

    @cached_property
    def always(self) -> int:
        """Bytes that are on the device from start to end, whatever is chosen."""
        latent = self.facts.latent * self.how.activation_itemsize if "gen" in self.request.experts else 0
        return base_bytes(self.how, self.calibration) + latent + scratch_bytes(self.facts, self.how)

    def waiting_bytes(self, residency: Residency) -> int:
        """What waits in RAM: parts, units, and the buffers through which it goes where it is not page-locked itself."""
        waiting = residency.waiting()
        units = sum(self.units[unit] for place in ("pinned", "pageable") for unit in waiting.get(place, ()))
        through = self.calibration.staging_bytes if set(waiting) - {"pinned"} else 0
        return units + sum(self.parts.get(part, 0) for part in residency.staged) + through

    def stagings(self) -> Iterator[tuple[str, ...]]:
        """Parts that wait in RAM: none of the tasks needs them, or one more at a time, the cheapest first."""
        if not self.on_card:
            yield ()
            return
        staged = {part for part in self.parts if part in self.request.idle_parts}
        yield _in_order(staged)
        for part in self.parts:
            if part not in staged:
                staged.add(part)
                yield _in_order(staged)

    def best(self) -> Candidate | None:
        """The fastest combination that fits, None if none does; `lowest_peak` then says what would have been needed."""
        return min(self._candidates(), key=Candidate.rank, default=None)

    def _candidates(self) -> Iterator[Candidate]:
        drawn = any(workload.picture_tokens for workload in self.workloads)
        for batch in self.batches if drawn else self.batches[:1]:
            needs = [phase for workload in self.workloads for phase in self._phases(workload, batch)]
            for staged in self.stagings():
                fixed, self._refused = self.fixed_bytes(needs, staged), False
                for found in self._placements(batch, staged, fixed):
                    yield found
                    yield from self._by_graph(found, fixed)
                if not self._refused:
                    break  # with more parts waiting the same would fit, and take no less

    def _phases(self, workload: Workload, batch: bool, graph_tokens: int = 0) -> Iterator[PhaseNeed]:
        return phases(self.facts, self.how, workload, batch, self.calibration, graph_tokens)

    def _by_graph(self, found: Candidate, fixed: int) -> Iterator[Candidate]:
        """A candidate of which nothing streams, with passes replayed that the host may be the bound of: those that are
        planned for, if memory goes so far; and those that need no more of it, since greater ones are planned for."""
        if found.residency.streamed or not self.graph_tokens:
            return
        passes = {w.picture_tokens * count for w in self.workloads for count in (w.branches if found.batch else 1, 1)}
        planned = max((tokens for tokens in passes if tokens <= self.graph_tokens), default=0)
        for tokens in {planned, min(self.graph_tokens, max(passes) // GRAPH_COPIES)}:
            needs = [need for workload in self.workloads for need in self._phases(workload, found.batch, tokens)]
            peak = found.peak - fixed + self.fixed_bytes(needs, found.residency.staged)
            if peak > self.device_limit:
                self._refused = True
            elif tokens:
                yield self._candidate(found.batch, peak, found.residency, self.streaming(found.residency), tokens)

    @cached_property
    def graph_tokens(self) -> int:
        """Of passes that the host may be the bound of, the tokens of the greatest."""
        if not self.on_card:
            return 0
        most = max(workload.picture_tokens * workload.branches for workload in self.workloads)
        found = self.latency.host_bound_tokens(most, self.cards)
        return found if found >= min(most, FEWEST_GRAPH_TOKENS) else 0

    def fixed_bytes(self, needs: Sequence[PhaseNeed], staged: Sequence[str]) -> int:
        """The peak over all phases without the units."""
        kept = self.always + sum(size for part, size in self.parts.items() if part not in staged)
        visiting = (
            need.dynamic(self.calibration.slack) + sum(self.parts[part] for part in need.parts if part in staged)
            for need in needs
        )
        return kept + max(visiting)

    def breakdown(self, plan: Plan) -> Iterator[PhaseBytes]:
        """What is on the device in every phase of every task under a plan."""
        staged = plan.residency.staged
        streamed = set(plan.residency.streamed)
        resident = sum(size for unit, size in self.units.items() if unit not in streamed)
        slots = plan.residency.slots * max(self.units.values(), default=0)
        room = plan.context_store
        kept = room.nbytes if room is not None and room.place == "device" else 0
        for workload in self.workloads:
            for need in self._phases(workload, plan.guidance_batch, plan.graph_tokens):
                visiting = [part for part in self.parts if part in need.parts or part not in staged]
                yield PhaseBytes(
                    "chat" if workload.said else workload.task,
                    need.name,
                    self.always + resident + sum(self.parts[part] for part in visiting),
                    slots,
                    need.kv_cache + kept,
                    need.dynamic(self.calibration.slack) - need.kv_cache,
                    tuple(visiting),
                )

    def _placements(self, batch: bool, staged: tuple[str, ...], fixed: int) -> Iterator[Candidate]:
        """For each number of slots, the fewest streamed units that fit.

        The more units stream, the lower is the peak, and the less room is left for them elsewhere.
        """
        waiting = sum(self.parts[part] for part in staged)
        shared = self.facts.config.decoder.num_layers if len(self.request.experts) > 1 else len(self.order)
        ranges: list[tuple[int, range]] = [(0, range(1))]
        if self.on_card:
            ranges.append((SLOTS_OF_SINGLES, range(SLOTS_OF_SINGLES + 1, shared + 1)))
            ranges += [(slots, range(max(shared, slots) + 1, len(self.order) + 1)) for slots in SLOTS_OF_PAIRS]
        for slots, counts in ranges:
            without = fixed + self._streamed[-1] + slots * self._largest
            first = bisect_left(self._streamed, without - self.device_limit, counts.start, counts.stop)
            last = bisect_left(counts, True, key=lambda count: not self._has_room(self._streamed[count], waiting)) - 1
            if last < 0:
                continue
            count = min(first, counts[last])
            peak = without - self._streamed[count]
            self.lowest_peak = min(self.lowest_peak, peak)
            self._refused |= first > counts.start
            if count == first:
                yield self._candidate(batch, peak, *self._resident(count, slots, staged, waiting))
                if not count and not self.workloads[0].new_tokens:
                    return  # copies make nothing faster; a token alone is predicted in another way beside them

    @cached_property
    def _streamed(self) -> Sequence[int]:
        """Bytes of the first so many units of `order`, from none to all."""
        return list(accumulate((self.units[unit] for unit in self.order), initial=0))

    @cached_property
    def _largest(self) -> int:
        """Bytes of a slot."""
        return max((self.units[unit] for unit in self.order), default=0)

    def _has_room(self, streamed: int, waiting: int) -> bool:
        """Whether RAM and disk hold the streamed bytes beside the waiting parts."""
        room = self.ram - waiting
        if not streamed:
            return not self.on_card or room >= 0
        if streamed <= min(room, self.profile.pin_limit):
            return True
        staging = self.calibration.staging_bytes
        return staging <= room if self.disk_serves else streamed + staging <= room

    @cached_property
    def disk_serves(self) -> bool:
        """Whether units can be read from their shards as they are used, but for small tensors."""
        if self.how.decoded_at_load:
            return False
        return self.facts.spec.encoded or self.how.itemsize == STORED_ITEMSIZE

    def _resident(self, count: int, slots: int, staged: tuple[str, ...], waiting: int) -> tuple[Residency, Streaming]:
        """With so many units streamed; guidance in one batch and branch by branch ask for the same."""
        key = count, slots, staged
        if key not in self._resided:
            residency = self._residency(self.order[:count], slots, staged, waiting)
            self._resided[key] = residency, self.streaming(residency)
        return self._resided[key]

    def _residency(self, streamed: Sequence[Unit], slots: int, staged: tuple[str, ...], waiting: int) -> Residency:
        """Page-locked memory as far as it reaches, then plain RAM, then the disk.

        The first to give way from the device are the first to give way to the disk, so these lie evenly too.
        """
        total, room = self._streamed[len(streamed)], self.ram - waiting
        lockable = min(room, self.profile.pin_limit)
        if total > lockable:
            room, lockable = (size - self.calibration.staging_bytes for size in (room, lockable))
        places: dict[Place, list[Unit]] = {place: [] for place in HOST_PLACES}
        taken = 0
        for unit in reversed(streamed):
            taken += self.units[unit]
            places["pinned" if taken <= lockable else "pageable" if taken <= room else "disk"].append(unit)
        source: Place = next((place for place, units in places.items() if units), "device")
        pageable, disk = (tuple(sorted(places[place])) if place != source else () for place in ("pageable", "disk"))
        return Residency(tuple(sorted(streamed)), slots, source, staged, pageable, disk)

    def _candidate(
        self, batch: bool, peak: int, residency: Residency, streaming: Streaming, graph_tokens: int = 0
    ) -> Candidate:
        staged = frozenset(residency.staged)
        launching = None
        if self.cards > 1:  # whether the host is the bound of several is not left to what one host was measured to take
            launching = self.cards * self.latency.launching_among(self.cards) * SLOWER_HOST
        given = self.workloads[0], streaming, staged, batch, graph_tokens, launching
        seconds = sum(self.latency.request(*given).values())
        passes = 1 if batch else max(1, self.workloads[0].branches)
        moved = streaming.moved(self.request.experts) * passes
        return Candidate(seconds, moved, peak, batch, residency, graph_tokens)

    def streaming(self, residency: Residency) -> Streaming:
        def of_experts(units: Sequence[Unit]) -> dict[Expert, int]:
            sizes = dict.fromkeys(self.request.experts, 0)
            for unit in units:
                sizes[unit[1]] += self.units[unit]
            return sizes

        layers = [layer for layer, _ in residency.streamed]
        elsewhere: dict[Place, dict[Expert, int]] = {
            "pageable": of_experts(residency.pageable), "disk": of_experts(residency.disk),
        }  # fmt: skip
        return Streaming(
            residency.source,
            residency.slots,
            of_experts(residency.streamed),
            len(layers) - len(set(layers)),
            {place: nbytes for place, nbytes in elsewhere.items() if sum(nbytes.values())},
        )


@lru_cache(maxsize=256)
def _evenly(layers: int) -> tuple[int, ...]:
    """All layers, any first few of which lie evenly among them."""
    return tuple(sorted(range(layers), key=_bits_reversed))


def _bits_reversed(index: int) -> float:
    """The van der Corput sequence: any first few of its places lie evenly between 0 and 1."""
    place, weight = 0.0, 0.5
    while index:
        place += weight * (index & 1)
        index, weight = index >> 1, weight / 2
    return place


def _in_order(parts: set[str]) -> tuple[str, ...]:
    return tuple(part for part in STAGEABLE if part in parts)

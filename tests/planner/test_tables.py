"""What is planned for well-known cards, as a table that a person can read; `data/planner_tables.txt`.

After a change of the planner or its constants: `python tests/planner/test_tables.py` writes the table anew; read the
difference line by line before committing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
from support.paths import DATA

from lowmem_bagel.errors import DoesNotFitError
from lowmem_bagel.formats.registry import formats
from lowmem_bagel.hardware.profile import GIB, HardwareProfile
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.plan import Plan
from lowmem_bagel.planner.solve import Limits, Request, make_plan

FORMATS = tuple(name for name in formats() if name != "bf16" and not name.startswith("gguf-"))
"""bf16's rows are those of source, and GGUF's lie between INT8's and NF4's."""
LOSSLESS = tuple(name for name in FORMATS if formats()[name].lossless)
TABLE = DATA / "planner_tables.txt"
RAM = (16, 32, 64)
HEAD = (
    "Text to picture, 1024x1024, 50 timesteps, 7B shape. Sizes in 1e9 bytes. `resident`: layer units on the device of",
    "56; `from`: where the others wait, and how many; `copied`: in a guided step; `waiting`: parts in RAM outside the",
    "phases that use them.",
    "",
    "card         RAM format   dtype    resident slots from              copied  peak  seconds batch waiting",
)


@dataclass(frozen=True)
class Machine:
    """Memory in GB, the nominal compute capability, and a plausible speed of pinned copies in GB/s."""

    name: str
    vram: float = 0
    capability: tuple[int, int] | None = None
    pcie: float = 0


MACHINES = (
    Machine("RTX 4090", 24, (8, 9), 25),
    Machine("RTX 3090", 24, (8, 6), 25),
    Machine("RTX 4080", 16, (8, 9), 25),
    Machine("RTX 3060", 12, (8, 6), 25),
    Machine("RTX 4060", 8, (8, 9), 12.5),
    Machine("RTX 2080 Ti", 11, (7, 5), 12.5),
    Machine("T4", 15, (7, 5), 12.5),
    Machine("V100", 16, (7, 0), 12.5),
    Machine("GTX 1080 Ti", 11, (6, 1), 12.5),
    Machine("no GPU"),
)
CARDS = [machine for machine in MACHINES if machine.capability]


@cache
def planned(machine: Machine, ram: int, form: str) -> Plan | str:
    """The plan, or why there is none."""
    profile = HardwareProfile.hypothetical(machine.vram, machine.capability, ram, machine.pcie, name=machine.name)
    try:
        return make_plan(ModelFacts.of_shape(form), profile, Limits(), Request(tasks=("generate",)))
    except DoesNotFitError as error:
        return str(error)


def line(machine: Machine, ram: int, form: str) -> str:
    plan = planned(machine, ram, form)
    start = f"{machine.name:12} {ram:3} {form:8}"
    if isinstance(plan, str):
        return f"{start} - {plan.partition(': ')[2]}"
    assert plan.prediction is not None
    residency, prediction = plan.residency, plan.prediction
    where = "+".join(f"{len(units)} {place}" for place, units in residency.waiting().items()) or "-"
    batch = "yes" if plan.guidance_batch else "no"
    return (
        f"{start} {plan.dtype:8} {56 - len(residency.streamed):8} {residency.slots:5} {where:17}"
        f" {prediction.step_bytes / 1e9:6.1f} {prediction.peak_bytes / 1e9:5.1f} {prediction.seconds:8.0f} {batch:5}"
        f" {' '.join(residency.staged)}".rstrip()
    )


def table() -> str:
    lines = [line(*case) for case in product(MACHINES, RAM, FORMATS)]
    return "\n".join([*HEAD, *lines]) + "\n"


def test_the_table_is_as_it_was_reviewed() -> None:
    assert table().splitlines() == TABLE.read_text().splitlines()


def plans(machines: list[Machine]) -> list[tuple[Machine, int, str, Plan]]:
    found = [(m, ram, form, planned(m, ram, form)) for m, ram, form in product(machines, RAM, FORMATS)]
    return [(m, ram, form, plan) for m, ram, form, plan in found if isinstance(plan, Plan)]


def test_every_card_runs_every_format() -> None:
    """Even with 16 GB of RAM, where what does not fit comes from the disk."""
    assert len(plans(CARDS)) == len(CARDS) * len(RAM) * len(FORMATS)


def test_plans_fit_the_card_and_the_ram() -> None:
    for machine, ram, form, plan in plans(CARDS):
        assert plan.prediction.peak_bytes < machine.vram * GIB
        units = ModelFacts.of_shape(form).units
        in_ram = set(plan.residency.streamed) - set(plan.residency.waiting().get("disk", ()))
        assert sum(units[unit].nbytes(2) for unit in in_ram) < 0.9 * ram * GIB


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("machine", CARDS, ids=lambda machine: machine.name)
def test_more_ram_is_never_slower(machine: Machine, form: str) -> None:
    seconds = [plan.prediction.seconds for ram in RAM if isinstance(plan := planned(machine, ram, form), Plan)]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_variants_stay_lossless(form: str) -> None:
    for machine, _, found, plan in plans(CARDS):
        if found == form:
            assert plan.dtype == ("bfloat16" if machine.capability >= (8, 0) else "float16")
            assert ("keep the checkpoint's bits" in plan.reasons["exactness"]) == (machine.capability >= (8, 0))


def test_the_faster_card_is_predicted_faster() -> None:
    for ram, form in product(RAM, FORMATS):
        ordered = [m for name in ("RTX 4090", "RTX 4080", "RTX 3060") for m in CARDS if m.name == name]
        seconds = [planned(machine, ram, form).prediction.seconds for machine in ordered]  # type: ignore[union-attr]
        assert seconds == sorted(seconds)


def test_what_is_not_measured_is_said() -> None:
    for _, _, _, plan in plans(list(MACHINES)):
        assert plan.reasons["assumptions"]


if __name__ == "__main__":
    TABLE.write_text(table())

"""Room for contexts that repeat: what a plan leaves and no more, on the device before RAM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.command import Ran

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.errors import SettingError
from lowmem_bagel.hardware.profile import HardwareProfile
from lowmem_bagel.planner.context_room import AUTO_BYTES, read_wish
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.plan import ContextRoom, Plan
from lowmem_bagel.planner.solve import Limits, Request, breakdown, make_plan
from lowmem_bagel.settings import LoadOptions

FACTS = ModelFacts.of_shape("int8", "bagel-7b")
GB = 10**9


def machine(vram: float, ram: float = 32) -> HardwareProfile:
    return HardwareProfile.hypothetical(vram, (8, 9) if vram else None, ram, 25)


def planned(profile: HardwareProfile, wish: Any, limits: Limits = Limits(), request: Request = Request()) -> Plan:
    return make_plan(FACTS, profile, replace(limits, context_store=wish), request)


@pytest.mark.parametrize(
    ("said", "wish"),
    [
        (None, None),
        ("", None),
        ("off", None),
        ("0", None),
        (0, None),
        (0.0, None),
        ("auto", "auto"),
        ("2GB", 2 * GB),
        (5000, 5000),
    ],
)
def test_what_the_option_says(said: Any, wish: Any) -> None:
    assert read_wish(said) == wish


@pytest.mark.parametrize("said", ["much", "-1GB", "on", -5.0])
def test_what_it_cannot_say(said: Any) -> None:
    with pytest.raises(SettingError, match="context_store must be auto, off or a size such as 2GB, not "):
        read_wish(said)


@pytest.mark.parametrize("vram", [8, 12, 16, 24, 48, 0])
@pytest.mark.parametrize("wish", ["auto", 300_000_000, 3 * GB])
def test_contexts_take_what_the_plan_leaves(vram: int, wish: Any) -> None:
    """No weight gives way to them: the placement is the one without, and the peak stays in the limit."""
    profile = machine(vram, 64)
    without, plan = planned(profile, None), planned(profile, wish)
    assert without.context_store is None and "context store" not in without.reasons
    assert (plan.residency, plan.guidance_batch) == (without.residency, without.guidance_batch)
    assert plan.prediction is not None and without.prediction is not None
    room = plan.context_store
    on_device = room.nbytes if room is not None and room.place == "device" else 0
    assert plan.prediction.peak_bytes == without.prediction.peak_bytes + on_device
    limits = Limits(context_store=wish)
    rows = breakdown(plan, FACTS, profile, limits, Request())
    assert max(row.total for row in rows) == pytest.approx(plan.prediction.peak_bytes, abs=len(rows))
    if room is not None and vram:
        assert plan.prediction.peak_bytes <= profile.vram_total
        assert room.nbytes <= (AUTO_BYTES if wish == "auto" else wish)


def test_on_the_device_where_it_has_room_else_in_ram_else_nowhere() -> None:
    large, small = planned(machine(48), "auto"), planned(machine(12), "auto")
    assert large.context_store == ContextRoom("device", AUTO_BYTES)
    assert small.context_store == ContextRoom("pinned", AUTO_BYTES)
    assert "in page-locked RAM: the device has no room" in small.reasons["context store"]
    plain = planned(replace(machine(12), pin_limit=GB), "auto")
    assert plain.context_store == ContextRoom("pageable", AUTO_BYTES)
    assert "in plain RAM: the device has no room" in plain.reasons["context store"]
    tight = planned(machine(12, 9), "auto")
    assert tight.residency.disk, "weights fill the RAM"
    assert tight.context_store is None
    assert tight.reasons["context store"].startswith("off: the plan leaves ")


def test_a_size_that_has_not_enough_room_is_less_and_says_so() -> None:
    plan = planned(machine(48), 100 * GB)
    assert plan.context_store is not None and plan.context_store.nbytes < 40 * GB
    assert "of the 100.00 GB asked for" in plan.reasons["context store"]


def test_max_vram_holds_for_contexts_too() -> None:
    plan = planned(machine(48), "auto", Limits(max_vram=20 * GB))
    assert plan.prediction is not None and plan.prediction.peak_bytes <= 20 * GB


def test_a_processor_keeps_them_in_its_ram() -> None:
    plan = planned(machine(0, 64), "auto")
    assert plan.context_store == ContextRoom("device", AUTO_BYTES)
    assert "RAM" in plan.reasons["context store"]


def test_a_small_model_keeps_no_more_than_it_has_contexts_for() -> None:
    plan = plan_for(ModelFolder.open(FOLDER), LoadOptions(device="cpu", context_store="auto"))
    assert plan.context_store is not None and plan.context_store.nbytes < 50_000_000


def test_the_plan_command_shows_it(cli: Callable[..., Ran]) -> None:
    card = ("plan", "--shape", "bagel-7b", "--format", "int8", "--vram", "48GB", "--compute-capability", "8.9")
    shown = cli(*card, "--context-store", "1.5GB")
    assert "context store: up to 1.50 GB, on the device, which the plan leaves free" in shown.out
    assert "context store" not in cli(*card).out
    assert "must be auto, off or a size" in cli(*card, "--context-store", "plenty").error

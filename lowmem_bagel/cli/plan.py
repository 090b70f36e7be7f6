"""`lowmem-bagel plan`: where a model's parts live on this or another machine, how long a picture takes, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, duration, opening
from .machine import CapabilityOption, CardOption, PcieOption, RamOption, VramOption, machines
from .options import Values, takes
from .terminal import print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..planner.estimate import PlanInputs
    from ..planner.facts import ModelFacts
    from ..planner.plan import Plan
    from ..planner.solve import PhaseBytes
    from ..settings import Option

    Beside = Callable[[str], tuple[ModelFacts, str]]


def load_flags() -> tuple[Option, ...]:
    """All options of loading: there is no request that would tell some."""
    from ..planner.load_options import load_options

    return load_options(planning=True)


def format_names() -> str:
    from ..formats.registry import formats

    return ", ".join(formats())


@takes(loading=load_flags)
def plan_command(
    loading: Values,
    path: Annotated[Path | None, typer.Argument(help="Checkpoint or variant folder; or use --shape.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="Plan for a shape that is not on disk: bagel-7b, bagel-moe-7b.")
    ] = None,
    format: Annotated[str, typer.Option(help=f"With --shape: {format_names()}.")] = "source",
    card: CardOption = "",
    vram: VramOption = None,
    compute_capability: CapabilityOption = None,
    ram: RamOption = None,
    pcie: PcieOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where everything would live, how long it takes, and why.

    The parts' places, the memory of every phase, bytes and seconds, and the reason for each choice.
    """
    from ..planner.devices import asked_devices
    from ..planner.estimate import PlanInputs, asked_of, on_devices, plan_from, with_variants
    from ..planner.load_options import options_from
    from ..planner.solve import breakdown

    several = card.count(",") + 1
    if several > 1 and "devices" not in loading:
        loading = {**loading, "devices": ",".join(map(str, range(several)))}
    (facts, beside), options = _facts(path, shape, format, loading), options_from(loading)
    limits, request = asked_of(facts, options)
    asked = asked_devices(options)
    names = [device.name for device in asked]
    profiles = machines(names, card, vram, compute_capability, ram, pcie)
    inputs = on_devices(PlanInputs(facts, profiles[0], limits, request), names, profiles)
    inputs = with_variants(inputs, [device.variant for device in asked], beside)
    plan = plan_from(inputs, options)
    rows = breakdown(plan, *inputs[:4])
    if as_json:
        print_json(_record(plan, rows, inputs))
    else:
        _print(plan, rows, inputs)


def _facts(path: Path | None, shape: str | None, format: str, loading: Values) -> tuple[ModelFacts, Beside]:
    """Of the model; and what gives those of a folder that another card holds, or, with --shape, of a format."""
    from ..errors import SettingError
    from ..planner.facts import ModelFacts

    if (path is None) == (shape is None):
        raise SettingError("give a model folder, or --shape bagel-7b for one that is not on disk")
    if shape is not None:
        return ModelFacts.of_shape(format, shape), lambda other: (ModelFacts.of_shape(other, shape), "the same shape")
    from ..checkpoint.folder import ModelFolder
    from ..planner.estimate import facts_beside

    assert path is not None
    folder = ModelFolder.open(path, **opening(loading))
    return ModelFacts.of_folder(folder), lambda other: facts_beside(folder, other)


def _record(plan: Plan, rows: list[PhaseBytes], inputs: PlanInputs) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": inputs.facts.name,
        "format": inputs.facts.format,
        "machine": {
            "name": inputs.profile.device_name,
            "here": not inputs.profile.assumed,
            "vram_bytes": inputs.profile.vram_total,
            "ram_bytes": inputs.profile.ram_total,
        },
        "size": [inputs.request.width, inputs.request.height],
        "step_cache": inputs.request.step_cache,
        "plan": plan.to_json(),
        "phases": [asdict(row) | {"total": row.total} for row in rows],
    }


def _print(plan: Plan, rows: list[PhaseBytes], inputs: PlanInputs) -> None:
    from ..units import format_bytes

    facts, profile = inputs.facts, inputs.profile
    where = (profile.device_name or "a card") if profile.device == "cuda" else profile.cpu_name or "a processor"
    there = " that is not here" if profile.assumed else ""
    say(f"{facts.name}, {facts.format}, on {where}{there}")
    table: list[tuple[str, ...]] = [
        ("task", "phase", "weights", "slots", "keys", "work", "total", "parts on the device")
    ]
    for row in rows:
        sizes = (row.weights, row.slots, row.arena, row.activations, row.total)
        table.append((row.task, row.phase, *map(format_bytes, sizes), " ".join(row.parts)))
    print_table(table, right=range(2, 7))
    prediction = plan.prediction
    if prediction is not None:
        say(
            f"\npeak {format_bytes(prediction.peak_bytes)}, {format_bytes(prediction.step_bytes)} copied a step, "
            f"about {duration(prediction.seconds or 0)} for {plan.tasks[0]}"
        )
    for other in plan.others:
        say(f"{other.device}: {_beside(other)}")
    chosen = {
        "device": plan.device, "dtype": plan.dtype, "vae_dtype": plan.vae_dtype, "attention": plan.attention,
        "guidance_batch": "yes" if plan.guidance_batch else "no", "source": plan.residency.source,
        "slots": str(plan.residency.slots),
    }  # fmt: skip
    for name, reason in plan.reasons.items():
        value = f" = {chosen[name]}" if name in chosen else ""
        say(f"{name}{value}: {reason}")


def _beside(plan: Plan) -> str:
    """What another card holds."""
    from ..units import format_bytes

    peak = "" if plan.prediction is None else f"peak {format_bytes(plan.prediction.peak_bytes)}, "
    return f"{peak}{len(plan.residency.streamed)} units stream, linears {plan.reasons['linears']}"

"""`lowmem-bagel plan`: where a model's parts live on this or another machine, how long a picture takes, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import (
    AttentionOption,
    BackendOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxRamOption,
    MaxVramOption,
)

if TYPE_CHECKING:
    from ..hardware.profile import HardwareProfile
    from ..planner.estimate import PlanInputs
    from ..planner.plan import Plan
    from ..planner.solve import Row


def plan_command(
    path: Annotated[Path | None, typer.Argument(help="Checkpoint or variant folder; or use --shape.")] = None,
    shape: Annotated[str | None, typer.Option(help="Plan for a shape with nothing on disk: bagel-7b.")] = None,
    format: Annotated[str, typer.Option(help="With --shape: source, dfloat11, int8, fp16 or nf4.")] = "source",
    vram: Annotated[str | None, typer.Option(help="A card that is not here: its memory, such as 24GB.")] = None,
    compute_capability: Annotated[str | None, typer.Option(help="That card's compute capability, such as 8.9.")] = None,
    card: Annotated[str, typer.Option(help="That card's name, such as 'RTX 4090', for its rates.")] = "",
    ram: Annotated[str | None, typer.Option(help="That machine's RAM, such as 32GB.")] = None,
    pcie: Annotated[float, typer.Option(help="GB/s of copies to that card from page-locked memory.")] = 25.0,
    max_vram: MaxVramOption = None,
    max_ram: MaxRamOption = None,
    task: Annotated[str, typer.Option(help="Some of these; seconds are of the first.")] = "generate,edit,ask",
    size: Annotated[str, typer.Option(help="Picture, as WIDTHxHEIGHT or one side in pixels.")] = "1024",
    step_cache: Annotated[str, typer.Option(help="Drawn with it: none, taylorseer or first-block.")] = "none",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    attention: AttentionOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show where the parts would live, the memory of every phase, bytes and seconds, and the reason for each choice."""
    from ..planner.estimate import PlanInputs, checked_tasks, request_for
    from ..planner.solve import Forced, Limits, breakdown, make_plan
    from ..units import parse_bytes

    facts = _facts(path, shape, format)
    width, height = _pixels(size)
    request = request_for(facts, checked_tasks(facts, task.split(",")), height, width, step_cache)
    limits = Limits(
        parse_bytes(max_vram, "--max-vram"),
        parse_bytes(max_ram, "--max-ram"),
        Forced(device, dtype, attention, backend),
    )
    inputs = PlanInputs(facts, _machine(vram, compute_capability, card, ram, pcie), limits, request)
    plan = make_plan(*inputs)
    rows = breakdown(plan, *inputs)
    if as_json:
        from .console import print_json

        print_json(_record(plan, rows, inputs))
    else:
        _print(plan, rows, inputs)


def _facts(path: Path | None, shape: str | None, format: str) -> Any:
    from ..errors import SettingError
    from ..planner.facts import ModelFacts

    if (path is None) == (shape is None):
        raise SettingError("give a model folder, or --shape bagel-7b for one that is not on disk")
    if shape is not None:
        return ModelFacts.of_shape(format, shape)
    from ..checkpoint.folder import ModelFolder

    assert path is not None
    return ModelFacts.of_folder(ModelFolder.open(path))


def _machine(vram: str | None, capability: str | None, card: str, ram: str | None, pcie: float) -> HardwareProfile:
    """This machine, or one that is described: with a card where --vram is given, without one where only --ram is."""
    import re

    from ..diagnostics.probe import probe
    from ..errors import SettingError
    from ..hardware.profile import HardwareProfile
    from ..units import parse_memory

    if vram is None and ram is None:
        if capability is not None or card:
            raise SettingError("a card that is not here needs --vram and --compute-capability")
        return probe()
    if vram is None:
        return HardwareProfile.hypothetical(0, None, parse_memory(ram or "", "--ram"), 0)
    match = re.fullmatch(r"(\d+)\.(\d+)", capability or "")
    if match is None:
        raise SettingError(f"--compute-capability must be like 8.9, not {capability!r}")
    if not 0 < pcie < 1e4:
        raise SettingError(f"--pcie must be a speed in GB/s, not {pcie:g}")
    return HardwareProfile.hypothetical(
        parse_memory(vram, "--vram"),
        (int(match[1]), int(match[2])),
        parse_memory(ram or "32GB", "--ram"),
        pcie,
        name=card,
    )


def _pixels(size: str) -> tuple[int, int]:
    from ..errors import SettingError

    sides = size.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() and 0 < int(side) <= 1 << 16 for side in sides):
        raise SettingError(f"--size must be like 1024 or 768x1024, not {size!r}")
    return int(sides[0]), int(sides[-1])


def _record(plan: Plan, rows: list[Row], inputs: PlanInputs) -> dict[str, Any]:
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


def _print(plan: Plan, rows: list[Row], inputs: PlanInputs) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..units import format_bytes

    console = Console(highlight=False)
    facts, profile = inputs.facts, inputs.profile
    where = (profile.device_name or "a card") if profile.device == "cuda" else profile.cpu_name or "a processor"
    there = " that is not here" if profile.assumed else ""
    console.print(f"{facts.name}, {facts.format}, on {where}{there}", markup=False)
    table = Table("task", "phase", box=None)
    for name in ("weights", "slots", "keys", "work", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("parts on the device", overflow="fold")
    for row in rows:
        sizes = (row.weights, row.slots, row.arena, row.activations, row.total)
        table.add_row(row.task, row.phase, *map(format_bytes, sizes), " ".join(row.parts))
    console.print(table)
    prediction = plan.prediction
    assert prediction is not None
    console.print(
        f"\npeak {format_bytes(prediction.peak_bytes)}, {format_bytes(prediction.step_bytes)} copied a step, "
        f"about {_duration(prediction.seconds or 0)} for {plan.tasks[0]}"
    )
    chosen = {
        "device": plan.device, "dtype": plan.dtype, "vae_dtype": plan.vae_dtype, "attention": plan.attention,
        "guidance_batch": "yes" if plan.guidance_batch else "no", "source": plan.residency.source,
        "slots": str(plan.residency.slots),
    }  # fmt: skip
    for name, reason in plan.reasons.items():
        value = f" = {chosen[name]}" if name in chosen else ""
        console.print(f"{name}{value}: {escape(reason)}", soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

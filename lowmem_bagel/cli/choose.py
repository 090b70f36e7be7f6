"""`lowmem-bagel choose`: which format and settings for this card or another, and the commands that get it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import JsonOption, duration
from .machine import CapabilityOption, CardOption, PcieOption, RamOption, VramOption, machine
from .options import Values, takes
from .terminal import print_json, print_table, quoted, say

if TYPE_CHECKING:
    from ..hardware.profile import HardwareProfile
    from ..planner.choice import Choice, Offer, Wanted
    from ..settings import Option

SHOWN = 10
"""Rows of the table where not all are asked for."""
PUBLISHED = {"bagel-7b": "bagel", "bagel-moe-7b": "bagel-moe"}
"""Shapes, and what `download` calls a checkpoint of each."""
OF_CHOOSING = ("max_vram", "max_ram", "size")
EXAMPLES = {
    "generate": 'generate "a red fox in the snow"',
    "edit": 'edit fox.png "make it night"',
    "ask": 'ask "what animal is this?" --image fox.png',
}


class TaskName(StrEnum):
    """What the choice is for."""

    generate = "generate"
    edit = "edit"
    ask = "ask"


def choose_flags() -> tuple[Option, ...]:
    from ..planner.load_options import load_options

    return tuple(option for option in load_options(planning=True) if option.name in OF_CHOOSING)


@takes(loading=choose_flags)
def choose_command(
    loading: Values,
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Checkpoints and variants to choose from.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Without a folder: bagel-7b or bagel-moe-7b.")] = "bagel-7b",
    card: CardOption = "",
    vram: VramOption = None,
    compute_capability: CapabilityOption = None,
    ram: RamOption = None,
    pcie: PcieOption = None,
    task: Annotated[TaskName, typer.Option(help="What it is for.")] = TaskName.generate,
    lossless: Annotated[bool, typer.Option("--lossless", help="Only what loses nothing.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Show every combination.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose format and settings for this card or another.

    Every format with every step cache is planned: seconds and memory are predictions. Losses were measured on the
    embedded model.
    """
    from ..planner.choice import choose

    wanted = wanted_from(loading, task.value, lossless)
    profile = machine(card, vram, compute_capability, ram, pcie)
    ranked = choose([*_offers(folders or (), shape, profile)], profile, wanted)
    if as_json:
        print_json(record(ranked, profile, wanted, shape))
    else:
        _print(ranked[: len(ranked) if show_all else SHOWN], len(ranked), profile, wanted, shape)


def wanted_from(loading: Values, task: Any = "generate", lossless: bool = False) -> Wanted:
    from ..planner.choice import Wanted
    from ..planner.load_options import options_from
    from ..planner.workload import Limits
    from ..units import parse_bytes

    options = options_from(loading)
    limits = Limits(parse_bytes(options.max_vram, "max_vram"), parse_bytes(options.max_ram, "max_ram"))
    return Wanted(task, *options.size, limits, lossless)


def published(profile: HardwareProfile, shape: str = "bagel-7b") -> list[Offer]:
    """The published checkpoint of a shape, and what can be made from it."""
    from ..planner.choice import offers
    from ..planner.facts import ModelFacts

    return offers(ModelFacts.of_shape("source", shape), _converters(), profile)


def _offers(folders: Sequence[Path], shape: str, profile: HardwareProfile) -> Iterator[Offer]:
    from ..checkpoint.folder import ModelFolder
    from ..planner.choice import offers
    from ..planner.facts import ModelFacts

    if not folders:
        yield from published(profile, shape)
    for folder in folders:
        yield from offers(ModelFacts.of_folder(ModelFolder.open(folder)), _converters(), profile, str(folder))


def _converters() -> set[str]:
    return set(entry_points(group="lowmem_bagel.converters").names)


def commands(choice: Choice, wanted: Wanted, shape: str = "bagel-7b") -> list[str]:
    """What is to be typed to get it, in order."""
    from ..hub.known import KNOWN
    from ..sampling.step_caches.speeds import flag

    name = PUBLISHED[shape]
    folder = choice.offer.folder or KNOWN[name].repo.rpartition("/")[2]
    lines = [] if choice.offer.folder else [f"lowmem-bagel download{'' if shape == 'bagel-7b' else f' {name}'}"]
    if choice.offer.converted:
        made = f"{folder.rstrip('/')}-{choice.facts.format}" if choice.offer.folder else f"{name}-{choice.facts.format}"
        lines.append(f"lowmem-bagel convert {quoted(folder)} {quoted(made)} --to {choice.facts.format}")
        folder = made
    asked = flag(choice.step_cache, wanted.task == "edit")
    cache = asked and f" {asked}"
    size = f" --width {wanted.width} --height {wanted.height}" if _is_smaller(wanted) else ""
    limit = "" if wanted.limits.max_vram is None else f" --max-vram {wanted.limits.max_vram / 1e9:g}GB"
    lines.append(f"lowmem-bagel {EXAMPLES[wanted.task]} --model {quoted(folder)}{cache}{size}{limit}")
    return lines


def _is_smaller(wanted: Wanted) -> bool:
    return wanted.task == "generate" and (wanted.height, wanted.width) != (1024, 1024)


def line(choice: Choice, profile: HardwareProfile, wanted: Wanted) -> str:
    """The recommendation in one line."""
    from ..units import format_bytes

    where = (profile.device_name or "this card") if profile.device == "cuda" else "a processor"
    what = "an answer" if wanted.task == "ask" else f"a picture of {wanted.width}x{wanted.height}"
    card = f"{format_bytes(choice.peak)} of the card's {format_bytes(profile.vram_total)}, " if choice.peak else ""
    ram, stored = format_bytes(choice.ram), format_bytes(choice.stored)
    return (
        f"{choice.title} on {where}: about {duration(choice.seconds)} for {what}, {card}{ram} of RAM, {stored} on disk "
        "(predicted)"
    )


def record(ranked: Sequence[Choice], profile: HardwareProfile, wanted: Wanted, shape: str) -> dict[str, Any]:
    """The ranking as JSON values; sizes in bytes, None for what does not fit."""
    best = ranked[0]
    return {
        "machine": {
            "name": profile.device_name,
            "here": not profile.assumed,
            "device": profile.device,
            "vram_bytes": profile.vram_total,
            "ram_bytes": profile.ram_total,
        },
        "task": wanted.task,
        "size": [wanted.width, wanted.height],
        "recommended": line(best, profile, wanted),
        "commands": commands(best, wanted, shape),
        "choices": [row(choice, best) for choice in ranked],
    }


def row(choice: Choice, best: Choice) -> dict[str, Any]:
    from ..planner.choice import compared

    fits = choice.plan is not None
    return {
        "format": choice.facts.format,
        "folder": choice.offer.folder,
        "step_cache": choice.step_cache,
        "fits": fits,
        "seconds": round(choice.seconds, 2) if fits else None,
        "peak_bytes": choice.peak if fits else None,
        "ram_bytes": choice.ram if fits else None,
        "stored_bytes": choice.stored,
        "lossless": not choice.losses,
        "fidelity": choice.fidelity,
        "why": compared(choice, best),
    }


def _print(ranked: Sequence[Choice], count: int, profile: HardwareProfile, wanted: Wanted, shape: str) -> None:
    from ..planner.choice import compared
    from ..units import format_bytes

    best = ranked[0]
    say(line(best, profile, wanted), "bold")
    for command in commands(best, wanted, shape):
        say(f"  {command}")
    say()
    table = [("format", "step cache", "time", "card", "RAM", "disk", "loses", "why")]
    for choice in ranked:
        fits = choice.plan is not None
        table.append(
            (
                choice.facts.spec.title,
                choice.step_cache,
                duration(choice.seconds) if fits else "-",
                format_bytes(choice.peak) if choice.peak else "-",
                format_bytes(choice.ram) if fits else "-",
                format_bytes(choice.stored),
                choice.fidelity,
                compared(choice, best),
            )
        )
    print_table(table, right=range(2, 6))
    more = f"{count - len(ranked)} more with --all; " if count > len(ranked) else ""
    say(
        f"{more}time and memory are predictions; losses, of a linear's output and of tasks judged, in points of 100, "
        "were measured on the embedded model"
    )

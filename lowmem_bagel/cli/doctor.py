"""`lowmem-bagel doctor`: what this machine can do, a verdict, and the next command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import print_json, print_table, say

if TYPE_CHECKING:
    from ..diagnostics.advice import Diagnosis
    from ..diagnostics.trials import Findings
    from ..hardware.profile import HardwareProfile

COLOURS = {"ready": "bold green", "limited": "bold yellow", "blocked": "bold red"}


def doctor_command(
    folder: Annotated[Path | None, typer.Argument(help="Model folder whose disk speed is measured.")] = None,
    measure: Annotated[bool, typer.Option(help="Time copies to the card and reading from the disk.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile and the verdict as JSON.")] = False,
) -> None:
    """Look at this machine: what runs, what does not, what to do next."""
    from ..diagnostics.advice import diagnose
    from ..diagnostics.features import check_switched_off
    from ..diagnostics.probe import probe
    from ..diagnostics.trials import try_all

    check_switched_off()
    profile = probe(measure, folder)
    advice, commands = _chosen(profile)
    able, diagnosis = try_all(profile), diagnose(profile, *commands[:1])
    if as_json:
        found = {"profile": profile.to_json(), "abilities": asdict(able), "verdict": asdict(diagnosis)}
        print_json(found | {"choice": advice, "commands": commands})
    else:
        _print(profile, able, diagnosis, advice)


def _chosen(profile: HardwareProfile) -> tuple[str, list[str]]:
    """What `choose` recommends for drawing with the published checkpoint, or why nothing, and the commands for it."""
    from ..errors import DoesNotFitError
    from ..planner.choice import Wanted, choose
    from .choose import commands, line, published

    wanted = Wanted()
    try:
        best = choose(published(profile), profile, wanted)[0]
    except DoesNotFitError as refusal:
        return str(refusal), []
    return line(best, profile, wanted), commands(best, wanted)


def _print(profile: HardwareProfile, able: Findings, diagnosis: Diagnosis, advice: str) -> None:
    print_table([*rows(profile), *finding_rows(able)])
    for note in diagnosis.notes:
        say(f"note: {note}")
    for problem in (*profile.problems, *able.problems):
        say(f"problem: {problem}")
    say()
    say(f"{diagnosis.level}: {diagnosis.summary}", COLOURS[diagnosis.level])
    say(f"BAGEL-7B: {advice}; lowmem-bagel choose shows others")
    say(f"next: {diagnosis.command}", "bold")


def rows(profile: HardwareProfile) -> Iterator[tuple[str, str]]:
    """The table: what was looked at, and what was found."""
    p = profile
    if p.capability is None:
        yield "card", "none that PyTorch can use"
    else:
        yield "card", f"{p.device_name}, compute capability {p.capability[0]}.{p.capability[1]}"
    for card in p.driver_cards:
        capability = "unknown" if card.capability is None else f"{card.capability[0]}.{card.capability[1]}"
        yield "driver", f"{card.driver}: {card.name}, compute capability {capability}, {_gb(card.total)}"
    if p.device == "cuda":
        yield "card's memory", f"{_gb(p.vram_free)} free of {_gb(p.vram_total)}"
        yield "copies to it", f"{_speed(p.pinned_gbps)} pinned, {_speed(p.pageable_gbps)} pageable"
    yield "native bfloat16", ("yes" if p.native_bf16 else "no") + ("" if p.device == "cuda" else " (processor)")
    built = f"CUDA {p.torch_cuda}" if p.torch_cuda else "CPU build"
    yield "PyTorch", "not importable" if p.torch_version is None else f"{p.torch_version} ({built})"
    if p.torch_archs:
        verdict = {True: "the card is covered", False: "not for this card", None: "cannot be compared"}[
            p.torch_has_code
        ]
        yield "built for", f"{', '.join(p.torch_archs)}: {verdict}"
    yield "attention", f"{', '.join(p.attention) or 'none'} (tried in {p.attention_dtype})"
    for name, reason in p.attention_refused.items():
        yield f"  not {name}", reason
    for name, found in p.packages.items():
        yield name, ("" if found.available else "no: ") + found.reason
    yield "platform", p.platform
    yield "RAM", f"{_gb(p.ram_available)} available of {_gb(p.ram_total)}"
    if p.device == "cuda":
        yield "can be pinned", f"{_gb(p.pin_limit)} at most"
    yield "processor", f"{p.cpu_name or 'unknown'}, {p.cores} cores, {' '.join(p.cpu_features) or 'features unknown'}"
    if p.disk_gbps is not None:
        yield "disk", f"{_speed(p.disk_gbps)} reading"
    if p.switched_off:
        yield "switched off", f"{', '.join(p.switched_off)} (LOWMEM_BAGEL_DISABLE)"


def finding_rows(able: Findings) -> Iterator[tuple[str, str]]:
    """Our kernels, those that share a reason on one line, and the backends of each format."""
    running = [name for name, found in able.kernels.items() if found.available]
    if able.kernels:
        yield "our kernels", ", ".join(running) or "none"
    refused: dict[str, list[str]] = {}
    for name, found in able.kernels.items():
        if not found.available:
            refused.setdefault(found.reason, []).append(name)
    for reason, names in refused.items():
        if len(names) == len(able.kernels):
            yield "  none of them", reason
        else:
            yield f"  not {names[0]}", (f"nor {', '.join(names[1:])}: " if names[1:] else "") + reason
    for format, lines in able.tuned.items():
        for name, line in lines.items():
            yield f"{format}, {name}", line
    for format, backends in able.backends.items():
        yield f"{format} by", ", ".join(name for name, found in backends.items() if found.available) or "none"
        for name, found in backends.items():
            if not found.available:
                yield f"  not {name}", found.reason


def _gb(size: int) -> str:
    from ..hardware.profile import GIB

    return f"{size / GIB:.1f} GB" if size else "unknown"


def _speed(gbps: float | None) -> str:
    return "not measured" if gbps is None else f"{gbps:.1f} GB/s"

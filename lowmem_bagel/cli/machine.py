"""Options that describe a machine, for the commands that plan: this one, or one that is not here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..hardware.gpu_specs import Card
    from ..hardware.profile import HardwareProfile

CardOption = Annotated[
    str,
    typer.Option(
        help="A card that is not here, such as 'RTX 4090': a known one's memory and rates are known. "
        "Several of them: '4090,3060'."
    ),
]
VramOption = Annotated[str | None, typer.Option(help="That card's memory, such as 24GB.")]
CapabilityOption = Annotated[str | None, typer.Option(help="That card's compute capability, such as 8.9.")]
RamOption = Annotated[str | None, typer.Option(help="That machine's RAM, such as 32GB, which is assumed of a card's.")]
PcieOption = Annotated[
    float | None,
    typer.Option(help="GB/s of copies to that card from page-locked memory; default: by its slot, else 25."),
]
RAM, PCIE_GBPS = "32GB", 25.0


def machine(
    card: str, vram: str | None, capability: str | None, ram: str | None, pcie: float | None
) -> HardwareProfile:
    """This machine, or the one that is described: with a card where --card or --vram is given, else without one.

    Raises:
        SettingError: a value is none, or too little is said of a card that is not known.
    """
    from ..diagnostics.probe import probe
    from ..errors import SettingError
    from ..hardware.profile import HardwareProfile
    from ..units import parse_memory

    memory = None if ram is None else parse_memory(ram, "--ram")
    if not card and vram is None:
        if capability is not None or pcie is not None:
            raise SettingError("a card that is not here needs --card, or --vram and --compute-capability")
        return probe() if memory is None else HardwareProfile.hypothetical(0, None, memory, 0)
    known = _known(card, whole=vram is not None and capability is not None)
    if pcie is not None and not 0 < pcie < 1e4:
        raise SettingError(f"--pcie must be a speed in GB/s, not {pcie:g}")
    return HardwareProfile.hypothetical(
        known.memory_gb if known is not None and vram is None else parse_memory(vram or "", "--vram"),
        known.capability if known is not None and capability is None else _capability(capability),
        parse_memory(RAM) if memory is None else memory,
        pcie or _copies(known),
        name=known.name if known else card,
    )


def machines(
    names: Sequence[str], cards: str, vram: str | None, capability: str | None, ram: str | None, pcie: float | None
) -> list[HardwareProfile]:
    """The machine as each of the devices sees it; of those that are not here, one card stands for all.

    Raises:
        SettingError: as of `machine`, or there are more or fewer cards than devices.
    """
    from ..errors import SettingError
    from ..planner.estimate import this_machine

    described = [card.strip() for card in cards.split(",")]
    if len(described) == 1:
        described *= len(names)
    if len(described) != len(names):
        raise SettingError(f"--card names {len(described)} cards, and --devices {len(names)}; give as many")
    if len(names) > 1 and not cards and vram is None and ram is None:
        return [this_machine(name) for name in names]
    return [machine(card, vram, capability, ram, pcie) for card in described]


def known_machine(card: Card, ram_gb: float) -> HardwareProfile:
    """A machine with a known card that is not here."""
    from ..hardware.profile import HardwareProfile

    return HardwareProfile.hypothetical(card.memory_gb, card.capability, ram_gb, _copies(card), name=card.name)


def _known(name: str, whole: bool) -> Card | None:
    """The card of that name. `whole`: what a plan needs is said, so that an unknown one will do."""
    from ..errors import SettingError
    from ..hardware.gpu_specs import CARDS, called

    card = called(name)
    if name and card is None and not whole:
        known = ", ".join(card.name for card in CARDS)
        raise SettingError(f"unknown card {name!r}: give --vram and --compute-capability too, or one of {known}")
    return card


def _capability(text: str | None) -> tuple[int, int]:
    import re

    from ..errors import SettingError

    match = re.fullmatch(r"(\d+)\.(\d+)", text or "")
    if match is None:
        raise SettingError(f"--compute-capability must be like 8.9, not {text or ''!r}")
    return int(match[1]), int(match[2])


def _copies(card: Card | None) -> float:
    from ..planner.calibration import MEASURED

    return PCIE_GBPS if card is None else card.pcie_gbps * MEASURED.pcie_share

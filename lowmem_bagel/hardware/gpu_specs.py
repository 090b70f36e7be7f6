"""Rates of known cards, for predictions only: kernels are chosen by capability and trial, never by name. No torch.

Sources: NVIDIA's architecture white papers (Pascal GP102, Volta V100, Turing, Ampere GA102 and A100, Ada, Hopper) and
the data sheets of T4, A100, H100 and H200. Where these give no figure for a card (RTX 3060, RTX 4060, GTX 1080 Ti), it
is multiprocessors x boost clock x operations per clock and multiprocessor of the card's generation. Tensor rates are
dense, with float32 accumulation (GeForce cards run that at half the rate of float16 accumulation).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PCIE3_X16, PCIE4_X8, PCIE4_X16, PCIE5_X16 = 15.75, 15.75, 31.5, 63.0
"""Nominal GB/s in one direction; copies from pinned memory reach about 0.8 to 0.9 of it."""


@dataclass(frozen=True)
class Card:
    """Peak rates of one card: TFLOP/s (1e12), TOP/s, GB/s (1e9) and GB (2**30)."""

    name: str
    capability: tuple[int, int]
    memory_gb: float
    fp32_tflops: float
    fp16_tflops: float
    """Through tensor cores where there are any, else what float32 arithmetic on float16 data gives."""
    bf16_tflops: float | None
    """None without native bfloat16."""
    int8_tops: float | None
    """Tensor cores, or four-way dot products (dp4a) on cards without int8 ones; None without either."""
    memory_gbps: float
    pcie_gbps: float


CARDS: tuple[Card, ...] = (
    Card("GTX 1080 Ti", (6, 1), 11, 11.3, 11.3, None, 45.4, 484, PCIE3_X16),
    Card("V100", (7, 0), 16, 15.7, 125, None, 62.8, 900, PCIE3_X16),
    Card("T4", (7, 5), 15, 8.1, 65, None, 130, 320, PCIE3_X16),
    Card("RTX 2080 Ti", (7, 5), 11, 13.4, 53.8, None, 215, 616, PCIE3_X16),
    Card("A100", (8, 0), 40, 19.5, 312, 312, 624, 1555, PCIE4_X16),
    Card("RTX 3060", (8, 6), 12, 12.7, 25.5, 25.5, 102, 360, PCIE4_X16),
    Card("RTX 3090", (8, 6), 24, 35.6, 71, 71, 284, 936, PCIE4_X16),
    Card("RTX 4060", (8, 9), 8, 15.1, 30.2, 30.2, 121, 272, PCIE4_X8),
    Card("RTX 4080", (8, 9), 16, 48.7, 97.5, 97.5, 390, 717, PCIE4_X16),
    Card("RTX 4090", (8, 9), 24, 82.6, 165.2, 165.2, 660.6, 1008, PCIE4_X16),
    Card("H100", (9, 0), 80, 66.9, 989, 989, 1979, 3350, PCIE5_X16),
    Card("H200", (9, 0), 141, 66.9, 989, 989, 1979, 4800, PCIE5_X16),
)


@dataclass(frozen=True)
class CardMatch:
    card: Card
    assumption: str
    """Empty for the card itself; otherwise what stands in for it, in words."""


def find_card(name: str, capability: tuple[int, int], memory_gb: float | None = None) -> CardMatch:
    """The known card called `name`, else a stand-in of the same capability, else of the nearest older one.

    `name` is as the driver gives it ("NVIDIA GeForce RTX 4090", "Tesla V100-SXM2-16GB"). Among cards of one capability
    the stand-in is the one with the nearest memory, or the slowest where `memory_gb` is not given. Capabilities below
    the table's oldest get the oldest card.
    """
    card = called(name)
    if card is not None:
        return CardMatch(card, "")
    older = [card.capability for card in CARDS if card.capability <= capability]
    nearest = max(older, default=CARDS[0].capability)
    same = [card for card in CARDS if card.capability == nearest]
    if memory_gb is None:
        stand_in = min(same, key=lambda card: card.memory_gbps)
    else:
        stand_in = min(same, key=lambda card: abs(card.memory_gb - memory_gb))
    return CardMatch(stand_in, f"no rates known for {name or 'this card'}: those of {stand_in.name} are assumed")


def called(name: str) -> Card | None:
    """The known card that a driver's name means, or a person's short one, such as "4090"."""
    short = name.strip().upper()
    for card in CARDS:
        if _is_called(card.name, name) or short == card.name.removeprefix("RTX ").removeprefix("GTX ").upper():
            return card
    return None


def _is_called(card: str, name: str) -> bool:
    """Whether a driver's name means this card and not a relative (Ti, SUPER, Laptop, another number)."""
    pattern = rf"\b{re.escape(card)}\b(?!\s*(Ti|SUPER|D\b|Laptop|Mobile|with Max-Q|G\b))"
    return re.search(pattern, name, re.IGNORECASE) is not None

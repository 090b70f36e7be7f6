"""docs/several-gpus.md: what two cards take beside one of them."""

from __future__ import annotations

from dataclasses import replace

from .measured import Measured, card, measured, size
from .page import Column, Page, Records, digits, prose, table

ALONE, TOGETHER = "engine_one_card_h200", "engine_devices_h200"


def several(records: Records) -> str:
    """Guidance on two cards: each row beside the same on one of them."""
    found = measured(records, ALONE, TOGETHER)
    rows = [one for one in found.values() if one.row.devices]

    def alone(one: Measured) -> Measured:
        return next(other for other in found.values() if other.row == replace(one.row, devices=""))

    columns: dict[str, Column] = {
        "": lambda one: one.words,
        "one card, s": lambda one: digits(alone(one).seconds),
        "two cards, s": lambda one: digits(one.seconds),
        "of one": lambda one: f"{one.seconds / alone(one).seconds:.2f}",
        "planned, s": lambda one: digits(one.figures["predicted"]["seconds"]),
    }
    record = records[TOGETHER]
    said = prose(
        f"On two {card(record)}s of one host, commit {record['commit']}, random weights of the published shape, a "
        f"picture of {size(record)}, {record['settings']['num_timesteps']} timesteps; latents and velocities go "
        "straight from card to card."
    )
    return f"{said}\n\n{table(columns, rows)}"


SEVERAL = Page("docs/several-gpus.md", {"measured": several})

"""docs/several-gpus.md: what two cards take beside one of them."""

from __future__ import annotations

from dataclasses import replace

from .measured import Measured, card, measured, size
from .page import Column, Page, Records, digits, prose, table

ALONE, TOGETHER = "engine_one_card_h200", "engine_devices_h200"


def several(records: Records) -> str:
    """Guidance on two cards: each row beside the same on one of them."""
    found = measured(records, TOGETHER, ALONE)
    rows = [one for one in found.values() if one.row.devices and "seconds" in one.figures]

    def alone(one: Measured) -> Measured:
        usual = replace(one.row, devices="", divide="auto", launcher="", without="", offload="native")
        return next(other for other in found.values() if other.row == usual)

    columns: dict[str, Column] = {
        "": words,
        "one card, s": lambda one: digits(alone(one).seconds),
        "two cards, s": lambda one: digits(one.seconds),
        "of one": lambda one: f"{one.seconds / alone(one).seconds:.2f}",
        "planned, s": lambda one: digits(one.figures["predicted"]["seconds"]),
    }
    record = records[TOGETHER]
    said = prose(
        f"On two {card(record)}s of one host, commit {record['commit']}, random weights of the published shape, a "
        f"picture of {size(record)}, {record['settings']['num_timesteps']} timesteps; what crosses goes straight from "
        "card to card where nothing else is said."
    )
    return f"{said}\n\n{table(columns, rows)}"


def words(one: Measured) -> str:
    """A row's, and what of several cards is not as usual there."""
    unusual = {
        "layers divided": one.row.divide == "layers" and one.row.offload == "native",
        "layers divided by accelerate": one.row.divide == "layers" and one.row.offload != "native",
        "through the host": bool(one.row.without),
        "a thread a card": one.row.launcher == "thread",
        "answer": one.row.task == "ask",
    }
    return ", ".join([one.words, *(said for said, holds in unusual.items() if holds)])


SEVERAL = Page("docs/several-gpus.md", {"measured": several})

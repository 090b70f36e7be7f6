"""docs/several-gpus.md: what two cards take beside one of them."""

from __future__ import annotations

from dataclasses import replace

from .measured import Measured, card, measured, size
from .page import Column, Page, Records, digits, prose, table

TOGETHER = "engine_devices_h200"


def several(records: Records) -> str:
    """Guidance on two cards: each row beside the same on one of them."""
    found = measured(records, TOGETHER)
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
        "commit": lambda one: records[one.run]["commit"],
    }
    record = records[TOGETHER]
    said = prose(
        f"On two {card(record)}s of one host, random weights of the published shape, a "
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


def launching(records: Records) -> str:
    """What launching one evaluation costs the host, by one thread and by two at once."""
    record = records["launches_h200"]
    (found,) = record["results"]
    host = {name: one["host"] * 1e3 for name, one in found["seconds"].items()}
    busy = found["seconds"]["alone"]["done"] * 1e3
    graph = found["graph"]
    return prose(
        f"On one {card(record)} (commit {record['commit']}; the host's other cores were busy) the {found['launches']} "
        f"launches of an INT8 evaluation of a {found['size']}x{found['size']} picture take the host "
        f"{host['alone']:.0f} ms, and the card needs {busy:.0f} ms for them. Two threads that launch one each at the "
        f"same time take {host['both by two threads']:.0f} ms, one thread that launches both "
        f"{host['both by one thread']:.0f} ms: they hand Python's lock to and fro. So the request's thread launches "
        f"for every card. As a CUDA graph it is {graph['host'] * 1e3:.1f} ms and {graph['bytes'] / 1e6:.0f} MB more, "
        "with the same bits: so passes are replayed where the host would be the bound, which it is where cards share "
        "a picture in INT8, and where one draws small ones."
    )


SEVERAL = Page("docs/several-gpus.md", {"measured": several, "launches": launching})

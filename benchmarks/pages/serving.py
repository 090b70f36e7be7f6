"""docs/serving.md: what the server costs beside its pipeline, and what kept contexts save."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

from .measured import FORMATS, card
from .page import Column, Page, Records, digits, prose, table

COSTS = ("serving_int8_h200", "serving_int8_clients_h200", "serving_h200")


def cost(records: Records) -> str:
    found = [row | {"commit": records[name]["commit"]} for name in COSTS for row in records[name]["results"]]
    record = records[COSTS[0]]
    settings = record["settings"]
    numbers = sorted({int(number) for row in found for number in row.get("clients", {})})
    columns: dict[str, Column] = {
        "": lambda row: FORMATS[row["row"]],
        "commit": lambda row: row["commit"],
        "by the pipeline, s": lambda row: digits(median(row["pipeline_seconds"])),
        "through the API, s": lambda row: digits(median(row["api_seconds"])),
        "more": lambda row: f"{row['api_share']:.1%}",
        "drawn, ms": lambda row: _milliseconds(row, "drawing"),
        "encoded, ms": lambda row: _milliseconds(row, "encoding"),
    }
    columns |= {f"a minute, clients: {number}": partial(_rate, number) for number in numbers}
    conditions = prose(
        f"On one {card(record)}, random weights, {settings['size']}x{settings['size']}, {settings['num_timesteps']} "
        "timesteps. The pictures of random weights are noise, the most that a PNG can have to write."
    )
    return f"{conditions}\n\n{table(columns, found)}"


def _milliseconds(row: Mapping[str, Any], piece: str) -> str:
    return f"{row['api_pieces'][piece] * 1e3:.0f}"


def _rate(number: int, row: Mapping[str, Any]) -> str:
    of = row.get("clients", {}).get(str(number))
    return "" if of is None else f"{of['pictures_a_minute']:.2f}"


def contexts(records: Records) -> str:
    record = records["contexts_h200"]
    size, (found,) = record["settings"]["size"], record["results"]
    pieces = found["pieces"]
    took = {name: f"{seconds * 1e3:.0f}" for name, seconds in found["seconds"].items()}
    return prose(
        f"On one {card(record)} in {found['row']}, of a picture of {size}x{size}: the first question's first token is "
        f"there after {took['first']} ms, a second one's after {took['second']} ({found['second_over_first']:.2f} of "
        f"it), the same answer to the bit; an edit's contexts take {took['edit']} ms, and {took['edit_again']} when it "
        f"is made again. Of the second question, in ms: the picture's hash {pieces['hash'] * 1e3:.1f}, one pass of "
        f"question and start mark {pieces['ask'] * 1e3:.1f}."
    )


def page(records: Records) -> str:
    record = records["serving_page_cpu"]
    found = record["results"]
    took = {name: median(start[name] for start in found["starts"]) for name in found["starts"][0]}
    (few, before), (many, after) = found["rss_bytes"][0], found["rss_bytes"][-1]
    return prose(
        f"On {record['hardware']['cores']} cores of a processor, the demo checkpoint: the command "
        f"listens after {took['listening']:.1f} s, its page is there after {took['page']:.1f} and its model after "
        f"{took['ready']:.1f}. The process holds {before / 1e6:.0f} MB after {few} answers "
        f"and {after / 1e6:.0f} after {many}. A picture's last preview differs from the picture by "
        f"{found['previews']['error']:.1f} of 255."
    )


SERVING = Page("docs/serving.md", {"cost": cost, "contexts": contexts, "page": page})

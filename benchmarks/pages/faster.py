"""docs/faster-pictures.md: what step caches save and what they change, and what the search for schedules found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_bagel.sampling.step_caches.speeds import DEFAULT_STEPS, SPEEDS
from lowmem_bagel.sampling.step_caches.velocity import PATTERNS

from ..demo.schedules import FAMILIES, PLAIN, Schedule
from ..record import commits
from ..words import STEP_CACHES
from .fidelity import STEP_CACHES as QUALITY
from .measured import FORMATS, card, size
from .page import Column, Page, Records, digits, prose, table

RUN = "report_h200"
SEARCHES: Mapping[str, str] = dict.fromkeys(("drawings", "edits"), "schedules_h200")
"""The record of each task's search."""


def title(cache: str) -> str:
    """A step cache as the page names it: by its speed, where it stands for one."""
    return STEP_CACHES.get(cache, cache) + "".join(f" ({words})" for words in _speeds(cache))


def _speeds(cache: str) -> Iterator[str]:
    """What it is the speed of."""
    for speed in SPEEDS.values():
        tasks = [task for task, name in (("drawings", speed.drawing), ("edits", speed.editing)) if name == cache]
        if tasks and cache != "none":
            yield f"`{speed.name}`" + (f" for {tasks[0]}" if len(tasks) == 1 else "")


def seconds(records: Records) -> str:
    record = records[RUN]
    rows = [row for row in record["results"]["rows"] if _is_shown(row)]
    columns: dict[str, Column] = {
        "": _what,
        "step cache": lambda row: title(row["step_cache"]),
        "evaluations": lambda row: str(row.get("evaluations_computed") or "all"),
        "s": lambda row: digits(row["seconds"]["median"]),
        "planned, s": lambda row: digits(row["predicted"]["seconds"]),
        "allocated, GB": lambda row: f"{row['bytes']['allocated'] / 1e9:.1f}",
        "joules": lambda row: f"{row['energy_joules']:.0f}",
    }
    commit = commits(record["commit"], (row.get("commit", "") for row in rows))
    conditions = prose(
        f"One {card(record)}, commit {commit}, random weights of the 7B shape, {size(record)}, "
        f"{record['settings']['num_timesteps']} timesteps, the default guidance."
    )
    return f"{conditions}\n\n{table(columns, rows)}"


def _is_shown(row: Mapping[str, Any]) -> bool:
    """Pictures by our kernels, with step caches, and without them on the same terms."""
    if row["state"] != "measured" or row["task"] == "ask" or row["lora"]:
        return False
    if (row["backend"], row["offload"], row["dtype"]) != ("auto", "native", "auto"):
        return False
    return bool(row["step_cache"] != "none" or not row["limit_gb"] or row["row"] == "dfloat11:8:generate")


def _what(row: Mapping[str, Any]) -> str:
    limit = f" under {row['limit_gb']:g} GB" if row["limit_gb"] else ""
    return FORMATS[row["format"]] + limit + (", edit" if row["task"] == "edit" else "")


def quality(records: Records) -> str:
    found = [
        (name, row) for record in QUALITY for name, row in records[record]["results"].items() if name != "source"
    ]  # fmt: skip
    source = records[QUALITY[0]]["results"]["source"]
    columns: dict[str, Column] = {
        "step cache": lambda row: title(row[0]),
        "drawings right": lambda row: _right(row[1], "drawings"),
        "edits right": lambda row: _right(row[1], "edits"),
        "drawings' distance": lambda row: _distance(row[1], "drawings"),
        "edits' distance": lambda row: _distance(row[1], "edits"),
    }
    return table(columns, [("none", source), *found])


def _right(row: Mapping[str, Any], task: str) -> str:
    return "{right} of {total}".format(**row["tasks"][task]) if task in row["tasks"] else ""


def _distance(row: Mapping[str, Any], task: str) -> str:
    return digits(row["tasks"][task]["median_distance"]) if task in row["tasks"] else ""


@dataclass(frozen=True)
class Found:
    """A schedule of the search: evaluations, those of them that went through all layers, and median and worst distance
    on the half of the scenes that chose and on the other."""

    family: str
    words: str
    evaluations: float
    whole: float
    chosen: tuple[float, float]
    reported: tuple[float, float]


def all_found(record: Mapping[str, Any], task: str) -> list[Found]:
    return [
        Found(family, words, evaluations, whole, (a, b), (c, d))
        for family, rows in record["results"][task].items()
        for words, evaluations, whole, a, b, c, d in rows
    ]


FEW = {"drawings": 26, "edits": 42}
"""Evaluations up to which families are compared."""
MOST = {"balanced": {"drawings": 31, "edits": 51}, "fast": {"drawings": 24, "edits": 39}}
"""Evaluations that a speed may take."""


def patterns(record: Mapping[str, Any], task: str) -> list[Found]:
    """What a step cache can be."""
    return [found for found in all_found(record, task) if found.family == PLAIN]


def preset(record: Mapping[str, Any], speed: str, task: str) -> Found:
    """What one half of the scenes chooses for a speed: of few enough evaluations that whose worst scene is nearest.
    What changes a scene draws most of the others well, so that the median tells nothing of it."""
    found = sorted(patterns(record, task), key=lambda f: f.evaluations)
    few = [f for f in found if f.evaluations <= MOST[speed][task]] or found[:1]
    return min(few, key=lambda f: f.chosen[::-1])


def taken(record: Mapping[str, Any], speed: str, task: str) -> Found:
    """The step cache that the speed stands for."""
    pattern = PATTERNS[SPEEDS[speed].step_cache(DEFAULT_STEPS, task == "edits")]
    words = str(Schedule(pattern.first, pattern.intervals))
    return next(f for f in patterns(record, task) if f.words == words)


def searched(records: Records) -> str:
    many = []
    for task, name in SEARCHES.items():
        record = records[name]
        where = f"one {card(record)}" if "gpu" in record["hardware"] else "a processor"
        many.append(
            f"{len(all_found(record, task))} schedules of {task} on {record['settings']['scenes']} held-out scenes "
            f"({where}, commit {record['commit']})"
        )
    return prose(
        f"{' and '.join(many)}: one half of the scenes chose, the other half's distances are shown too. Distances are "
        "from the picture of which every evaluation is computed, the mean over its pixels in levels of 255: the median "
        "scene's, and the worst one's."
    )


def presets(records: Records) -> str:
    """What the one half chose, and what a speed stands for where that is another."""
    rows: list[tuple[str, Found]] = []
    for speed, task in itertools.product(MOST, SEARCHES):
        record = records[SEARCHES[task]]
        found, used = preset(record, speed, task), taken(record, speed, task)
        rows.append((f"`{speed}`, {task}: chosen" + (" and taken" if found == used else ""), found))
        if found != used:
            rows.append((f"`{speed}`, {task}: taken", used))
    columns: dict[str, Column] = {
        "": lambda row: row[0],
        "evaluations": lambda row: f"{row[1].evaluations:.0f}",
        **_computed_and_distances(lambda row: row[1]),
    }
    return table(columns, rows)


def _computed_and_distances(found: Callable[[Any], Found]) -> dict[str, Column]:
    return {
        "computed": lambda row: found(row).words,
        "median": lambda row: digits(found(row).chosen[0]),
        "worst": lambda row: digits(found(row).chosen[1]),
        "median, other half": lambda row: digits(found(row).reported[0]),
        "worst, other half": lambda row: digits(found(row).reported[1]),
    }


def frontier(records: Records) -> str:
    """Of both tasks, what nothing beats."""
    found = ((task, _frontier(records[name], task)) for task, name in SEARCHES.items())
    return "\n\n".join(f"{task.capitalize()}:\n\n{rows}" for task, rows in found)


def _frontier(record: Mapping[str, Any], task: str) -> str:
    columns: dict[str, Column] = {
        "evaluations": lambda f: f"{f.evaluations:.0f}", **_computed_and_distances(lambda f: f)
    }  # fmt: skip
    best: list[Found] = []
    for one in sorted(all_found(record, task), key=lambda f: (f.evaluations, f.chosen)):
        if one.chosen[0] < min((f.chosen[0] for f in best), default=2.0):
            best.append(one)
    return table(columns, best)


def families(records: Records) -> str:
    """The best of each family within the evaluations of `FEW`."""
    columns: dict[str, Column] = {"": str}
    found = {task: all_found(records[name], task) for task, name in SEARCHES.items()}
    for task, rows in found.items():
        columns[f"{task}, at most {FEW[task]} evaluations"] = _best(rows, FEW[task])
    there = {one.family for rows in found.values() for one in rows}
    names = [name for name in FAMILIES if name in there]
    return table(columns, [*names, *([WHOLE] if DUAL in there else [])])


DUAL = "DBCache"
WHOLE = "DBCache, first and last layers not counted"


def _best(found: Sequence[Found], most: int) -> Column:
    def best(family: str) -> str:
        if family == WHOLE:
            few = [f for f in found if f.family == DUAL and f.whole <= most]
        else:
            few = [f for f in found if f.family == family and f.evaluations <= most]
        if not few:
            return ""
        least = min(few, key=lambda f: f.chosen)
        count = least.whole if family == WHOLE else least.evaluations
        return f"{digits(least.chosen[0])} ({digits(least.reported[0])}) with {count:.0f}"

    return best


FASTER = Page(
    "docs/faster-pictures.md",
    {
        "seconds": seconds,
        "quality": quality,
        "searched": searched,
        "presets": presets,
        "frontier": frontier,
        "families": families,
    },
)

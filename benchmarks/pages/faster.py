"""docs/faster-pictures.md: what step caches save and what they change, and what the search for schedules found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_bagel.sampling.step_caches.speeds import SPEEDS

from ..words import STEP_CACHES
from .fidelity import STEP_CACHES as QUALITY
from .measured import FORMATS, card, size
from .page import Column, Page, Records, digits, prose, table

RUN, SEARCH = "report_h200", "schedules_h200"
FEW = {"drawings": 26}
"""Evaluations up to which families are compared."""


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
    conditions = prose(
        f"One {card(record)}, commit {record['commit']}, random weights of the 7B shape, {size(record)}, "
        f"{record['settings']['num_timesteps']} timesteps, the default guidance."
    )
    return f"{conditions}\n\n{table(columns, rows)}"


def _is_shown(row: Mapping[str, Any]) -> bool:
    """Pictures by our kernels, with step caches, and without them on the same terms."""
    if row["state"] != "measured" or row["task"] == "ask" or row["dtype"] != "auto":
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
    return "{right} of {total}".format(**row["tasks"][task])


def _distance(row: Mapping[str, Any], task: str) -> str:
    return digits(row["tasks"][task]["median_distance"])


@dataclass(frozen=True)
class Found:
    """A schedule of the search: its fields by name, evaluations, and median and worst distance on both halves."""

    fields: Mapping[str, Any]
    evaluations: int
    chosen: tuple[float, float]
    reported: tuple[float, float]

    @property
    def words(self) -> str:
        f = self.fields
        pattern = ", then ".join(f"one in {every} from {start}" for start, every in f["intervals"])
        more = [f"{f['first']} at first", pattern, "the last"][: 3 if f["last"] else 2]
        order = {0: "repeated", 1: "a line", 2: "a parabola", 3: "a cubic"}.get(f["order"], f"order {f['order']}")
        return f"{', '.join(more)}; {order} in {f['over']}"


FIELDS = ("first", "intervals", "last", "order", "over", "rarer", "rarer_order", "ends")
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "a line in u": {"order": 1, "over": "u"},
    "a line in t": {"order": 1, "over": "t"},
    "a parabola in u": {"order": 2, "over": "u"},
    "a parabola in t": {"order": 2, "over": "t"},
    "a cubic in u": {"order": 3},
    "the last velocity again": {"order": 0},
    "guidance's difference repeated": {"rarer": (2, 3), "rarer_order": 0},
    "guidance's difference on a line": {"rarer": (2, 3), "rarer_order": 1},
    "guidance ended early": {"ends": (0.5, 0.6, 0.7)},
}
"""By name, what is other than in the first family."""


def all_found(record: Mapping[str, Any], task: str) -> list[Found]:
    rows = record["results"][task]["all"]
    return [
        Found(dict(zip(FIELDS, fields, strict=True)), count, (a, b), (c, d)) for fields, count, a, b, c, d in rows
    ]  # fmt: skip


def searched(records: Records) -> str:
    record = records[SEARCH]
    settings, results = record["settings"], record["results"]
    many = " and ".join(f"{results[task]['schedules'] - 1} schedules of {task}" for task in FEW)
    return prose(
        f"{many}, on {settings['scenes']} held-out scenes each, commit {record['commit']}: one half of the scenes "
        "chose, the other half's distances are shown too. Distances are from the picture of which every evaluation is "
        "computed, the mean over its pixels in levels of 255: the median scene's, and the worst one's."
    )


def frontier(records: Records) -> str:
    """Of both tasks, what nothing beats."""
    return "\n\n".join(f"{task.capitalize()}:\n\n{_frontier(records[SEARCH], task)}" for task in FEW)


def _frontier(record: Mapping[str, Any], task: str) -> str:
    columns: dict[str, Column] = {
        "evaluations": lambda f: str(f.evaluations),
        "computed": lambda f: f.words,
        "median": lambda f: digits(f.chosen[0]),
        "worst": lambda f: digits(f.chosen[1]),
        "median, other half": lambda f: digits(f.reported[0]),
        "worst, other half": lambda f: digits(f.reported[1]),
    }
    best: list[Found] = []
    for one in sorted(all_found(record, task), key=lambda f: (f.evaluations, f.chosen)):
        if one.chosen[0] < min((f.chosen[0] for f in best), default=2.0):
            best.append(one)
    return table(columns, best)


def families(records: Records) -> str:
    """The best of each family within the evaluations of `FEW`."""
    found = {task: all_found(records[SEARCH], task) for task in FEW}
    columns: dict[str, Column] = {"": str}
    for task, most in FEW.items():
        columns[f"{task}, at most {most} evaluations"] = _column(found[task], most)
    return table(columns, list(FAMILIES))


def _column(found: Sequence[Found], most: int) -> Column:
    def best(family: str) -> str:
        few = [f for f in _of_family(found, FAMILIES[family]) if f.evaluations <= most]
        if not few:
            return ""
        least = min(few, key=lambda f: f.chosen)
        return f"{digits(least.chosen[0])} with {least.evaluations}"

    return best


def _of_family(found: Iterable[Found], wanted: Mapping[str, Any]) -> Iterator[Found]:
    plain = {"order": 1, "over": "u", "rarer": 1, "rarer_order": 0, "ends": 0.0, **wanted}
    for one in found:
        if all(one.fields[name] in (value if isinstance(value, tuple) else (value,)) for name, value in plain.items()):
            yield one


FASTER = Page(
    "docs/faster-pictures.md",
    {"seconds": seconds, "quality": quality, "searched": searched, "frontier": frontier, "families": families},
)

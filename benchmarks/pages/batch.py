"""docs/batch.md: what batches come to that are killed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .page import Column, Page, Records, prose, table

DISTURBED = {
    "killed": "the process, {kills} times at random moments",
    "processes": "one of two worker processes, in the midst of a job",
    "ray": "one of two actors on a local Ray, in the midst of a job",
}


def kills(records: Records) -> str:
    record = records["batch_cpu"]
    found = record["results"]
    usual = found["undisturbed"]
    columns: dict[str, Column] = {
        "killed": lambda row: row["what"],
        "results": lambda row: f"{row['results']}",
        "each job once": lambda row: "yes" if row["each_once"] else "no",
        "pictures": lambda row: f"{row['pictures']}",
        "pictures and results that differ": lambda row: f"{row['different']}",
    }
    times = len(found["killed"]["kills"])
    rows = [{"what": words.format(kills=times), **found[name]} for name, words in DISTURBED.items() if name in found]
    return f"{_conditions(record, usual)}\n\n{table(columns, rows)}\n\n{_left(found['killed']['kills'])}"


def _conditions(record: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    cores, jobs = record["hardware"]["cores"], record["settings"]["jobs"]
    return prose(
        f"On {cores} cores of a processor, commit {record['commit']}: {jobs} jobs on the embedded model, of which "
        f"{usual['failed']} lines are wrong (malformed, or a picture is missing). Beside a run that nothing disturbs, "
        "byte for byte but for the seconds:"
    )


def _left(seen: list[Mapping[str, Any]]) -> str:
    def sum_of(name: str) -> int:
        return sum(kill[name] for kill in seen)

    after = [kill["after_seconds"] for kill in seen]
    return prose(
        f"The process had been at work for {min(after):.1f} to {max(after):.1f} seconds when it was killed. What it "
        f"left, over all kills: {sum_of('torn_lines')} torn lines, {sum_of('unfinished_files')} unfinished files, "
        f"{sum_of('pictures_without_a_result')} pictures without a result."
    )


BATCH = Page("docs/batch.md", {"kills": kills})

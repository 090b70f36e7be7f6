"""docs/conversion.md: how quickly checkpoints are converted, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .page import Column, Page, Records, again, prose, table

Row = Mapping[str, Any]
NOW, BEFORE = "conversion_two_cores", "conversion_bagel-7b"
STAGES = (
    "read", "source hash", "encode and errors", "stored hash", "write", "sync", "read back", "file hash",
)  # fmt: skip


def _gigabytes(records: Records, name: str) -> float:
    return float(records[name]["settings"]["source_bytes"]) / 1e9


def _processor(records: Records, name: str, row: Row) -> float:
    """Seconds of a processor that a GB of source costs."""
    return float(row["processor_seconds"]) / _gigabytes(records, name)


def conditions(records: Records) -> str:
    record, before = records[NOW], records[BEFORE]
    hardware, settings = record["hardware"], record["settings"]
    loads = [row["load_before"] for row in record["results"]]
    old = [row["load_before"] for row in before["results"]]
    return prose(
        f"Measured on {hardware['cores']} cores of {hardware['cpu']} (a load of {min(loads):.0f} to {max(loads):.0f} "
        f"as they began, of the runs before them): {_gigabytes(records, NOW):.1f} GB of random bf16 weights, "
        f"{settings['layers']} decoder layers of the 7B shape, each conversion in a process of its own, the quickest "
        f"of {settings['repeat']}, commit {record['commit']}. What the processor's time allows is what a conversion "
        f"would reach if no core ever waited. *Before* is the record of commit {before['commit']}, on "
        f"{before['hardware']['cores']} cores of {before['hardware']['cpu']} at a load of {min(old):.0f} to "
        f"{max(old):.0f}, all layers.",
    )


def rates(records: Records) -> str:
    cores = records[NOW]["hardware"]["cores"]
    before = {row["case"]: row for row in records[BEFORE]["results"]}

    def old(cell: Column) -> Column:
        return lambda row: cell(before[row["case"]]) if row["case"] in before else ""

    columns: dict[str, Column] = {
        "": lambda row: str(row["case"]),
        "MB/s of source": lambda row: f"{row['source_megabytes_per_second']}",
        "processor s/GB": lambda row: f"{_processor(records, NOW, row):.2f}",
        "MB/s by the processor's time": lambda row: f"{1000 * cores / _processor(records, NOW, row):.0f}",
        "peak memory, GB": lambda row: f"{row['peak_anonymous_bytes'] / 1e9:.2f}",
        "before: MB/s": old(lambda row: f"{row['source_megabytes_per_second']}"),
        "processor s/GB ": old(lambda row: f"{_processor(records, BEFORE, row):.2f}"),
    }
    return table(columns, records[NOW]["results"])


def stages(records: Records) -> str:
    def seconds(stage: str) -> Column:
        return lambda row: f"{row['phases'].get(stage, 0):.1f}"

    columns: dict[str, Column] = {"seconds": lambda row: str(row["case"])}
    columns["in all"] = lambda row: f"{row['seconds']:.1f}"
    columns |= {stage: seconds(stage) for stage in STAGES}
    return table(columns, records[NOW]["results"])


def bounds(records: Records) -> str:
    found, cores = records[NOW]["settings"]["bounds_megabytes_per_second"], records[NOW]["hardware"]["cores"]
    encoding = ", ".join(f"{name} {found[name]}" for name in ("dfloat11", "int8", "nf4", "fp16"))
    return prose(
        f"Alone, one core hashes {found['sha256']} MB/s by SHA-256; the disk takes "
        f"{found['write']} MB/s with its sync and gives {found['read']} MB/s; {cores} cores encode, in MB/s of source: "
        f"{encoding} (DFloat11 with its decoding and comparison). What a conversion would reach that only hashed "
        "on all cores, or only moved its bytes from and to such a disk one after the other:",
    )


def only(records: Records) -> str:
    found, cores = records[NOW]["settings"]["bounds_megabytes_per_second"], records[NOW]["hardware"]["cores"]

    def written(row: Row) -> float:
        return float(row["bytes"]) / 1e9 / _gigabytes(records, NOW)

    columns: dict[str, Column] = {
        "": lambda row: str(row["case"]),
        "bytes hashed a byte of source": lambda row: f"{1 + 2 * written(row):.2f}",
        "only hashing, MB/s": lambda row: f"{cores * found['sha256'] / (1 + 2 * written(row)):.0f}",
        "bytes moved": lambda row: f"{1 + 2 * written(row):.2f}",
        "only the disk, MB/s": lambda row: (
            f"{1 / ((1 + written(row)) / found['read'] + written(row) / found['write']):.0f}"
        ),
        "reached, MB/s": lambda row: f"{row['source_megabytes_per_second']}",
    }
    return table(columns, records[NOW]["results"])


def commands(records: Records) -> str:
    return again(records, {NOW: "conversion WORK"})


CONVERSION = Page("docs/conversion.md", {
    "conditions": conditions,
    "rates": rates,
    "stages": stages,
    "bounds": bounds,
    "only": only,
    "commands": commands,
})  # fmt: skip

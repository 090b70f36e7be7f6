"""`report.json`: written after each row, gone on with by the same command, and two put together. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_bagel.errors import OutputError, SettingError
from lowmem_bagel.files import expanded, parse_json, read_file

from ..merging import must_be_alike, save_merged
from ..record import command, save

NAME = "report.json"
BENCHMARK = "report"
DONE = ("measured", "out of memory", "not here")
"""States of rows that are not measured again; what failed otherwise may do better."""
MACHINE = ("hardware", "versions", "commit", "settings", "switched_off")
"""What figures depend on, beside the row and its model."""
PARTS = ("fidelity", "startup")

Record = dict[str, Any]


def folder_for(out: Path, option: str = "--out") -> Path:
    """The folder that an option names for what is written, such as a report, made and tried.

    Raises:
        OutputError: it cannot be made, or written to.
    """
    out = expanded(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        trial = out / f".{NAME}.trial"
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to {out} ({error.strerror}); choose another folder with {option}") from error
    return out


def read(path: Path) -> Record:
    """A record of `bench report`; `path` is its folder, or the file.

    Raises:
        SettingError: it is missing, broken, or another benchmark's.
    """
    path = expanded(path)
    path = path / NAME if path.is_dir() else path
    try:
        record = parse_json(read_file(path, 256 << 20))
    except OSError as error:
        raise SettingError(f"{path}: cannot be read ({error.strerror}); name a report's folder") from error
    except ValueError as error:
        raise SettingError(f"{path}: is broken ({error}); delete it, and it is measured anew") from error
    known = isinstance(record, dict) and record.get("benchmark") == BENCHMARK
    if not known or not isinstance(record.get("results"), dict) or not _has_rows(record["results"]):
        raise SettingError(f"{path}: is no record of bench report; choose another folder with --out")
    return dict(record)


def recorded(place: Path) -> Record | None:
    """What an earlier run left in the folder, to be gone on with; raises as `read` does."""
    return read(place / NAME) if (place / NAME).exists() else None


def _has_rows(results: Mapping[str, Any]) -> bool:
    rows = results.get("rows")
    return isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("row"), str) and isinstance(row.get("state"), str) for row in rows
    )


class Store:
    """A report as it grows.

    Args:
        place: the folder.
        head: MACHINE of this run, beside which figures of another machine, version, commit or setting do not stand.
        machine: its profile, as the planner has it.
        before: what was there.

    Attributes:
        notes: what of a record that was there is not gone on with, and why.
    """

    def __init__(
        self, place: Path, head: Mapping[str, Any], machine: Mapping[str, Any], models: Record, before: Record | None
    ) -> None:
        self.path, self.head = place / NAME, {"benchmark": BENCHMARK, "command": command(), **head}
        self.results: Record = {"rows": [], "fidelity": None, "startup": None, "machine": machine, "models": models}
        self.notes: list[str] = []
        if before is not None:
            self._go_on(before)

    def _go_on(self, before: Record) -> None:
        changed = [name for name in MACHINE if before.get(name) != self.head.get(name)]
        rows = before["results"]["rows"]
        if changed:
            self.notes.append(f"{len(rows)} rows are of another {' and '.join(changed)}: they are measured anew")
            return
        models, known = self.results["models"], before["results"].get("models") or {}
        other = sorted(name for name in models if name in known and known[name] != models[name])
        if other:
            self.notes.append(f"{', '.join(other)} changed since: its rows are measured anew")
        again = [row["row"] for row in rows if row["state"] not in DONE]
        if again:
            self.notes.append(f"{len(again)} rows that failed are tried again: {', '.join(again)}")
        self.results["rows"] = [r for r in rows if r["state"] in DONE and r.get("format") not in other]
        self.results["models"] = {**known, **models}
        for part in PARTS:
            self.results[part] = None if other else before["results"].get(part)

    def has(self, row: str) -> bool:
        return any(known["row"] == row for known in self.results["rows"])

    def add(self, row: Record, order: Sequence[str]) -> None:
        """Keep a row, in the place that `order` has for it, and write the record."""
        place = {name: index for index, name in enumerate(order)}
        self.results["rows"].append(row)
        self.results["rows"].sort(key=lambda known: place.get(known["row"], len(place)))
        self.write()

    def write(self) -> None:
        save(self.path, self.head, self.results)


def merged(paths: Sequence[Path], out: Path) -> Path:
    """Put reports of one machine and settings together, and the pictures that they name; gives the record.

    A row that several have is the last's that measured it. Rows of another commit than the first report's say so.

    Raises:
        SettingError: fewer than two, one is broken, or they are of different cards, versions or settings.
    """
    if len(paths) < 2:
        raise SettingError("nothing to merge; name the folders of two reports")
    records = [read(path) for path in paths]
    first = records[0]
    must_be_alike(paths, records, lambda record: {n: record.get(n) for n in MACHINE if n != "commit"})
    results = {**first["results"], "rows": _rows(records), "models": _models(paths, records)}
    for part in PARTS:
        results[part] = _part([record["results"].get(part) for record in records])
    place = folder_for(out)
    _copy_pictures(paths, results["fidelity"], place)
    save_merged(place / NAME, records, first["settings"], results)
    return place / NAME


def _rows(records: Sequence[Record]) -> list[Record]:
    found: dict[str, Record] = {}
    for record in records:
        other = {"commit": record["commit"]} if record["commit"] != records[0]["commit"] else {}
        for one in record["results"]["rows"]:
            row = other | one
            if row["row"] not in found or row["state"] == "measured":
                found[row["row"]] = row
    return list(found.values())


def _models(paths: Sequence[Path], records: Sequence[Record]) -> Record:
    found: Record = {}
    for path, record in zip(paths, records, strict=True):
        for name, model in (record["results"].get("models") or {}).items():
            if found.setdefault(name, model) != model:
                raise SettingError(f"{path} measured another {name} than {paths[0]}; reports that differ stay apart")
    return found


def _part(parts: Sequence[Record | None]) -> Record | None:
    """Fidelity, or start-up: the first's, with what its lists lack from the others."""
    there = [part for part in parts if part]
    if not there:
        return None
    found = {name: list(value) if isinstance(value, list) else value for name, value in there[0].items()}
    for part in there[1:]:
        for name, value in part.items():
            if isinstance(value, list):
                known = [_identity(item) for item in found.setdefault(name, [])]
                found[name] += [item for item in value if _identity(item) not in known]
    return found


def _identity(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    return tuple((name, item[name]) for name in ("kind", "name", "format", "limit_gb") if name in item)


def _copy_pictures(paths: Sequence[Path], fidelity: Record | None, place: Path) -> None:
    for name in _pictures(fidelity):
        for path in paths:
            folder = path if path.is_dir() else path.parent
            if (folder / name).is_file() and folder.resolve() != place.resolve():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, place / name)
                break


def _pictures(part: Any) -> list[str]:
    """Every relative path of a PNG that a part of a record names."""
    if isinstance(part, str):
        return [part] if part.endswith(".png") and not Path(part).is_absolute() and ".." not in Path(part).parts else []
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [name for value in inner for name in _pictures(value)]

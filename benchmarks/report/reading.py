"""A record of `bench report` as its pages and plots read it: checked once, then plain data.

What a record lacks is None or empty here, and left out of the pages; what stands there and is none of what it should be
makes the record a broken one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lowmem_bagel.errors import SettingError, printable
from lowmem_bagel.files import parse_json, read_file
from lowmem_bagel.hardware.profile import CONTEXT_BYTES

from ..record import commits
from ..words import FORMATS, LIBRARIES, WORDS
from .startup import WHOLE

TASKS: Mapping[str, str] = {"generate": "picture", "edit": "edit", "ask": "answer"}
MEMORY: Mapping[str, str] = {
    "process": "GPU memory of the process",
    "device": "GPU memory in use on the card",
    "reserved": "GPU memory reserved by PyTorch",
    "allocated": "GPU memory allocated by PyTorch",
    "ram": "RAM of the process",
}
"""Which bytes of a row stand for its memory: the first of these that every measured row knows."""
ON_CARD = ("process", "device")
MEASURED = "measured"
PUBLISHED = "bagel-7b"
"""The shape that predictions for other cards are of."""


@dataclass(frozen=True)
class Spread:
    """Of several runs."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class ReportRow:
    """One configuration and what it took; None where it was not measured. Seconds, bytes (not GB), joules."""

    row: str
    format: str
    limit_gb: float
    task: str
    backend: str
    offload: str
    step_cache: str
    dtype: str
    lora: int
    state: str
    why: str
    seconds: Spread | None
    phases: Mapping[str, float]
    step_seconds: float | None
    tokens_per_second: float | None
    first_token_seconds: float | None
    load_cold: float | None
    load_warm: float | None
    bytes: Mapping[str, float]
    stored_bytes: float | None
    predicted_seconds: float | None
    predicted_bytes: float | None
    energy_joules: float | None
    energy_why: str
    extrapolated: str
    commit: str
    """Where it is not the report's."""

    @property
    def is_measured(self) -> bool:
        return self.state == MEASURED and self.seconds is not None

    @property
    def median(self) -> float:
        """Seconds, of a row that was measured."""
        assert self.seconds is not None
        return self.seconds.median

    def at_peak(self, key: str) -> float | None:
        """1e9 bytes, by the name that `bytes` has for them. What a card holds is asked after the row: where that is
        less than PyTorch had reserved, some was given back since, and at the peak that and the context was held."""
        found, reserved = self.bytes.get(key), self.bytes.get("reserved")
        if found is not None and reserved and key in ON_CARD and found < reserved:
            found = reserved + CONTEXT_BYTES
        return None if found is None else found / 1e9

    @property
    def held(self) -> float | None:
        """1e9 bytes of what the planner predicts: all that the process takes of the card, else of RAM."""
        return next((self.at_peak(key) for key in (*ON_CARD, "ram") if key in self.bytes), None)

    @property
    def is_plain(self) -> bool:
        """Whether nothing but format, limit and task is other than usual."""
        usual = (self.backend, self.offload, self.step_cache, self.dtype) == ("auto", "native", "none", "auto")
        return usual and not self.lora and not self.others

    @property
    def others(self) -> tuple[str, ...]:
        """What the row's text sets besides what has a field here, such as "attention flash"."""
        parts = (part.partition("=") for part in self.row.split(":")[1:])
        named = ("limit_gb", "task", "backend", "offload", "step_cache", "dtype", "lora")
        return tuple(f"{name} {value}" for name, equals, value in parts if equals and name not in named)

    @property
    def title(self) -> str:
        """Its format in words."""
        return title_of(self.format)

    @property
    def marks(self) -> tuple[str, ...]:
        """What sets it apart from other rows of its format, in words."""
        found = [WORDS.get(self.step_cache, self.step_cache)] if self.step_cache != "none" else []
        found += [LIBRARIES.get(self.backend, f"by {self.backend}")] if self.backend != "auto" else []
        found += [f"by {self.offload}"] if self.offload != "native" else []
        found += [self.dtype] if self.dtype != "auto" else []
        found += [f"LoRA of rank {self.lora}"] if self.lora else []
        return (*found, *self.others)

    @property
    def label(self) -> str:
        """Such as "INT8 in 8 GB, TaylorSeer"."""
        limit = f" in {self.limit_gb:g} GB" if self.limit_gb else ""
        return ", ".join([self.title + limit, *self.marks])


@dataclass(frozen=True)
class Fidelity:
    """How far one variant is from the source. Pictures' files are as the record names them, beside it."""

    name: str
    kind: str
    state: str
    why: str
    exact: bool
    kl_mean: float | None
    kl_max: float | None
    agreement: float | None
    pictures: int
    psnr_median: float | None
    """Infinite where the pictures are equal."""
    psnr_worst: float | None
    ssim_median: float | None
    perceptual: float | None
    perceptual_name: str
    perceptual_missing: str
    velocity: tuple[float, ...]
    """Relative L2 at each step."""
    layers: tuple[float, ...]
    """The same after each layer."""
    first_plain: float | None
    first_guided: float | None
    files: tuple[str, ...]
    stored_bytes: float | None
    accuracy: Mapping[str, str]

    @property
    def title(self) -> str:
        return title_of(self.name) if self.kind == "format" else WORDS.get(self.name, self.name)


@dataclass(frozen=True)
class Startup:
    """Seconds of each phase of a command, which add up to all of it, and until its first step."""

    format: str
    limit_gb: float
    cold: Mapping[str, float]
    warm: Mapping[str, float]
    cold_first_step: float | None
    warm_first_step: float | None
    commit: str = ""
    cores: float | None = None

    @property
    def label(self) -> str:
        return title_of(self.format) + (f" in {self.limit_gb:g} GB" if self.limit_gb else "")


@dataclass(frozen=True)
class Report:
    """A whole record.

    `elsewhere`: what the planner predicts of cards that are not here, as `bench predictions` has it; of the published
    model, and nothing of the record. `machine`: as the planner saw it. `choice`: the recommended variant in a line, and
    the command for it, where the record has one.
    """

    path: Path
    command: str
    commit: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: tuple[ReportRow, ...]
    fidelity: tuple[Fidelity, ...] = ()
    source_files: tuple[str, ...] = ()
    material: Mapping[str, Any] = field(default_factory=dict)
    startup: tuple[Startup, ...] = ()
    elsewhere: tuple[Mapping[str, Any], ...] = ()
    choice: tuple[str, str] | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def measured(self) -> tuple[ReportRow, ...]:
        return tuple(row for row in self.rows if row.is_measured)

    @cached_property
    def others(self) -> list[str]:
        """Formats that no record of ours names, in order."""
        return sorted({row.format for row in self.rows} - set(FORMATS))

    @cached_property
    def memory_key(self) -> str:
        """Which of MEMORY stands for a row's memory in all tables and plots."""
        known = [sum(key in row.bytes for row in self.measured) for key in MEMORY]
        return list(MEMORY)[known.index(max(known))]

    def memory(self, row: ReportRow) -> float | None:
        """1e9 bytes."""
        return row.at_peak(self.memory_key)

    def stored(self, format: str) -> float | None:
        """1e9 bytes of a format's files."""
        sizes = (row.stored_bytes for row in self.rows if row.format == format and row.stored_bytes)
        found = next(sizes, None)
        return None if found is None else found / 1e9

    @property
    def card(self) -> str:
        """What was measured on: the card, else the processor."""
        gpu = self.hardware.get("gpu")
        return str(gpu).removeprefix("NVIDIA ") if gpu else str(self.hardware.get("cpu", "an unknown machine"))

    @property
    def card_gb(self) -> float | None:
        """1e9 bytes of the card's memory."""
        found = self.hardware.get("gpu_bytes")
        return found / 1e9 if isinstance(found, int) else None


def title_of(format: str) -> str:
    """A format in words; a folder by its last name."""
    return FORMATS.get(format) or Path(format).name or format


def read_report(path: Path) -> Report:
    """The record.

    Raises:
        SettingError: it cannot be read, or is no record of `bench report`.
    """
    try:
        value = parse_json(read_file(path))
    except OSError as error:
        raise SettingError(f"{path} cannot be read ({error.strerror}); name a record of bench report") from error
    except ValueError as error:
        raise _broken(path, f"no JSON: {error}") from error
    return report_of(value, path)


def report_of(value: object, path: Path) -> Report:
    """The record that a JSON value is; `path`: where it is from.

    Raises:
        SettingError: it is no record of `bench report`.
    """
    record = Given(path, "the record", value)
    if record.text("benchmark") != "report":
        raise _broken(path, f"its benchmark is {record.text('benchmark') or 'not named'!r}")
    results = record.inner("results")
    rows = tuple(map(_row, results.each("rows")))
    if not rows:
        raise _broken(path, "it has no rows")
    fidelity, startup, choice = (results.inner(name) for name in ("fidelity", "startup", "choice"))
    hardware, versions, settings = (record.inner(name).fields for name in ("hardware", "versions", "settings"))
    return Report(
        path,
        record.text("command"),
        commits(record.text("commit"), (row.commit for row in rows)),
        hardware,
        versions,
        settings,
        rows,
        fidelity=tuple(map(_fidelity, fidelity.each("variants"))),
        source_files=fidelity.inner("source").texts("files"),
        material=fidelity.inner("material").fields,
        startup=tuple(map(_startup, startup.each("rows"))),
        choice=(choice.text("line"), choice.text("command")) if choice.fields else None,
        machine=results.inner("machine").fields,
    )


class Given:
    """An object of a record, whose fields are asked for by kind; a field that is null or absent is empty or None."""

    def __init__(self, path: Path, place: str, value: object) -> None:
        if value is not None and not isinstance(value, dict):
            raise _broken(path, f"{place} is no object")
        self.path, self.place = path, place
        self.fields: dict[str, Any] = value or {}

    def inner(self, name: str) -> Given:
        return Given(self.path, name, self.fields.get(name))

    def each(self, name: str) -> list[Given]:
        return [Given(self.path, f"{name}[{n}]", value) for n, value in enumerate(self._list(name))]

    def text(self, name: str) -> str:
        found = self._of(str, name)
        return "" if found is None else printable(found)

    def texts(self, name: str) -> tuple[str, ...]:
        found = self._list(name)
        if not all(isinstance(each, str) for each in found):
            raise self._wrong(name)
        return tuple(found)

    def number(self, name: str) -> float | None:
        found = self._of((int, float), name)
        if isinstance(found, bool):
            raise self._wrong(name)
        return None if found is None else float(found)

    def decibels(self, name: str) -> float | None:
        """A number; "inf", as JSON has no other word for it, where nothing differs."""
        return math.inf if self.fields.get(name) == "inf" else self.number(name)

    def numbers(self) -> dict[str, float]:
        """All fields that are not null, each a number."""
        return {printable(name): found for name in self.fields if (found := self.number(name)) is not None}

    def series(self, name: str) -> tuple[float, ...]:
        found = self._list(name)
        if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in found):
            raise self._wrong(name)
        return tuple(found)

    def flag(self, name: str) -> bool:
        return bool(self._of(bool, name))

    def _list(self, name: str) -> list[Any]:
        found = self._of(list, name)
        return [] if found is None else found

    def _of(self, kind: type | tuple[type, ...], name: str) -> Any:
        found = self.fields.get(name)
        if found is not None and not isinstance(found, kind):
            raise self._wrong(name)
        return found

    def _wrong(self, name: str) -> SettingError:
        return _broken(self.path, f"{name} of {self.place} is {str(self.fields[name])[:60]!r}")


def _broken(path: Path, why: str) -> SettingError:
    return SettingError(f"{path} is no record of bench report ({why}); make one with lowmem-bagel bench report")


def _row(given: Given) -> ReportRow:
    seconds, load, predicted = (given.inner(name) for name in ("seconds", "load_seconds", "predicted"))
    format, median = given.text("format"), seconds.number("median")
    if not format:
        raise _broken(given.path, f"{given.place} names no format")
    spread = [seconds.number(name) for name in ("min", "max")]
    return ReportRow(
        given.text("row") or format,
        format,
        given.number("limit_gb") or 0.0,
        given.text("task") or "generate",
        given.text("backend") or "auto",
        given.text("offload") or "native",
        given.text("step_cache") or "none",
        given.text("dtype") or "auto",
        int(given.number("lora") or 0),
        given.text("state"),
        given.text("why"),
        None if median is None else Spread(median, *(median if each is None else each for each in spread)),
        given.inner("phases").numbers(),
        given.number("step_seconds"),
        given.number("tokens_per_second"),
        given.number("first_token_seconds"),
        load.number("cold"),
        load.number("warm"),
        given.inner("bytes").numbers(),
        given.number("stored_bytes"),
        predicted.number("seconds"),
        predicted.number("peak_bytes"),
        given.number("energy_joules"),
        given.text("energy_why"),
        given.text("extrapolated"),
        given.text("commit"),
    )


def _fidelity(given: Given) -> Fidelity:
    text, pictures, velocity = (given.inner(name) for name in ("text", "pictures", "velocity"))
    kl, psnr, perceptual = text.inner("kl_nats"), pictures.inner("psnr_db"), pictures.inner("perceptual")
    return Fidelity(
        given.text("name"),
        given.text("kind"),
        given.text("state") or MEASURED,
        given.text("why"),
        given.flag("exact"),
        kl.number("mean"),
        kl.number("max"),
        text.number("greedy_agreement"),
        int(pictures.number("count") or 0),
        psnr.decibels("median"),
        psnr.decibels("worst"),
        pictures.inner("ssim").number("median"),
        perceptual.number("median"),
        perceptual.text("name"),
        perceptual.text("missing"),
        velocity.series("per_step"),
        given.series("layers"),
        velocity.number("first_plain"),
        velocity.number("first_guided"),
        pictures.texts("files"),
        given.number("stored_bytes"),
        _accuracy(given.inner("accuracy")),
    )


def _accuracy(given: Given) -> dict[str, str]:
    """Task -> such as "197 of 200"."""
    tasks = given.inner("tasks")
    return {
        name: f"{right:g} of {total:g}"
        for name, task in ((name, tasks.inner(name)) for name in tasks.fields)
        if (right := task.number("right")) is not None and (total := task.number("total"))
    }


def _startup(given: Given) -> Startup:
    cold, warm = ({n: s for n, s in given.inner(state).numbers().items() if n != WHOLE} for state in ("cold", "warm"))
    until = [given.number(f"{state}_first_step") for state in ("cold", "warm")]
    run = given.text("commit"), given.number("cores")
    return Startup(given.text("format"), given.number("limit_gb") or 0.0, cold, warm, until[0], until[1], *run)

"""What `bench engine` measures: rows, and the presets that stand for the tables of the README."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from lowmem_bagel.errors import SettingError
from lowmem_bagel.formats.registry import format_spec


@dataclass(frozen=True)
class Row:
    """One configuration.

    format: of random weights; or a model folder, whose own weights are measured. limit_gb: 1e9 bytes, 0 for none.
    task: generate, edit or ask. timesteps: of the picture, or tokens of the answer; 0 for as many as the run is to
    have. A picture of fewer is extrapolated, and its record says so. tune: 0 to load with estimates. previews: steps
    from one preview to the next in as many runs more, whose seconds are recorded beside those without; 0 for none.
    lora: rank of a random adapter for all that draws; 0 for none. devices: several cards, such as 0,1, in place of the
    run's one; divide: what they share; launcher: who launches on the others ("request" or "thread"), in place of whom
    the plan says. without: features that are switched off for the row, such as peer. frames: drawn in one request, in
    which frame_mode; size: height and width in pixels in place of the run's, 0 for that.
    """

    format: str
    limit_gb: float = 0.0
    task: str = "generate"
    step_cache: str = "none"
    backend: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    offload: str = "native"
    timesteps: int = 0
    threshold: float = 0.05
    tune: int = 1
    previews: int = 0
    lora: int = 0
    devices: str = ""
    divide: str = "auto"
    launcher: str = ""
    without: str = ""
    frames: int = 1
    frame_mode: str = "together"
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Row:
        """From "format[:limit[:task]][:name=value...]", the names being the fields'.

        Raises:
            SettingError: an unknown name or a value that is not a number where one is due.
        """
        kinds: dict[str, Callable[[str], object]] = {
            field.name: {"float": float, "int": int}.get(str(field.type), str) for field in fields(cls)[1:]
        }
        places = iter(("limit_gb", "task"))
        values: dict[str, Any] = {}
        first, *parts = text.split(":")
        for part in parts:
            name, equals, value = part.partition("=")
            name, value = (name, value) if equals else (next(places, "?"), part)
            if name not in kinds:
                raise SettingError(
                    f"row {text!r}: {part!r} means nothing; use format:limit:task, or a name of {[*kinds]}"
                )
            if value:
                try:
                    values[name] = kinds[name](value)
                except ValueError:
                    raise SettingError(f"row {text!r}: {name} must be a number, not {value!r}") from None
        return cls(first, **values)

    @property
    def is_known(self) -> bool:
        """Whether its backend still exists: records keep the rows of what was taken out."""
        return self.backend in ("auto", *format_spec(self.format).backends)

    @property
    def is_reference(self) -> bool:
        """Whether other rows' pictures are compared with this one's."""
        usual = Row(self.format, task=self.task, threshold=self.threshold)
        return replace(self, frames=1, frame_mode="together", size=0) == usual and self.task != "ask"

    @property
    def drawing(self) -> tuple[str, str, int, str, int]:
        """What is drawn: rows that have it in common are compared with their reference."""
        return self.format, self.task, self.frames, self.frame_mode, self.size

    @property
    def compared(self) -> bool:
        """Whether this row's picture is compared with a reference."""
        return self.task != "ask" and self.timesteps == 0 and not self.lora and not self.is_reference


PRESETS: dict[str, tuple[str, ...]] = {
    "limits": (
        "source", "source:8", "dfloat11", "dfloat11:8", "int8", "int8:8", "dfloat11:12", "dfloat11:6", "source:24",
        "source::edit", "source::ask", "source:24:offload=accelerate:timesteps=3",
    ),
    "kernels": (
        "int8", "source", "dfloat11", "nf4", "source:step_cache=taylorseer", "int8:step_cache=taylorseer",
        "int8:step_cache=first-block", "source:step_cache=first-block", "source::edit", "source::ask",
        "dfloat11::ask", "int8::ask",
        "nf4::ask",
    ),
    "libraries": (
        "int8", "int8:backend=bitsandbytes", "int8:backend=quanto", "nf4", "nf4:backend=bitsandbytes", "dfloat11",
        "dfloat11:backend=dfloat11", "int8::ask:backend=bitsandbytes", "int8::ask:backend=quanto",
        "nf4::ask:backend=bitsandbytes", "dfloat11::ask:backend=dfloat11", "source:24:offload=accelerate:timesteps=3",
        "source:24:ask:offload=accelerate:timesteps=16",
    ),
    "devices": (
        "int8", "int8:devices=0,1", "source", "source:devices=0,1", "int8:devices=0,1:launcher=thread",
        "source:devices=0,1:launcher=thread", "int8::edit", "int8::edit:devices=0,1", "source::edit",
        "source::edit:devices=0,1", "dfloat11", "dfloat11:devices=0,1", "dfloat11::edit",
        "dfloat11::edit:devices=0,1", "source:16", "source:16:devices=0,1:divide=layers",
        "source:16:devices=0,1:divide=layers:without=peer", "int8:devices=0,1:without=peer",
        "source:16:devices=0,1:divide=layers:offload=accelerate", "source:16:devices=0,1", "source:12:ask",
        "source:12:ask:devices=0,1:divide=layers",
    ),
    "frames": tuple(
        f"{form}:{limit}:frames=8:frame_mode={mode}:size=512"
        for form in ("source", "int8") for mode in ("together", "turn") for limit in ("", "12")
    ),
}  # fmt: skip
"""The most telling rows first: a run that is cut short has them. A reference comes before what is compared with it."""

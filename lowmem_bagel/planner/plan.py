"""What was decided before anything is loaded, as data. Made by `planner`, carried out by `loader`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..checkpoint.tensors import EXPERTS, Expert
from ..settings import TASKS, Task

Unit = tuple[int, Expert]
"""One (layer, expert): what is resident or streamed as a whole."""

Place = Literal["device", "pinned", "pageable", "disk"]
"""Where weights wait. "pageable" is RAM and "disk" the shards, both read through pinned staging buffers."""
HOST_PLACES: tuple[Place, ...] = ("pinned", "pageable", "disk")

Launcher = Literal["request", "thread"]
"""Which thread launches what another card evaluates: the request's, or the card's own."""

NATIVE = "native"
"""What moves streamed units: `runtime.streaming`."""


@dataclass(frozen=True)
class Residency:
    """Where every part lives.

    Units in `streamed` pass through `slots` device buffers from `source`; the others stay on the device. Those that
    `source` has no room for are also in `pageable` or `disk`, where they wait instead. `staged` parts ("vit", "vae",
    "lm_head", "embedding") wait in RAM: the embedding is looked up there, the others are on the device only for the
    phase that uses them.
    """

    streamed: tuple[Unit, ...] = ()
    slots: int = 0
    source: Place = "device"
    staged: tuple[str, ...] = ()
    pageable: tuple[Unit, ...] = ()
    disk: tuple[Unit, ...] = ()

    def place(self, unit: Unit) -> Place:
        """Where a unit waits."""
        if unit not in self.streamed:
            return "device"
        return "pageable" if unit in self.pageable else "disk" if unit in self.disk else self.source

    @property
    def slowest(self) -> Place:
        """Where the units wait that the faster places had no room for."""
        return next(reversed(self.waiting()), self.source)

    def waiting(self) -> dict[Place, tuple[Unit, ...]]:
        """The streamed units by where they wait, the fastest place first."""
        places = {place: tuple(u for u in self.streamed if self.place(u) == place) for place in HOST_PLACES}
        return {place: units for place, units in places.items() if units}


@dataclass(frozen=True)
class ContextRoom:
    """Memory for contexts that repeat, which `runtime.context_store` keeps; not on disk."""

    place: Place
    nbytes: int


@dataclass(frozen=True)
class Prediction:
    """What the planner expects: bytes on the device at most, bytes copied a denoising step, seconds."""

    peak_bytes: int
    step_bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """How a folder is loaded and run.

    dtypes are torch's names. `offload` is "module:name" of what moves streamed units in place of `runtime.streaming`
    (see `runtime.residency.Mover`), and `relay` that of what carries hidden states between cards that share layers.
    `linears` is how the decoder's linears are run (see `formats.registry`). `guidance_batch`: whether guidance branches
    run as one batch. `graph_tokens`: passes of a picture of no more tokens, of all branches in them, are replayed by a
    CUDA graph. `max_vram` is the promise in bytes. `tune`: whether settings may be measured at loading.
    `context_store` is room beside all else. `reasons` says why each choice was made, by its name.

    Several cards: the plan is the first card's, and `others` has the others', whose parts that only the first needs are
    `left_out`; `variant` is the folder that one of them holds in place of the first one's. `branches` says which of
    them, counted from 1, evaluates a branch of guidance ("text" or "image"); those that it does not name are the first
    card's; `launcher` is who launches another's. Where layers are divided instead, `layers` says which (from, to) a
    card has, in the order of the cards.
    """

    device: str
    dtype: str
    residual_dtype: str
    vae_dtype: str
    attention: str = "auto"
    linears: str = "auto"
    offload: str = NATIVE
    relay: str = NATIVE
    tasks: tuple[Task, ...] = TASKS
    guidance_batch: bool = False
    graph_tokens: int = 0
    residency: Residency = field(default_factory=Residency)
    max_vram: int | None = None
    tune: bool = True
    context_store: ContextRoom | None = None
    left_out: tuple[str, ...] = ()
    others: tuple[Plan, ...] = ()
    branches: dict[str, int] = field(default_factory=dict)
    launcher: Launcher = "request"
    variant: str = ""
    layers: tuple[int, int] | None = None
    prediction: Prediction | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """Answers need only und; pictures need both."""
        return EXPERTS if {"generate", "edit"} & set(self.tasks) else ("und",)

    @property
    def devices(self) -> tuple[str, ...]:
        """Of all cards, the first one's first."""
        return (self.device, *(other.device for other in self.others))

    @property
    def divided(self) -> bool:
        """Whether other cards have some of the layers, without which nothing can be done."""
        return any(other.layers is not None for other in self.others)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

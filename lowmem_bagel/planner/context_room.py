"""Where contexts that repeat are kept, and how much of them: only what a plan leaves. Pure; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..errors import SettingError
from ..units import format_bytes, parse_bytes
from .memory import kv_cache_bytes
from .plan import ContextRoom
from .reasons import WAITING
from .workload import Wish

if TYPE_CHECKING:
    from .plan import Place, Residency
    from .search import Candidate, Search

AUTO_BYTES = 2_000_000_000
"""What "auto" takes at most: the contexts of four edits, or seven questions, of 1024x1024 with the published model."""
AUTO_CONTEXTS = 8
"""And of a smaller model, as many of the longest that was planned for."""


def read_wish(value: str | float | None) -> Wish:
    """What the option says.

    Raises:
        SettingError: neither auto nor off nor a size.
    """
    if value is None or value in ("off", "0", 0):
        return None
    if value == "auto":
        return "auto"
    try:
        return parse_bytes(value)
    except SettingError:
        raise SettingError(f"context_store must be auto, off or a size such as 2GB, not {value!r}") from None


def context_room(search: Search, best: Candidate, wish: Literal["auto"] | int) -> tuple[ContextRoom | None, str]:
    """The room beside a placement, and why it is that: on the device where it has what is wished for, else in RAM.

    "auto" is content with the longest context that was planned for. Weights never give way to contexts.
    """
    config = search.facts.config
    longest = max(kv_cache_bytes(config, search.how, workload.context_tokens) for workload in search.workloads)
    most = min(AUTO_BYTES, AUTO_CONTEXTS * longest) if wish == "auto" else wish
    least = min(most, longest)
    rooms: dict[Place, int] = {"device": search.device_limit - best.peak}
    if search.on_card:
        rooms |= _host_rooms(search, best.residency)
    enough = least if wish == "auto" else most
    place = next((place for place, room in rooms.items() if room >= enough), max(rooms, key=lambda place: rooms[place]))
    if rooms[place] < least:
        return None, f"off: the plan leaves {format_bytes(max(rooms[place], 0))}, and one takes {format_bytes(longest)}"
    nbytes = min(most, rooms[place])
    short = "" if nbytes == most or wish == "auto" else f" of the {format_bytes(most)} asked for"
    return ContextRoom(place, nbytes), f"up to {format_bytes(nbytes)}{short}, {_where(search, place)}"


def _where(search: Search, place: Place) -> str:
    if place != "device":
        return f"{WAITING[place]}: the device has no room beside the plan"
    return "on the device, which the plan leaves free" if search.on_card else "of the RAM that the plan leaves free"


def _host_rooms(search: Search, residency: Residency) -> dict[Place, int]:
    """RAM beside the weights that wait there: of what can be page-locked, and in all."""
    units = {
        place: sum(search.units[unit] for unit in waiting)
        for place, waiting in residency.waiting().items()
        if place != "disk"
    }
    locked = sum(search.parts[part] for part in residency.staged) + units.get("pinned", 0)
    staging = search.calibration.staging_bytes if {*residency.waiting()} - {"pinned"} else 0
    room = search.ram - locked - units.get("pageable", 0) - staging
    return {"pinned": min(room, search.profile.pin_limit - locked - staging), "pageable": room}

"""Abilities of a machine that are switched off by hand, to find out which one is at fault.

    LOWMEM_BAGEL_DISABLE=flash,triton lowmem-bagel generate "a cat"

Whatever asks whether an ability is there asks here first, so that what is switched off is as if it were absent: another
way is chosen, and the reason says so. The environment is read each time; nothing is kept.
"""

from __future__ import annotations

import os

from ..errors import SettingError

VARIABLE = "LOWMEM_BAGEL_DISABLE"

ATTENTION = ("flash-attn", "cudnn", "flash", "efficient", "sdpa", "chunked", "math")
NAMES = ("bf16", *ATTENTION, "triton", "nvrtc", "pinning", "bitsandbytes", "quanto", "dfloat11")
"""What can be switched off: native bfloat16, attention backends, kernel compilers, page-locked memory, packages."""


def switched_off() -> tuple[str, ...]:
    """The names in the variable, in their order."""
    return tuple(name for name in (part.strip() for part in os.environ.get(VARIABLE, "").split(",")) if name)


def why_off(name: str) -> str | None:
    """None where `name` is not switched off, else the reason in words."""
    assert name in NAMES, name
    return f"switched off by {VARIABLE}" if name in switched_off() else None


def check_switches() -> None:
    """Raises SettingError for a name that means nothing: the person would believe it to be off."""
    unknown = [name for name in switched_off() if name not in NAMES]
    if unknown:
        raise SettingError(f"{VARIABLE}: unknown {', '.join(unknown)}; choose from {', '.join(NAMES)}")

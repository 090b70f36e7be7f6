"""Features of a machine that are switched off by hand, to find out which one is at fault.

    LOWMEM_BAGEL_DISABLE=flash,triton lowmem-bagel generate "a cat"

Whatever asks whether a feature is there asks here first, so that what is switched off is as if it were absent: another
way is chosen, and the reason says so. The environment is read each time; nothing is kept.
"""

from __future__ import annotations

import os

VARIABLE = "LOWMEM_BAGEL_DISABLE"


def switched_off() -> tuple[str, ...]:
    """The names in the variable, in their order."""
    return tuple(name for name in (part.strip() for part in os.environ.get(VARIABLE, "").split(",")) if name)


def why_off(name: str) -> str | None:
    """None where `name` is not switched off, else the reason in words."""
    return f"switched off by {VARIABLE}" if name in switched_off() else None

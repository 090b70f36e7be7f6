"""The recommendation for the machine of a record, by the rule of `lowmem-bagel choose`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem_bagel.errors import ConfigError
from lowmem_bagel.hardware.profile import HardwareProfile
from lowmem_bagel.planner.choice import Wanted, choose


def recommended(machine: Mapping[str, Any]) -> tuple[str, str] | None:
    """A line, and the commands for it; None where the record says nothing of the machine."""
    from lowmem_bagel.cli.choose import commands, line, published

    if not machine:
        return None
    try:
        profile = HardwareProfile.from_json(machine)
    except ConfigError as error:
        return f"No recommendation: {error}", ""
    best = choose(published(profile), profile, Wanted())[0]
    if best.plan is None:
        return f"The published model does not fit: {best.why}", ""
    said = f"The published model, one picture: {line(best, profile, Wanted())}"
    return said, " && ".join(commands(best, Wanted()))

"""Which features can be switched off by hand: checked here, where all that can be named is known."""

from __future__ import annotations

from ..errors import SettingError
from ..formats.registry import packages
from ..hardware.features import VARIABLE, switched_off
from ..ops.attention.registry import attention_backends


def feature_names() -> tuple[str, ...]:
    """Native bfloat16, attention backends, kernel compilers, page-locked memory, cards' copies straight to each other,
    packages."""
    return "bf16", *attention_backends(), "triton", "nvrtc", "pinning", "peer", *packages()


def check_switched_off() -> None:
    """Raises SettingError for a name that means nothing: the person would believe it to be off."""
    known = feature_names()
    unknown = [name for name in switched_off() if name not in known]
    if unknown:
        raise SettingError(f"{VARIABLE}: unknown {', '.join(unknown)}; choose from {', '.join(known)}")

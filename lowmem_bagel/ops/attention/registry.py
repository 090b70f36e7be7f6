"""The attention backends there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import SettingError
from ...extensions import with_extensions
from .chunked import CHUNKED
from .cudnn import CUDNN
from .efficient import EFFICIENT
from .flash import FLASH
from .flash_attn import FLASH_ATTN
from .int8 import INT8
from .math import MATH
from .sdpa import SDPA
from .spec import AttentionSpec, Capability

OURS = (
    FLASH_ATTN,
    CUDNN,
    FLASH,
    EFFICIENT,
    SDPA,
    CHUNKED,
    MATH,
    INT8,
)


def attention_backends() -> Mapping[str, AttentionSpec]:
    """Every backend by its name, ours first."""
    return with_extensions("attention", OURS, "attention backends")


def attention_backend(name: str) -> AttentionSpec:
    """The backend of that name.

    Raises:
        SettingError: there is none.
    """
    known = attention_backends()
    if name not in tuple(known):  # a caller may hand in anything
        raise SettingError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(known)}")
    return known[name]


def preference(capability: Capability | None, lossy: bool = False) -> Sequence[AttentionSpec]:
    """Those to try unasked, the fastest first: on a card of this capability, or where there is none; and where weights
    are lossy anyway, those that are, too.

    On an H200 with 4098 tokens cuDNN ran at 604 TFLOP/s, flash at 350, memory-efficient at 170, math at 24.
    """
    specs = [spec for spec in attention_backends().values() if lossy or not spec.lossy]
    if capability is None:
        return sorted((spec for spec in specs if spec.capability is None), key=lambda spec: spec.order)
    major = capability[0]
    unasked = (spec for spec in specs if spec.unasked_on_cards)
    return sorted(unasked, key=lambda spec: (major not in spec.first_on, spec.order))

"""What an attention backend declares of itself: what it requires, its place among the others, and what it costs.

A backend is one file that ends in its declaration, an `AttentionSpec`, and one line in `registry`; another distribution
adds one under the entry-point group `lowmem_bagel.attention`. The planner takes the first whose requirements hold on a
profile; the loader the first whose requirements hold on the card and whose trial passes. Importing this needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal

from .base import AttentionBackend, AttentionRequest

Capability = tuple[int, int]

HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Call:
    """The shapes of one call: `tokens` queries that see `keys` keys."""

    tokens: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @property
    def result_bytes(self) -> int:
        return self.tokens * self.heads * self.head_dim * self.itemsize


def one_more(call: Call) -> int:
    """A second tensor of the result's size, such as the result before it is made contiguous."""
    return call.result_bytes


def two_more(call: Call) -> int:
    return 2 * call.result_bytes


@dataclass(frozen=True)
class Cost:
    """What a call takes.

    Attributes:
        scratch: bytes beside q, k, v and the result.
        share: of a card's nominal rate that it reaches; where a measured one comes from stands with it.
        of: which rate that is: "dense", of matmuls in the dtype of the arithmetic, or "float32".
        by_major: (major compute capability, share) of cards where that differs from `share`.
    """

    scratch: Callable[[Call], int]
    share: float
    of: Literal["dense", "float32"] = "dense"
    by_major: tuple[tuple[int, float], ...] = ()

    def on(self, capability: Capability | None) -> Cost:
        """The same with the share that a card of this capability reaches."""
        return self if capability is None else replace(self, share=dict(self.by_major).get(capability[0], self.share))


@dataclass(frozen=True)
class AttentionSpec:
    """What a backend declares.

    Attributes:
        name: as `attention` takes it.
        help: what it is, without a full stop.
        make: called with an `AttentionRequest`, and with the companion where there are any named; raises `Unavailable`
            with the reason where only trying tells that it cannot run. "module:function" where that is a kernel's.
        order: its place in the order in which backends are tried, the lowest first.
        first_on: major compute capabilities of cards on which it comes before all others.
        unasked_on_cards: False for one that a card takes only by name.
        lossy: whether it rounds by more than its dtype does: unasked only where the weights are lossy anyway.
        capability: the least compute capability of a card, without which it does not run; None: any device.
        dtypes: torch's names of those that it computes in; empty: any.
        switch: the function of `torch.backends.cuda` that says whether the kernel is switched on, by name.
        package: what must be installed, as (module, name on the package index).
        features: what the machine must have beside, as `HardwareProfile.packages` calls it.
        companions: backends, the first of which that runs takes what this one leaves.
    """

    name: str
    help: str
    make: Callable[..., AttentionBackend] | str
    order: int
    cost: Cost
    first_on: tuple[int, ...] = ()
    unasked_on_cards: bool = True
    lossy: bool = False
    capability: Capability | None = None
    dtypes: tuple[str, ...] = ()
    switch: str | None = None
    package: tuple[str, str] | None = None
    features: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()

    def made(self, request: AttentionRequest, *companion: AttentionBackend) -> AttentionBackend:
        """What `make` gives.

        Raises:
            Unavailable: it cannot run there.
        """
        make = self.make
        if isinstance(make, str):
            module, _, name = make.partition(":")
            make = getattr(import_module(module), name)
        backend: AttentionBackend = make(request, *companion)
        return backend

    def why_not(self, device: str, capability: Capability | None, dtype: str) -> str | None:
        """None where what it requires holds, else the reason.

        `device` is a torch device's type, `capability` that of the card, None where there is none.
        """
        if self.capability is not None and capability is None:
            return f"needs a CUDA GPU, not {device}"
        if self.capability is not None and capability is not None and capability < self.capability:
            need, have = (".".join(map(str, version)) for version in (self.capability, capability))
            return f"needs compute capability {need}; this card has {have}"
        if self.dtypes and dtype not in self.dtypes:
            return f"does not compute in {dtype}"
        return None

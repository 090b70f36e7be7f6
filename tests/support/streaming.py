"""Streaming without a GPU: streams and events on threads of this process, and pipelines whose units wait somewhere."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.planner.plan import NATIVE, Residency, Unit
from lowmem_bagel.runtime import residency as residency_module
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.settings import LoadOptions

UNITS: tuple[Unit, ...] = tuple((layer, expert) for layer in range(3) for expert in ("und", "gen"))
DRAWING = {"height": 32, "width": 48, "seed": 3, "num_timesteps": 3}
PREFETCHED = 0xFF
"""Byte that fills a slot while it is copied into: not a number in every float format."""


class Event:
    """Set when the work before it is done; like a CUDA event, one that was never recorded holds nobody up."""

    def __init__(self, blocking: bool = False) -> None:
        self.done = threading.Event()
        self.done.set()

    def record(self, stream: Stream) -> None:
        self.done.set()

    def synchronize(self) -> None:
        assert self.done.wait(20), "an event never came"


class Stream:
    """Work is done when it is queued."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(residency_module, "STAGING_BYTES", 30_000)
    monkeypatch.setattr(residency_module, "staging_buffer", lambda n, _: (torch.full((n,), PREFETCHED).byte(), None))


ACCELERATE = "lowmem_bagel.benchmarks.baselines.accelerate:AccelerateLayers"
"""A plan's `offload`, as the baseline's option makes it."""


def pipeline(
    folder: Path,
    residency: Residency,
    dtype: str = "bfloat16",
    offload: str = NATIVE,
    linears: str = "native",
) -> BagelPipeline:
    """`linears` "auto" times the ways to multiply by INT8, so that a busy machine may choose another one each time."""
    opened = ModelFolder.open(folder)
    plan = plan_for(opened, LoadOptions(device="cpu", dtype=dtype))
    changed = replace(plan, guidance_batch=True, residency=residency, offload=offload)
    return BagelPipeline(load_model(opened, replace(changed, linears=linears)))


def drawn(pipe: BagelPipeline) -> Tensor:
    latent = pipe.generate("a red circle", **DRAWING).latent
    assert latent is not None and latent.isfinite().all()
    return latent

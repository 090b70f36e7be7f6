"""How full the device is that a model computes on."""

from __future__ import annotations

from typing import NamedTuple

from .service import Loaded


class InUse(NamedTuple):
    """Bytes of the card's memory, or of RAM where a processor computes; by whomever they are used."""

    used: int
    total: int


def device_memory(loaded: Loaded) -> InUse:
    """Asked of the driver or the system: cheap enough for once a second."""
    import torch

    from ..hardware.host import memory

    device = loaded.pipeline.model.bagel.device
    if device.type != "cuda":
        ram = memory()
        return InUse(ram.total - ram.available, ram.total)
    free, total = torch.cuda.mem_get_info(device)
    return InUse(total - free, total)

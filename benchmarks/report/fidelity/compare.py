"""Two observations beside each other: the figures of a record."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import MISSING, agreeing, as_json, kl_nats, psnr, ssim
from .observe import Seen

if TYPE_CHECKING:
    from torch import Tensor


def compared(found: Seen, wanted: Seen) -> dict[str, Any]:
    """The figures; what was not observed is None. `exact`: all that was observed is equal to the bit."""
    return {
        "exact": _equal(found, wanted),
        "text": _text(found, wanted),
        "pictures": _pictures(found, wanted),
        "velocity": _velocity(found, wanted),
        "layers": _mean_by_place(found.layers, wanted.layers),
    }


def _equal(found: Seen, wanted: Seen) -> bool:
    import torch

    pairs = zip(_tensors(found, bool(found.layers)), _tensors(wanted, bool(found.layers)), strict=True)
    tensors = all(torch.equal(a, b) for a, b in pairs)
    pictures = all(np.array_equal(a, b) for a, b in zip(found.pictures, wanted.pictures, strict=True))
    return tensors and pictures and found.answers == wanted.answers


def _tensors(seen: Seen, layers: bool) -> Iterator[Tensor]:
    yield from seen.logits
    yield from seen.plain
    for many in (*seen.velocities, *(seen.layers if layers else ())):
        yield from many


def _text(found: Seen, wanted: Seen) -> dict[str, Any] | None:
    """Of a position whose logits are equal the divergence is 0 by computation, not by rounding."""
    import torch

    if not wanted.logits:
        return None
    pairs = list(zip(wanted.logits, found.logits, strict=True))
    divergence = torch.cat([kl_nats(a, b) for a, b in pairs])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
    figures = {
        "kl_nats": {"mean": float(divergence.mean()), "max": float(divergence.max())},
        "top_agreement": float(same.double().mean()),
        "tokens": len(divergence),
        "greedy_agreement": None,
        "equal_answers": None,
    }
    if wanted.answers:
        answers = list(zip(found.answers, wanted.answers, strict=True))
        reached = sum(agreeing(a, b) for a, b in answers)
        figures["greedy_agreement"] = reached / sum(len(b) for _, b in answers)
        figures["equal_answers"] = sum(a == b for a, b in answers) / len(answers)
    return figures


def _pictures(found: Seen, wanted: Seen) -> dict[str, Any] | None:
    if not wanted.pictures:
        return None
    pairs = list(zip(found.pictures, wanted.pictures, strict=True))
    figures = {"psnr_db": [psnr(*pair) for pair in pairs], "ssim": [ssim(*pair) for pair in pairs]}
    spread = {
        name: {"median": as_json(statistics.median(values)), "worst": as_json(min(values))}
        for name, values in figures.items()
    }
    equal = sum(np.array_equal(*pair) for pair in pairs)
    return {"count": len(pairs), "equal": equal, **spread, "perceptual": {"missing": MISSING}, "files": []}


def _velocity(found: Seen, wanted: Seen) -> dict[str, Any] | None:
    per_step = _mean_by_place(found.velocities, wanted.velocities)
    plain = _mean_by_place([found.plain], [wanted.plain])
    if per_step is None or plain is None:
        return None
    return {"per_step": per_step, "first_plain": statistics.fmean(plain), "first_guided": per_step[0]}


def _mean_by_place(found: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]) -> list[float] | None:
    """Relative L2 by step or layer, the mean over trajectories."""
    from lowmem_bagel.ops.errors import relative_l2

    if not found or not wanted or not found[0]:
        return None
    rows = [[relative_l2(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(found, wanted, strict=True)]
    return [statistics.fmean(place) for place in zip(*rows, strict=True)]

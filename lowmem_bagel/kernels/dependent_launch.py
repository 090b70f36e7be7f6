"""Programmatic dependent launch: a kernel starts while the one before it in the stream still runs.

Decoding a token is some two hundred short kernels in a row. Between two of them a GPU runs empty: the last programs of
one finish, the next is launched, and its first loads take their time. From compute capability 9 on, a kernel may say
that the next one can start (`signal`) and wait, before it touches what others write, until all before it is complete
(`wait`). Between the two it loads what no kernel writes, its weights.

    @jit
    def kernel(..., OVERLAP: tl.constexpr):
        signal(OVERLAP)
        ...                                     # loads of weights, norms, biases, scales
        wait(OVERLAP)
        ...                                     # loads of activations; every store

    kernel[grid](..., **launch_options(device))

Every kernel launched so must wait before its first read of another kernel's result and before its first write: then
whatever it waits for has itself waited for all before it. A kernel launched in the plain way is a full barrier.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from functools import cache
from typing import Any

import torch

from .triton_language import interpreted, jit, tl

_language: Any = getattr(getattr(tl, "extra", None), "cuda", None)
_MISSING = not all(hasattr(_language, name) for name in ("gdc_wait", "gdc_launch_dependents"))


@cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on `device` are launched so. Elsewhere they are the same kernels without the two instructions."""
    if _MISSING or interpreted() or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a launch of a kernel that has the parameter OVERLAP and calls `wait`."""
    # An older Triton has no such option, and neither has the interpreter.
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}


@jit
def signal(OVERLAP: tl.constexpr):
    """Lets the next kernel start as soon as there is room for it. It still waits for all of this one in its `wait`."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait(OVERLAP: tl.constexpr):
    """Returns once every kernel before this one is complete and its results can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()

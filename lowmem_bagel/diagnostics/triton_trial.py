"""The smallest Triton kernel, to find out whether Triton compiles and runs on this machine. Import needs Triton."""

import torch

from ..kernels.triton_language import jit, tl
from ..ops.device import on


@jit
def _increment(x_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    tl.store(x_ptr + index, tl.load(x_ptr + index, mask=inside) + 1, mask=inside)


def increments_correctly(device: torch.device) -> bool:
    """Adds 1 to 100 of 128 numbers on `device` and looks at all of them; raises whatever Triton raises."""
    x = torch.arange(128, device=device, dtype=torch.int32)
    with on(device):
        _increment[(2,)](x, 100, BLOCK=64)
    expected = torch.arange(128, dtype=torch.int32)
    expected[:100] += 1
    return torch.equal(x.cpu(), expected)

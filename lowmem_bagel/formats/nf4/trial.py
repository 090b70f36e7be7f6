"""NF4's kernels, tried on small inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.cuda_source import CudaSource
from ...kernels.trials import Kernel, random, why_not_compiled
from .codec import dequantize
from .packed import CudaPackedNf4, PackedNf4


def _codes(device: torch.device, rows: int, nbytes: int) -> Tensor:
    random_bytes = torch.randint(0, 256, (rows, nbytes), generator=torch.Generator().manual_seed(rows), device="cpu")
    return random_bytes.to(device, torch.uint8)


def _try_triton(device: torch.device) -> tuple[Tensor, Tensor]:
    from .kernels import nf4_dequantize, nf4_gemv, nf4_gemv_reference

    x, packed, absmax = random(device, 1, 128), _codes(device, 48, 64), random(device, 48, 2).abs()
    once = (nf4_gemv(x, packed, absmax), nf4_gemv_reference(x, packed, absmax))
    whole = (nf4_dequantize(packed, absmax, x.dtype), dequantize(packed, absmax, x.dtype))
    result, expected = (torch.cat((a.flatten(), b.flatten())) for a, b in zip(once, whole, strict=True))
    return result, expected


TRITON = Kernel((7, 5), _try_triton)


def why_not_packed(source: CudaSource) -> str | None:
    """None where the kernels that need no Triton give what is expected, else the reason."""

    def results(packed: PackedNf4) -> list[Tensor]:
        weight, absmax = _codes(source.device, 64, 2048), random(source.device, 64, 64).abs()
        token = random(source.device, 1, 4096).half()
        return [packed.to_half(weight, absmax), packed.times_token(token, weight, absmax)]

    return why_not_compiled(source, lambda: (results(CudaPackedNf4(source)), results(PackedNf4(source.half))))

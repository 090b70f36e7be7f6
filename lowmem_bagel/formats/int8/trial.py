"""INT8's kernels, tried on small inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.cuda_source import CudaSource
from ...kernels.trials import Kernel, random, why_not_compiled
from ...ops.int8 import quantize_rows
from ...ops.linear import Weights
from ..spec import TENSOR_CORES
from .packed import CudaPackedInt8, PackedInt8


def _try_matmul(device: torch.device) -> tuple[Tensor, Tensor]:
    from ...kernels.gemv import gemv_reference
    from .kernels import TritonInt8, int8_matmul_reference

    x, weight, scale = (
        random(device, 32, 128),
        quantize_rows(random(device, 48, 128))[0],
        random(device, 48).abs() + 0.1,
    )
    quantized, token_scale = quantize_rows(x)
    product, weights = TritonInt8(device), Weights(weight, scale)
    wanted = int8_matmul_reference(quantized, token_scale[:, 0], weight, scale, None, x.dtype)
    result = torch.cat((product.product(x, weights), product.product(x[:1], weights)))
    return result, torch.cat((wanted, gemv_reference(x[:1], weight, scale=scale)))


MATMUL = Kernel(TENSOR_CORES, _try_matmul)


def why_not_packed(source: CudaSource) -> str | None:
    """None where the kernels that need no Triton give what is expected, else the reason."""

    def results(packed: PackedInt8) -> list[Tensor]:
        weight = quantize_rows(random(source.device, 64, 4096))[0]
        return [packed.to_half(weight), packed.times_token(random(source.device, 1, 4096).half(), weight)]

    return why_not_compiled(source, lambda: (results(CudaPackedInt8(source)), results(PackedInt8(source.half))))

"""NF4's kernels, tried."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels.cuda_source import CudaSource
from ...kernels.trial_inputs import (
    FEW_ROWS,
    Pair,
    RepeatedRows,
    Sizes,
    layer_calls,
    random,
    random_bytes,
    repeated,
    row_scales,
    tried_calls,
)
from ...kernels.trials import Kernel, why_not_compiled
from ...ops.linear import Weights
from .codec import dequantize
from .levels import BLOCK
from .packed import CudaPackedNf4, PackedNf4


def _rows(device: torch.device, n: int, k: int) -> RepeatedRows:
    codes, absmax = random_bytes(device, FEW_ROWS, k // 2), random(device, FEW_ROWS, k // BLOCK).abs()
    scale = row_scales(device, n, k)
    weights = Weights(repeated(codes, n), repeated(absmax, n).mul_(scale[:, None]))
    return RepeatedRows(weights, dequantize(codes, absmax, torch.float32), scale)


def _try_triton(device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    from .kernels import TritonNf4, nf4_dequantize

    k = sizes.decoder.hidden_size
    codes, absmax = random_bytes(device, FEW_ROWS, k // 2), random(device, FEW_ROWS, k // BLOCK).abs()
    yield nf4_dequantize(codes, absmax, sizes.dtype), dequantize(codes, absmax, sizes.dtype)
    product = TritonNf4()
    for tokens in (1, 2):
        calls = layer_calls(sizes, device, tokens, product)
        yield from tried_calls(product, lambda n, k: _rows(device, n, k), calls)


TRITON = Kernel((7, 5), _try_triton)


def why_not_packed(source: CudaSource) -> str | None:
    """None where the kernels that need no Triton give what is expected, else the reason."""

    def results(packed: PackedNf4) -> list[Tensor]:
        weight, absmax = random_bytes(source.device, 64, 2048), random(source.device, 64, 64).abs()
        token = random(source.device, 1, 4096).half()
        return [packed.to_half(weight, absmax), packed.times_token(token, weight, absmax)]

    return why_not_compiled(source, lambda: (results(CudaPackedNf4(source)), results(PackedNf4(source.half))))

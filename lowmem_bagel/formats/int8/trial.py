"""INT8's kernels, tried."""

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
    tried_groups,
)
from ...kernels.trials import Kernel, why_not_compiled
from ...ops.int8 import int_mm, quantize_rows
from ...ops.linear import Weights, swiglu
from ..spec import TENSOR_CORES
from .packed import CudaPackedInt8, PackedInt8
from .pairs import BLOCKS, Pairs, results
from .tiles import Tiles
from .tuning import kept_tiles

TOKENS = (2, 32, 64, 65, 128, 200, 300, 512, 700, 1024, 1400, 2048, 3000, 4096, 4902, 8192, 12288)
"""For whose tiles the matmul is tried: from a picture's two markers to three branches of guidance."""
PAIRS_ON = (9, 0)
"""The capability that has the instructions of `clusters.cu`; later ones have others."""
TRIED_ROWS = 2
"""Of a last tile that is not full."""


def _rows(device: torch.device, n: int, k: int) -> RepeatedRows:
    few, scale = random_bytes(device, FEW_ROWS, k).view(torch.int8), row_scales(device, n, k) / 64
    return RepeatedRows(Weights(repeated(few, n), scale), few.float(), scale)


def _try_matmul(device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    from .kernels import TritonInt8, int8_matmul

    tiles = Tiles.of(device)
    product = TritonInt8(tiles)
    one = layer_calls(sizes, device, 1, product)
    yield from tried_calls(product, lambda n, k: _rows(device, n, k), one)
    for n, k, has_bias in sizes.linears:
        rows, bias = _rows(device, n, k), random(device, n, dtype=sizes.around) if has_bias else None
        weight, scale, _ = rows.weights
        assert scale is not None
        adds = n == sizes.decoder.hidden_size and not has_bias
        for tile in {choice.choose(m, n, k) for choice in (tiles, kept_tiles(device)) for m in TOKENS}:
            tokens = tile.m + TRIED_ROWS
            values, token_scale = random_bytes(device, tokens, k).view(torch.int8), random(device, tokens).abs() / 64
            few = int_mm(values, rows.few.to(torch.int8)).float()
            expected = repeated(few, n, dim=1) * scale * token_scale[:, None]
            residual = random(device, tokens, n, dtype=sizes.around) if adds else None
            for term in (bias, residual):
                expected = expected if term is None else expected + term.float()
            operands = values, token_scale, weight, scale, bias, sizes.around, tile, tiles.processors
            yield int8_matmul(*operands, residual), expected


def _try_grouped(device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    from .grouped import TILES, int8_grouped

    for tile in TILES:
        for rows, groups, expected in tried_groups(device, sizes, lambda n, k: _rows(device, n, k), tile.m):
            tokens, k = tile.m + 6, rows.few.shape[1]
            values, token_scale = random_bytes(device, tokens, k).view(torch.int8), random(device, tokens).abs() / 64
            weight, scale, _ = rows.weights
            assert scale is not None
            found = int8_grouped(values, token_scale, weight, scale, groups, sizes.around, tile)
            yield found, expected(values.float() * token_scale[:, None])


def why_not_pairs(source: CudaSource) -> str | None:
    """None where the matmul by pairs of blocks gives what is expected, else the reason."""
    device = source.device
    if device.type != "cuda":
        return f"needs a CUDA GPU, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != PAIRS_ON:
        return "is made for compute capability {}.{}; this card has {}.{}".format(*PAIRS_ON, *capability)
    if source.half != torch.bfloat16:
        return "computes in bfloat16 only"

    def found_and_expected() -> tuple[list[Tensor], list[Tensor]]:
        pairs = Pairs(source, 2 * BLOCKS)
        pairs.compile()
        values, weight = (random_bytes(device, rows, 784, seed=rows).view(torch.int8) for rows in (300, 656))
        token_scale, row_scale = random(device, 300).abs() / 64, random(device, 656).abs() / 64
        bias, residual = (random(device, *shape, dtype=source.half) for shape in ((656,), (300, 656)))
        product = int_mm(values, weight).float() * row_scale * token_scale[:, None]
        expected = [product + bias.float(), residual.float() + product, swiglu(product.to(source.half))]
        return results(pairs, (values, token_scale, weight, row_scale, bias, residual)), expected

    return why_not_compiled(source, found_and_expected)


MATMUL = Kernel(TENSOR_CORES, _try_matmul)
GROUPED = Kernel(TENSOR_CORES, _try_grouped)


def why_not_packed(source: CudaSource) -> str | None:
    """None where the kernels that need no Triton give what is expected, else the reason."""

    def results(packed: PackedInt8) -> list[Tensor]:
        weight = quantize_rows(random(source.device, 64, 4096))[0]
        return [packed.to_half(weight), packed.times_token(random(source.device, 1, 4096).half(), weight)]

    return why_not_compiled(source, lambda: (results(CudaPackedInt8(source)), results(PackedInt8(source.half))))

"""GGUF's kernels, tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from ...checkpoint.gguf_blocks import BLOCK_TYPES, decoded
from ...kernels.cuda_source import CudaSource
from ...kernels.trial_inputs import (
    FEW_ROWS,
    DecoderShape,
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
from .packed import CudaPackedBlocks, PackedBlocks

SCALES: Mapping[str, tuple[int, ...]] = {"Q8_0": (0,), "Q6_K": (208,), "Q5_K": (0, 2), "Q4_K": (0, 2)}
"""Where the fp16 numbers of a block lie, by which all its values are multiplied."""
SIZE: Mapping[str, float] = {"Q8_0": 1 / 64, "Q6_K": 1 / 1024, "Q5_K": 1 / 512, "Q4_K": 1 / 256}
"""Of these numbers, for values of about 1."""


def random_blocks(device: torch.device, kind: str, rows: int, width: int, size: float = 1.0) -> Tensor:
    """A weight of any bytes whose values are finite and of about a size; uint8 [rows, nbytes of a row]."""
    block = BLOCK_TYPES[kind]
    blocks = random_bytes(device, rows, width // block.values, block.nbytes)
    for place in SCALES[kind]:
        scales = 1 + random(device, rows, width // block.values, seed=place).abs()
        pattern = (size * SIZE[kind] * scales).half()
        blocks[..., place : place + 2] = pattern[..., None].view(torch.uint8)
    return blocks.flatten(1)


def scaled(blocks: Tensor, kind: str, factors: Tensor) -> Tensor:
    """A weight's rows [rows, nbytes] times powers of two [rows]."""
    found = blocks.clone().view(len(blocks), -1, BLOCK_TYPES[kind].nbytes)
    for place in SCALES[kind]:
        pattern = found[..., place : place + 2].contiguous().view(torch.float16)
        found[..., place : place + 2] = (pattern * factors[:, None, None].half()).view(torch.uint8)
    return found.flatten(1)


def _rows(kind: str, device: torch.device, n: int, k: int) -> RepeatedRows:
    few, scale = random_blocks(device, kind, FEW_ROWS, k), row_scales(device, n, k)
    weight = scaled(repeated(few, n), kind, scale)
    return RepeatedRows(Weights(weight.flatten()), decoded(few, kind, (FEW_ROWS, k), torch.float32), scale)


def whole_blocks(sizes: Sizes, kind: str) -> Sizes:
    """A decoder whose rows are whole blocks of a type: this one, where they are."""
    decoder, values = sizes.decoder, BLOCK_TYPES[kind].values
    hidden, middle = (-(-size // values) * values for size in (decoder.hidden_size, decoder.intermediate_size))
    kept = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim, decoder.vocab_size
    return Sizes(DecoderShape(hidden, middle, *kept), sizes.dtype)


def _try_triton(kind: str, device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    from .kernels import TritonBlocks, gguf_dequantize

    sizes = whole_blocks(sizes, kind)
    k = sizes.decoder.hidden_size
    few = random_blocks(device, kind, FEW_ROWS, k).flatten()
    yield gguf_dequantize(few, kind, (FEW_ROWS, k), sizes.dtype), decoded(few, kind, (FEW_ROWS, k), sizes.dtype)
    product = TritonBlocks(kind)
    for tokens in (1, 2):
        calls = layer_calls(sizes, device, tokens, product)
        yield from tried_calls(product, partial(_rows, kind, device), calls)


def _kernel(kind: str) -> Kernel:
    return Kernel((7, 5), partial(_try_triton, kind))


Q8_0, Q6_K, Q5_K, Q4_K = map(_kernel, BLOCK_TYPES)
TRITON: Mapping[str, Kernel] = dict(zip(BLOCK_TYPES, (Q8_0, Q6_K, Q5_K, Q4_K), strict=True))


def why_not_packed(source: CudaSource, kinds: Iterable[str] = tuple(BLOCK_TYPES)) -> str | None:
    """None where the kernels that need no Triton give what is expected of these types, else the reason."""
    tried = [(kind, random_blocks(source.device, kind, 64, 4096).flatten()) for kind in kinds]
    token = random(source.device, 1, 4096).half()

    def results(made: Iterable[PackedBlocks]) -> list[Tensor]:
        return [
            result
            for packed, (_, weight) in zip(made, tried, strict=True)
            for result in (packed.decoded(weight, 4096, source.half), packed.times_token(token, weight))
        ]

    def both() -> tuple[list[Tensor], list[Tensor]]:
        ours, plain = (
            [make(kind) for kind, _ in tried] for make in (lambda k: CudaPackedBlocks(k, source), PackedBlocks)
        )
        return results(ours), results(plain)

    return why_not_compiled(source, both)

"""GGUF's blocks: stored bytes and values against the package `gguf`, and how near the K types come."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from support.numeric import gaussian, relative_l2

from lowmem_bagel.checkpoint.gguf_blocks import BLOCK_TYPES, FLOAT_TYPES, OTHER_TYPES, decoded
from lowmem_bagel.errors import ConversionError
from lowmem_bagel.formats.gguf.codec import dequantize, encode

KINDS = tuple(BLOCK_TYPES)
BOUNDS = {"Q8_0": 0.006, "Q6_K": 0.019, "Q5_K": 0.038, "Q4_K": 0.075}
"""Relative L2 of normal weights; NF4 loses 0.092."""


def weight(rows: int = 6, width: int = 512, std: float = 0.02, seed: int = 0) -> torch.Tensor:
    return gaussian(rows, width, std=std, seed=seed).bfloat16()


def theirs(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_numbers_are_the_packages(kind: str) -> None:
    block = BLOCK_TYPES[kind]
    assert (block.values, block.nbytes) == gguf.GGML_QUANT_SIZES[theirs(kind)]
    assert block.number == theirs(kind).value
    names = FLOAT_TYPES | OTHER_TYPES
    assert all(gguf.GGMLQuantizationType(number).name == name for number, name in names.items())


@pytest.mark.parametrize("std", [0.02, 3e-4, 2.0, 1e-7])
def test_q8_0_has_the_packages_bytes(std: float) -> None:
    values = weight(std=std)
    values[0, :64] = 0
    values[1, :4] = torch.tensor([127.0, -63.5, 63.5, 0.5]) * std  # halves
    found, error = encode(values, "Q8_0")
    assert np.array_equal(found.numpy(), gguf.quants.quantize(values.float().numpy(), theirs("Q8_0")))
    assert error == pytest.approx(relative_l2(dequantize(found, "Q8_0", (6, 512), torch.float32), values), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_any_blocks_have_the_packages_values(kind: str) -> None:
    """Bit by bit, whatever the bytes are, also where scales are infinite or none."""
    block = BLOCK_TYPES[kind]
    raw = torch.randint(0, 256, (40, 3 * block.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with np.errstate(invalid="ignore", over="ignore"):
        want = torch.from_numpy(gguf.quants.dequantize(raw.numpy(), theirs(kind)))
    found = decoded(raw.flatten(), kind, (40, 3 * block.values), torch.float32)
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.nan_to_num(), want.nan_to_num())
    half = decoded(raw, kind, (40, 3 * block.values), torch.bfloat16)
    assert torch.equal(half.nan_to_num(), want.bfloat16().nan_to_num())


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_near(kind: str) -> None:
    values = weight(16, 1024)
    values[0, :256] = 0
    values[1] = 0.01  # of one value
    values[2] += 0.1  # none is negative
    found, error = encode(values, kind)
    assert found.dtype == torch.uint8
    assert found.shape == (16, BLOCK_TYPES[kind].bytes_of((1024,)))
    back = torch.from_numpy(gguf.quants.dequantize(found.numpy(), theirs(kind)))
    assert relative_l2(back[3:], values[3:]) < BOUNDS[kind]
    assert relative_l2(back[1], values[1]) < BOUNDS[kind]
    assert bool((back[0, :256] == 0).all())
    assert error == pytest.approx(relative_l2(back, values), rel=1e-3)


@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K", "Q4_K"])
@pytest.mark.parametrize("std", [2e-5, 1e-3, 100.0])
def test_scales_of_any_size(kind: str, std: float) -> None:
    """Small ones are subnormal fp16 numbers, and have fewer bits."""
    found, error = encode(weight(std=std), kind)
    assert error < (BOUNDS[kind] if std > 1e-4 else 0.25)
    assert not dequantize(found, kind, (6, 512), torch.float32).isnan().any()


def test_a_search_beats_the_ends() -> None:
    """What least squares gain over levels from the lowest to the highest value."""
    values = weight(64, 1024)
    plain = values.float().view(-1, 32)
    low, high = plain.amin(1, keepdim=True).clamp(max=0), plain.amax(1, keepdim=True)
    step = (high - low) / 15
    between = ((plain - low) / step).round() * step + low
    assert encode(values, "Q4_K")[1] < 0.95 * relative_l2(between, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_no_block_holds_is_refused(kind: str, value: float) -> None:
    values = weight()
    values[3, 300] = value
    with pytest.raises(ConversionError, match="infinite or NaN value, or one that fp16 scales"):
        encode(values, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_lengths_are_refused(kind: str) -> None:
    with pytest.raises(ConversionError, match=f"not a multiple of {BLOCK_TYPES[kind].values}: {kind} cannot hold it"):
        encode(weight(width=BLOCK_TYPES[kind].values + 16), kind)

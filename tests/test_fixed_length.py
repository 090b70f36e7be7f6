"""The fixed-length lossless form: its layout read by hand, and every bit pattern."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import poisoned  # noqa: F401
from torch import Tensor

from lowmem_bagel.quant import fixed_length
from lowmem_bagel.quant.fixed_length import FixedLength

SHAPES = [(1, 1), (1, 64), (3, 255), (2, 256), (5, 257), (17, 320), (4, 3584), (0, 64)]


def normal(rows: int, cols: int) -> Tensor:
    return (torch.randn(rows, cols) * 0.02).bfloat16()


def any_bits(rows: int, cols: int) -> Tensor:
    return torch.randint(-(2**15), 2**15, (rows, cols), dtype=torch.int16).view(torch.bfloat16)


def assert_round_trip(weight: Tensor) -> FixedLength:
    encoded = fixed_length.encode(weight)
    assert torch.equal(fixed_length.decode(encoded).view(torch.int16), weight.view(torch.int16))
    out = torch.full(weight.shape, float("nan"), dtype=torch.bfloat16)
    fixed_length.decode(encoded, out)
    assert torch.equal(out.view(torch.int16), weight.view(torch.int16))
    return encoded


def read_by_hand(e: FixedLength) -> np.ndarray:
    """The bits of the weight [rows, cols], number by number as the layout's description says."""
    words = e.index.numpy().view(np.uint32)
    out = np.zeros((e.rows, e.cols), dtype=np.uint16)
    for row in range(e.rows):
        for tile in range(e.tiles):
            escape = int(e.tile_starts[row * e.tiles + tile])
            for k in range(256):
                a, b, c = (int(word) for word in words[row, tile * 24 + k // 32 * 3 :][:3])
                nibble = 4 * (k % 8)
                if k % 32 < 24:
                    index = (a, b, c)[k % 32 // 8] >> nibble & 7
                else:
                    selectors = (a >> 3 & 0x11111111) | (b >> 2 & 0x22222222) | (c >> 1 & 0x44444444)
                    index = selectors >> nibble & 7
                exponent = int(e.exponents[index])
                if index == 7:
                    exponent = int(e.escapes[escape])
                    escape += 1
                column = tile * 256 + k
                plain = int(e.sign_mantissa[row, column])
                if column < e.cols:
                    out[row, column] = (plain & 0x80) << 8 | exponent << 7 | plain & 0x7F
                else:
                    assert (index, plain) == (0, 0)
            assert escape == int(e.tile_starts[row * e.tiles + tile + 1])
    return out


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("make", [normal, any_bits])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(make: Callable[[int, int], Tensor], shape: tuple[int, int]) -> None:
    encoded = assert_round_trip(make(*shape))
    assert {name: tuple(tensor.shape) for name, tensor in encoded.tensors.items() if name != "escapes"} == {
        "exponents": (8,),
        "sign_mantissa": (shape[0], 256 * encoded.tiles),
        "index": (shape[0], 24 * encoded.tiles),
        "tile_starts": (shape[0] * encoded.tiles + 1,),
    }
    assert encoded.escapes.numel() == int(encoded.tile_starts[-1]) + 16


@pytest.mark.parametrize("make", [normal, any_bits])
@pytest.mark.parametrize("shape", [(3, 255), (2, 576)])
def test_the_layout_is_the_described_one(make: Callable[[int, int], Tensor], shape: tuple[int, int]) -> None:
    weight = make(*shape)
    assert np.array_equal(read_by_hand(fixed_length.encode(weight)), weight.view(torch.int16).numpy().view(np.uint16))


@given(st.integers(1, 6), st.integers(1, 700), st.lists(st.integers(0, 255), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_any_few_exponents(rows: int, cols: int, exponents: list[int], data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    places = torch.randint(0, len(exponents), (rows, cols), generator=generator)
    plain = torch.randint(0, 256, (rows, cols), generator=generator)
    bits = (plain & 0x80) << 8 | torch.tensor(exponents)[places] << 7 | plain & 0x7F
    encoded = assert_round_trip(bits.to(torch.uint16).view(torch.bfloat16))
    if len(set(exponents)) <= 7:
        assert int(encoded.tile_starts[-1]) == 0


def test_commonest_exponents_come_first() -> None:
    counts = {100: 9, 101: 7, 102: 7, 90: 5, 91: 4, 92: 3, 93: 2, 94: 1}
    bits = torch.tensor([exponent << 7 for exponent, count in counts.items() for _ in range(count)])
    weight = bits.to(torch.int16).view(torch.bfloat16)
    assert fixed_length.commonest_exponents(weight).tolist() == [100, 101, 102, 90, 91, 92, 93, 0]
    assert fixed_length.commonest_exponents(weight[:9]).tolist() == [100] * 7 + [0]


def test_pieces_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = any_bits(37, 600)
    whole = fixed_length.encode(weight)
    monkeypatch.setattr(fixed_length, "_CHUNK", 2000)
    pieces = assert_round_trip(weight)
    for name, tensor in pieces.tensors.items():
        assert torch.equal(tensor, whole.tensors[name]), name


def test_views_are_encoded_in_their_own_order() -> None:
    base = normal(300, 400)
    for view in (base.T, base[:, 8:300], base[::3]):
        plain = view.clone(memory_format=torch.contiguous_format)
        assert torch.equal(fixed_length.decode(fixed_length.encode(view)), plain)


def test_bits_a_weight() -> None:
    weight = normal(512, 3584)
    assert 11.1 < 8 * fixed_length.encode(weight).nbytes / weight.numel() < 11.35

"""Every Triton kernel against its reference on fresh random inputs, outputs poisoned.

Not collected by itself: kernels/test_triton.py runs this file in a process of its own, in Triton's interpreter on the
CPU, or on a GPU where there is one. References run on the CPU. The interpreter cuts bfloat16 off instead of rounding
it.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_bagel.checkpoint.config import BAGEL_7B, DecoderConfig, Routed
from lowmem_bagel.checkpoint.gguf_blocks import BLOCK_TYPES, decoded
from lowmem_bagel.diagnostics.probe import why_no_triton
from lowmem_bagel.formats.base import Dequantized, encoded_linear
from lowmem_bagel.formats.dense.triton import TritonDense
from lowmem_bagel.formats.gguf import kernels as gguf
from lowmem_bagel.formats.gguf.packed import PackedBlocks
from lowmem_bagel.formats.gguf.products import DecodedBlocks
from lowmem_bagel.formats.gguf.trial import TRITON as GGUF
from lowmem_bagel.formats.gguf.trial import random_blocks
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.int8 import grouped as int8_grouped
from lowmem_bagel.formats.int8 import kernels as int8_matmul
from lowmem_bagel.formats.int8 import tiles
from lowmem_bagel.formats.int8.packed import PackedInt8
from lowmem_bagel.formats.int8.rotation import Rotated, Rotation
from lowmem_bagel.formats.int8.scaled import Int8Products
from lowmem_bagel.formats.int8.trial import GROUPED, MATMUL
from lowmem_bagel.formats.nf4 import codec as nf4_codec
from lowmem_bagel.formats.nf4 import kernels as nf4
from lowmem_bagel.formats.nf4.spec import side_by_side
from lowmem_bagel.formats.nf4.trial import TRITON
from lowmem_bagel.formats.registry import format_spec
from lowmem_bagel.kernels import (
    attention_int8,
    decode_attention,
    gemv,
    rope,
    swiglu_matmul,
    triton_language,
)
from lowmem_bagel.kernels import (
    elementwise as fused,
)
from lowmem_bagel.kernels import (
    grouped_matmul as grouped,
)
from lowmem_bagel.kernels import (
    trials as availability,
)
from lowmem_bagel.kernels.packed_gemv import Strip
from lowmem_bagel.kernels.trial_inputs import SMALL, Sizes
from lowmem_bagel.model.decoder import ExpertLayer
from lowmem_bagel.ops.attention.select import reference_attention
from lowmem_bagel.ops.elementwise import Elementwise
from lowmem_bagel.ops.linear import SWIGLU, Add, Dense, Linear, Product, RMSNorm, Weights
from lowmem_bagel.ops.rope import rope_at
from lowmem_bagel.ops.routed import Groups, Routes, route
from support.linears import PAIRS, call, linear
from support.numeric import quickly_deterministic, relative_l2
from support.triton_interpreter import in_quick_interpreter as in_quick_interpreter

ON_GPU = not triton_language.interpreted()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = {dtype: torch.finfo(dtype).eps * (0.51 if ON_GPU else 1) for dtype in DTYPES}
"""Largest relative error of rounding (on a GPU), or of cutting off."""
ROWS = [1, 2, 17, 4098] if ON_GPU else [1, 2, 17]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _own_seed(request: pytest.FixtureRequest) -> None:
    """Other inputs for every test, the same ones in whatever selection and order tests run."""
    seed = zlib.crc32(request.node.name.encode()) + int(os.environ.get("KERNEL_TEST_SEED", "0"))
    torch.default_generator.manual_seed(seed)  # the one that is drawn from; the cards' would take as long as a test


def fresh(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * std).to(dtype)


def integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def packed(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def there(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


def assert_close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative L2 and the largest difference, the latter against the largest value."""
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    result = result.cpu()
    assert relative_l2(result, expected) <= tolerance
    largest = (result.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert float(largest) <= 4 * tolerance


def close_enough(dtype: torch.dtype) -> float:
    return max(STEP[dtype], 2e-6)


# --- activations ---


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [40, 3584, 4300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_has_the_bits_of_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    x = fresh(rows, width, dtype=dtype, std=30)
    x[-1] = 0
    x[0, 3] = 6e4 if dtype is torch.float16 else 1e5
    values, scale = fused.quantize(*there(x))
    expected, expected_scale = fused.quantize_reference(x)
    assert torch.equal(values.cpu(), expected)
    assert torch.equal(scale.cpu(), expected_scale)
    assert scale[-1] == (0 if rows > 1 else expected_scale[-1])


def test_quantize_rounds_halves_to_even_and_reads_strided_rows() -> None:
    wide = fresh(3, 2 * 128)
    wide[:, :128] = torch.arange(128) - 63.5
    wide[:, 0] = 127  # so that the scale is 1 and every other value a half
    values, scale = fused.quantize(there(wide)[0][:, :128])
    assert scale.tolist() == [1.0] * 3
    assert values[0, 1:].tolist() == [round(v - 63.5) for v in range(1, 128)]


@pytest.mark.parametrize("largest", [1e-35, 1e-20, 1.0, 1e20, 3e38])
def test_quantize_divides_exactly_at_any_size(largest: float) -> None:
    """Smaller ones have scales that are no normal numbers, which a card takes for zero."""
    x = fresh(5, 400, std=0.3).clamp(-1, 1) * largest
    for found, expected in zip(fused.quantize(*there(x)), fused.quantize_reference(x), strict=True):
        assert torch.equal(found.cpu(), expected)


def test_blocks_of_rows_are_quantized_as_one() -> None:
    blocks = [fresh(1, rows, 40) for rows in (3, 1, 4)]
    found = fused.quantized(there(*blocks), None)
    for one, expected in zip(found, fused.quantize_reference(torch.cat(blocks, 1)), strict=True):
        assert torch.equal(one.cpu(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_stays_visible(bad: float) -> None:
    x = fresh(3, 100)
    x[1, 7] = bad
    _, scale = fused.quantize(*there(x))
    assert torch.isfinite(scale).tolist() == [True, False, True]


@pytest.mark.parametrize(("rows", "width"), [(1, 18944), (2, 3584), (17, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [1.0, 1e5])
def test_fused_norm_and_swiglu_quantize(rows: int, width: int, dtype: torch.dtype, std: float) -> None:
    std = min(std, 10.0) if dtype is torch.float16 else std
    x, norm = fresh(rows, 2 * width, dtype=dtype, std=std), 1 + 0.1 * fresh(width)
    pairs = (
        (fused.swiglu_quantize(*there(x)), fused.swiglu_quantize_reference(x)),
        (
            fused.rms_norm_quantize(*there(x[:, :width], norm.to(dtype)), 1e-6),
            fused.rms_norm_quantize_reference(x[:, :width], norm.to(dtype), 1e-6),
        ),
    )
    for (values, scale), (expected, expected_scale) in pairs:
        assert values.shape == expected.shape
        # Sums in another order, and exp, may move a value across a rounding boundary.
        cut_off = dtype is torch.bfloat16 and not ON_GPU
        assert_close(scale, expected_scale, 2 * STEP[dtype] if dtype is not torch.float32 else 2e-6)
        difference = (values.cpu().int() - expected.int()).abs()
        assert difference.max() <= (3 if cut_off else 1)
        assert difference.float().mean() < (0.7 if cut_off else max(1e-3, 3 / values.numel()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_and_swiglu(dtype: torch.dtype) -> None:
    for rows, width in ((1, 3584), (17, 200)):
        x, weight, gate_up = fresh(rows, width, dtype=dtype), fresh(width, dtype=dtype), fresh(rows, 2 * width) * 5
        normed = fused.rms_norm_fused(*there(x, weight), 1e-6)
        assert_close(normed, fused.rms_norm(x, weight, 1e-6), 2 * close_enough(dtype))
        gate_up = gate_up.to(dtype)
        assert_close(fused.swiglu_fused(*there(gate_up)), fused.swiglu(gate_up), 2 * close_enough(dtype))


# --- int8 matmul ---

TILES = [*tiles.CANDIDATES, *tiles.FEW_ROWS]


def can_run(tile: tiles.Tile) -> bool:
    return not ON_GPU or not tile.bulk or torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize("tile", list(filter(can_run, TILES)), ids=str)
def test_int8_matmul_equals_the_integer_reference(tile: tiles.Tile) -> None:
    for dtype, (m, n, k) in zip(DTYPES, ((130, 136, 32), (1, 8, 48), (17, 72, 208)), strict=True):
        values, weight = integers(m, k), integers(n, k)
        token, row, bias = fresh(m).abs() / 100, fresh(n).abs() / 100, fresh(n)
        for b in (None, bias.to(dtype)):
            y = int8_matmul.int8_matmul(*there(values, token, weight, row, b), dtype, tile, 3)
            exact = int8_matmul.int8_matmul_reference(values, token, weight, row, b, torch.float32)
            # A fused multiply-add rounds once where the reference rounds twice: then the terms count, not their sum.
            terms = exact.abs() + 2 * (0 if b is None else b.float().abs())
            tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            assert y.dtype == dtype
            assert ((y.cpu().float() - exact).abs() <= STEP[dtype] * exact.abs() + 2**-22 * terms + tiny).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_tiles_change_no_bit(dtype: torch.dtype, biased: bool) -> None:
    values, weight, token, row = there(integers(70, 96), integers(72, 96), fresh(70) / 99, fresh(72) / 99)
    bias = there(fresh(72, dtype=dtype))[0] if biased else None
    found = [
        int8_matmul.int8_matmul(values, token, weight, row, bias, dtype, tile, 3) for tile in filter(can_run, TILES)
    ]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_added_where_it_lies_as_if_after_the_product(dtype: torch.dtype) -> None:
    values, weight, token, row = there(integers(70, 96), integers(72, 96), fresh(70) / 99, fresh(72) / 99)
    before = there(fresh(70, 72, dtype=dtype))[0]
    product = int8_matmul.int8_matmul(values, token, weight, row, None, dtype, next(filter(can_run, TILES)), 3)
    for tile in filter(can_run, TILES):
        residual = before.clone()
        found = int8_matmul.int8_matmul(values, token, weight, row, None, dtype, tile, 3, residual)
        assert found.data_ptr() == residual.data_ptr()
        expected = before + product
        # float32 is not rounded before it is added on a card, nor is bfloat16 rounded in the interpreter, but cut off.
        if dtype is (torch.float32 if ON_GPU else torch.bfloat16):
            assert_close(found, expected.cpu(), close_enough(dtype))
        else:
            assert torch.equal(found, expected)


def test_int8_matmul_of_many_tokens_and_the_longest_row() -> None:
    values, weight = integers(4098, 32), integers(24, 32)
    long_values, long_weight = (
        torch.full((20, 18944), 127, dtype=torch.int8),
        torch.full((16, 18944), -127).to(torch.int8),
    )
    for a, b in ((values, weight), (long_values, long_weight)):
        token, row = torch.ones(a.shape[0]), torch.ones(b.shape[0])
        tile = tiles.Tiles(132, can_run(tiles.HOPPER[0])).choose(a.shape[0], *b.shape)
        y = int8_matmul.int8_matmul(*there(a, token, b, row, None), torch.float32, tile, 4)
        assert torch.equal(y.cpu(), (a.double() @ b.double().T).float())


def check_product(
    triton: Product, reference: Product, weights: Weights, pair: tuple[str, str], rows: Sequence[int], tolerance: float
) -> None:
    """The same from both, of a batch in such rows, or whole where there is but one number."""
    plain, layer = linear(reference, *weights), linear(triton, *there(*weights))
    given = call(pair, (sum(rows), 3 if len(rows) > 2 else 1), (plain.out_features, plain.in_features), seed=None)
    given = given if len(rows) == 1 else given.in_rows(rows)
    assert_close(layer(*given.to(DEVICE)), plain(*given.to(torch.device("cpu"))), tolerance)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize(
    ("rows", "rotated"),
    [(rows, False) for rows in ((1,), (1, 1), (8,), (9,), (2, 8, 3))] + [(rows, True) for rows in ((1, 1), (2, 8, 3))],
    ids=str,
)
def test_int8_products(rows: tuple[int, ...], rotated: bool, pair: tuple[str, str]) -> None:
    few = sum(rows) <= int8_matmul.UNQUANTIZED_TOKENS
    ways: list[Product] = [
        int8_matmul.TritonInt8(tiles.Tiles.of(DEVICE)),
        Dequantized(int8.dequantize) if few else int8.IntMm(),
    ]
    if rotated:
        ways = [Rotated(way, Rotation(32)) for way in ways]
    assert ways[0].fuses(sum(rows), None, SWIGLU) == few
    weights = Weights(*int8.quantize(fresh(80, 96)), fresh(80))
    # Of many tokens, a few activations fall to the next integer.
    check_product(*ways, weights, pair, rows, 1e-6 if few else 2e-3)


# --- one to eight tokens ---

FUSIONS = ["plain", "norm", "swiglu_in", "swiglu_out", "residual"]


def fusion(name: str, tokens: int, n: int, k: int, dtype: torch.dtype, std: float) -> tuple[Tensor, dict[str, Any]]:
    x = fresh(tokens, 2 * k if name == "swiglu_in" else k, dtype=dtype, std=std)
    options: dict[str, Any] = {"bias": fresh(n, dtype=dtype)}
    if name in ("norm", "swiglu_out"):
        options |= {"norm": fresh(k, dtype=dtype), "eps": 1e-6}
    if name == "residual":
        options = {"residual": fresh(tokens, n, dtype=dtype)}
    return x, options | {"swiglu_input": name == "swiglu_in", "swiglu_output": name == "swiglu_out"}


def fusion_tolerance(name: str, dtype: torch.dtype) -> float:
    """silu of a gate g multiplies the gate's relative error by up to |g|, here some tens."""
    return max(STEP[dtype], 5e-5 if name == "swiglu_out" else 2e-6)


def moved(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in options.items()}


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("quantized", [False, True])
def test_gemv(tokens: int, name: str, quantized: bool) -> None:
    for dtype, std, n, k in (
        (torch.float32, 1.0, 10, 200),
        (torch.bfloat16, 1e5, 4, 520),
        (torch.float16, 1.0, 6, 1024),
        (torch.float32, 0.0, 4, 64),
    ):
        x, options = fusion(name, tokens, n, k, dtype, std)
        weight = integers(n, k) if quantized else fresh(n, k, dtype=dtype)
        scale = fresh(n).abs() / 100 if quantized else None
        expected = gemv.gemv_reference(x, weight, scale=scale, **options)
        result = gemv.gemv(*there(x, weight), scale=there(scale)[0], **moved(options))
        assert_close(result, expected, fusion_tolerance(name, dtype))


@pytest.mark.parametrize("strip", [gemv.Strip(1, 128, 1, 1), gemv.Strip(16, 64, 8, 3)], ids=str)
def test_gemv_in_other_strips_and_another_output_dtype(strip: gemv.Strip) -> None:
    x, weight = fresh(3, 200, dtype=torch.bfloat16), fresh(21, 200, dtype=torch.bfloat16)
    expected = gemv.gemv_reference(x, weight, dtype=torch.float32)
    assert_close(gemv.gemv(*there(x, weight), dtype=torch.float32, strip=strip), expected, 1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("name", FUSIONS)
def test_nf4_gemv(tokens: int, name: str) -> None:
    for dtype, std, n, k in (
        (torch.float32, 1.0, 10, 192),
        (torch.bfloat16, 1e5, 4, 1024),
        (torch.float32, 0.0, 8, 64),
    ):
        x, options = fusion(name, tokens, n, k, dtype, std)
        weight, absmax = packed(n, k // 2), fresh(n, k // 64).abs()
        expected = nf4.nf4_gemv_reference(x, weight, absmax, **options)
        result = nf4.nf4_gemv(*there(x, weight, absmax), **moved(options))
        assert_close(result, expected, max(fusion_tolerance(name, dtype), 2e-4 if ON_GPU else 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_dequantize_has_the_bits_of_the_codec(dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter cuts bfloat16 off")
    for n, k in ((1, 64), (17, 192), (70, 128)):
        weight, absmax = packed(n, k // 2), fresh(n, k // 64).abs()
        result = nf4.nf4_dequantize(*there(weight, absmax), dtype)
        assert torch.equal(result.cpu(), nf4_codec.dequantize(weight, absmax, dtype))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_gguf_gemv(kind: str, name: str, tokens: int) -> None:
    for dtype, std, n, k in (
        (torch.float32, 1.0, 10, 256),
        (torch.bfloat16, 1e5, 4, 1280),
        (torch.float32, 0.0, 4, 512),
    ):
        x, options = fusion(name, tokens, n, k, dtype, std)
        weight = random_blocks(torch.device("cpu"), kind, n, k, 1 / 32).flatten()
        expected = gguf.gguf_gemv_reference(x, weight, kind, **options)
        result = gguf.gguf_gemv(*there(x, weight), kind, **moved(options))
        assert_close(result, expected, fusion_tolerance(name, dtype))


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
@pytest.mark.parametrize("strip", [Strip(1, 32, 1), Strip(4, 128, 4)], ids=str)
def test_gguf_gemv_in_other_strips(kind: str, strip: Strip) -> None:
    x, weight = fresh(2, 768), random_blocks(torch.device("cpu"), kind, 5, 768).flatten()
    expected = gguf.gguf_gemv_reference(x, weight, kind)
    assert_close(gguf.gguf_gemv(*there(x, weight), kind, strip=strip), expected, 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_gguf_dequantize_has_the_bits_of_the_reference(kind: str, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter cuts bfloat16 off")
    for n, k in ((1, 256), (7, 1024), (70, 768)):
        weight = random_blocks(torch.device("cpu"), kind, n, k).flatten()
        result = gguf.gguf_dequantize(*there(weight), kind, (n, k), dtype)
        assert torch.equal(result.cpu(), decoded(weight, kind, (n, k), dtype))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_gguf_products(kind: str) -> None:
    """What a layer asks for more tokens than are multiplied as the weight is read, in rows and in groups."""
    product, reference = gguf.TritonBlocks(kind), DecodedBlocks(PackedBlocks(kind))
    assert [product.fuses(tokens, None, SWIGLU) for tokens in (1, 2)] == [True, False]
    weight, x = random_blocks(torch.device("cpu"), kind, 48, 256).flatten(), fresh(20, 256)
    norm = RMSNorm(fresh(256), 1e-6)
    for before, after in ((None, None), (norm, None), (norm, SWIGLU), (None, Add(fresh(20, 48)))):
        bias = None if isinstance(after, Add) else fresh(48)
        wanted = reference.product(x, Weights(weight, None, bias), before, after)
        moved_norm = RMSNorm(norm.weight.to(DEVICE), norm.eps) if before is norm else None
        moved_after = Add(after.residual.to(DEVICE)) if isinstance(after, Add) else after
        found = product.product(x.to(DEVICE), Weights(*there(weight, None, bias)), moved_norm, moved_after)
        assert_close(found, wanted, 1e-5)
    groups = Groups(torch.tensor([0, 3, 3, 20], dtype=torch.int32), torch.arange(20, dtype=torch.int32).flip(0))
    wanted = reference.grouped(x, Weights(weight), groups)
    found = product.grouped(x.to(DEVICE), Weights(weight.to(DEVICE)), Groups(*there(*groups)))
    assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (20,)], ids=str)
def test_nf4_products(rows: tuple[int, ...], pair: tuple[str, str]) -> None:
    weights = Weights(packed(48, 64), fresh(48, 2).abs(), fresh(48))
    assert nf4.TritonNf4().fuses(sum(rows), None, SWIGLU) == (sum(rows) == 1)
    check_product(nf4.TritonNf4(), Dequantized(nf4_codec.dequantize), weights, pair, rows, 1e-4)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize(
    ("rows", "bias"),
    [((1,), True), ((1, 1), True), ((20,), True), ((4, 2, 14), True), ((1,), False), ((20,), False)],
    ids=str,
)
def test_dense_products(rows: tuple[int, ...], bias: bool, pair: tuple[str, str]) -> None:
    weights = Weights(fresh(48, 128), None, fresh(48) if bias else None)
    check_product(TritonDense(), Dense(), weights, pair, rows, 2e-6)


# --- rope and attention ---

HEADS, KV_HEADS, D = 6, 2, 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [torch.arange(10).view(2, 5), torch.tensor([[7], [9]]), torch.tensor([[3]])])
def test_qk_norm_rope_into_part_of_a_block(dtype: torch.dtype, positions: Tensor) -> None:
    qkv = fresh(2, 5, (HEADS + 2 * KV_HEADS) * D, dtype=dtype)
    q_norm, k_norm, table = fresh(D, dtype=dtype), fresh(D, dtype=dtype), rope_at(positions, D, 1e6)

    def block(device: object) -> list[Tensor]:
        shapes = ((2, 9, heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS))
        return [torch.full(shape, float("nan"), dtype=dtype, device=device) for shape in shapes]

    found, wanted = block(DEVICE), block("cpu")
    into, expected = ([tensor[:, 2:7] for tensor in tensors] for tensors in (found, wanted))
    rope.qk_norm_rope_reference(qkv, q_norm, k_norm, 1e-6, table, HEADS, KV_HEADS, expected)
    rope.qk_norm_rope(*there(qkv, q_norm, k_norm), 1e-6, tuple(there(*table)), HEADS, KV_HEADS, into)
    for got, want in zip(into, expected, strict=True):
        assert_close(got, want, close_enough(dtype))
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got.isnan().cpu(), want.isnan()), "it wrote outside its range of the block"


def rope_tables(positions: int) -> tuple[Tensor, Tensor]:
    cos, sin = rope_at(torch.arange(positions)[None], D, 1e6)
    return cos[0, :, 0], sin[0, :, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "length"), [(200, 0), (200, 1), (200, 77), (301, 300), (70, 64), (900, 897)])
def test_attend_token_writes_one_row_and_reads_no_further(dtype: torch.dtype, size: int, length: int) -> None:
    if dtype is torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter's matmul takes bfloat16 bits for integers")
    cache = fresh(size, 2, KV_HEADS, D, dtype=dtype)
    cache[length:] = float("nan")
    qkv = fresh((HEADS + 2 * KV_HEADS) * D, dtype=dtype)
    q_norm, k_norm = fresh(D, dtype=dtype, std=3), fresh(D, dtype=dtype)
    counters, tables = torch.tensor([11, length], dtype=torch.int32), rope_tables(30)
    expected_cache = cache.clone()
    expected = decode_attention.attend_token_reference(
        qkv, q_norm, k_norm, 1e-6, tables, counters[:1], expected_cache[:, 0], expected_cache[:, 1], counters[1:]
    )
    cache, counters = there(cache, counters)
    result = decode_attention.attend_token(
        *there(qkv, q_norm, k_norm), 1e-6, tuple(there(*tables)),
        counters[:1], cache[:, 0], cache[:, 1], counters[1:], parts=4,
    )  # fmt: skip
    # Weights are rounded to the cache's dtype before they meet the values.
    assert_close(result, expected, 2 * close_enough(dtype))
    assert_close(cache[length], expected_cache[length], close_enough(dtype))
    cache[length], expected_cache[length] = 0, 0
    assert torch.equal(cache.cpu().nan_to_num(9), expected_cache.nan_to_num(9)), "it wrote beside its row"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize(("size", "winners"), [(5000, [4999]), (5000, [1024, 1700, 3000]), (9, [1]), (3072, [])])
def test_next_token(dtype: torch.dtype, on_device: bool, size: int, winners: list[int]) -> None:
    logits, table = fresh(size, dtype=dtype), fresh(size, 48)
    logits[winners] = 40
    token, embedded = torch.tensor([7]), fresh(1, 48, dtype=dtype)
    at = torch.tensor([3, 2_000_000], dtype=torch.int32)
    results = [t.clone() for t in (token, embedded, at)]
    fused.next_token_reference(logits, table if on_device else None, token, embedded, at)
    results, (logits, table) = there(*results), there(logits, table)
    fused.next_token(logits, table if on_device else None, *results)
    if winners:
        assert int(results[0]) == winners[0]
    assert_close(results[1], embedded, STEP[dtype])
    for got, want in zip(results[::2], (token, at), strict=True):
        assert torch.equal(got.cpu(), want)


def test_next_token_shows_a_nan() -> None:
    logits = fresh(3000).to(DEVICE)
    logits[2500] = float("nan")
    token, embedded = torch.tensor([7], device=DEVICE), fresh(1, 48).to(DEVICE)
    fused.next_token(logits, None, token, embedded, torch.zeros(2, dtype=torch.int32, device=DEVICE))
    assert int(token) == 2500


def trial_sizes() -> Sizes:
    return Sizes(BAGEL_7B.decoder, torch.bfloat16) if ON_GPU else Sizes(SMALL, torch.float32)


def test_the_trial_of_triton_itself_passes() -> None:
    assert why_no_triton(DEVICE) is None


def test_every_kernel_passes_its_trial() -> None:
    kernels = {**availability.KERNELS, "int8_matmul": MATMUL, "int8_grouped": GROUPED, "nf4": TRITON}
    # Rows of whole blocks of a K type are too much for the interpreter.
    kernels |= {kind: kernel for kind, kernel in GGUF.items() if ON_GPU or kind == "Q8_0"}
    refused = {
        name: availability.why_not(kernel, DEVICE, trial_sizes(), again=True) for name, kernel in kernels.items()
    }
    assert {name: why for name, why in refused.items() if why is not None} == {}


def test_trials_of_fp16_arithmetic_are_of_what_surrounds_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that has both, `--dtype float16` runs these kernels, with float32 around the products."""
    launched: set[torch.dtype] = set()

    def watched(launch: Callable[..., Any], place: int) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            launched.add(args[place] if isinstance(args[place], torch.dtype) else args[place].dtype)
            return launch(*args, **options)

        return run

    for module, name, place in (
        (int8_matmul, "int8_matmul", 5), (int8_grouped, "int8_grouped", 5), (int8_matmul, "gemv", 0),
        (fused, "rms_norm_fused", 0), (fused, "swiglu_quantize", 0), (grouped, "add_slots", 0),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, watched(getattr(module, name), place))
    sizes = replace(trial_sizes(), dtype=torch.float16)
    for kernel in (MATMUL, GROUPED, availability.KERNELS["fused"]):
        launched.clear()
        assert availability.why_not(kernel, DEVICE, sizes, again=True) is None
        assert launched == {torch.float32}


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_layer_of_int8_in_fp16_arithmetic(tokens: int) -> None:
    """What a card with Triton computes beside what one without computes."""
    config = replace(BAGEL_7B, decoder=DecoderConfig(64, 2, 2, 1, 96, 128, 1e6, 1e-6))
    rope = rope_at(torch.arange(tokens)[None], 32, 1e4)
    hidden = fresh(1, tokens, 64, std=3.0)
    hidden[0, 0, 5] = 1e5  # as activations of trained models have them, beyond fp16's range

    @torch.no_grad()
    def layer(product: Product, device: torch.device) -> Tensor:
        def made(layer: int, expert: str, name: str, k: int, n: int) -> Linear:
            biased = torch.float32 if name == "qkv" else None
            return encoded_linear(format_spec("int8"), k, n, product, biased)

        module = ExpertLayer(config, 0, "gen", made, torch.float16, around.rotate).to(device)
        torch.manual_seed(7)
        for name, parameter in module.named_parameters():
            values = fresh(*parameter.shape)
            whole = (40 * values).round().clamp(-127, 127)
            parameter.copy_(whole if parameter.dtype == torch.int8 else values / 300 if "scale" in name else values)
        x = hidden.to(device)
        room = module.room(1, tokens, device)
        module.project(x, tuple(table.to(device) for table in rope), room)
        return module.finish(x, [room[0]])

    around = Elementwise(torch.float16)
    reference = layer(Int8Products(around, PackedInt8(torch.float16)), torch.device("cpu"))
    found = layer(int8_matmul.TritonInt8(tiles.Tiles.of(DEVICE)), DEVICE)
    assert found.dtype == reference.dtype == torch.float32 and reference.isfinite().all()
    assert_close(found, reference, 1e-2)


def last_spoiled(launch: Callable[..., Any], width: int, *args: Any, **options: Any) -> Any:
    """What a kernel gives whose last program, of `width` columns at least, fails."""
    result = launch(*args, **options)
    if isinstance(result, Tensor):
        result[..., -width:] = 0
    return result


@pytest.mark.parametrize(
    ("kernel", "module", "function", "width"),
    [
        (availability.KERNELS["gemv"], gemv, "gemv", 1),
        (availability.KERNELS["fused"], fused, "rms_norm_fused", 64),
        (availability.KERNELS["fused"], fused, "swiglu_fused", 64),
        (availability.KERNELS["swiglu_matmul"], swiglu_matmul, "swiglu_matmul", 1),
        (availability.KERNELS["decode_attention"], decode_attention, "attend_token", 1),
        (availability.KERNELS["grouped_matmul"], grouped, "grouped_matmul", 1),
        (availability.KERNELS["grouped_matmul"], grouped, "add_slots", 1),
        (GROUPED, int8_grouped, "int8_grouped", 1),
        (MATMUL, int8_matmul, "gemv", 1),
        (MATMUL, int8_matmul, "int8_matmul", 1),
        (TRITON, nf4, "nf4_gemv", 1),
        (TRITON, nf4, "nf4_dequantize", 1),
        (GGUF["Q6_K"], gguf, "gguf_gemv", 1),
        (GGUF["Q4_K"], gguf, "gguf_dequantize", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trial_sees_one_program_fail(
    kernel: availability.Kernel, module: Any, function: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, function, partial(last_spoiled, getattr(module, function), width))
    assert "its trial was wrong by" in (availability.why_not(kernel, DEVICE, trial_sizes(), again=True) or "")


@pytest.mark.skipif(not ON_GPU, reason="the interpreter's time says nothing")
def test_a_trial_of_compiled_kernels_takes_no_time() -> None:
    for kernel in (*availability.KERNELS.values(), MATMUL, GROUPED, TRITON, *GGUF.values()):
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            availability.why_not(kernel, DEVICE, trial_sizes(), again=True)
            seconds.append(time.perf_counter() - start)
        assert seconds[1] < 1, seconds


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_a_captured_graph_follows_the_counters() -> None:
    torch.use_deterministic_algorithms(False)
    qkv = fresh((HEADS + 2 * KV_HEADS) * D).to(DEVICE)
    norm, cache = torch.ones(D, device=DEVICE), torch.zeros(100, 2, KV_HEADS, D, device=DEVICE)
    tables = tuple(there(*rope_tables(100)))
    weight, counters = fresh(HEADS * D, HEADS * D).to(DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)

    def step(cache: Tensor, counters: Tensor) -> Tensor:
        position, length = counters.split(1)
        keys, values = cache.unbind(1)
        attended = decode_attention.attend_token(qkv, norm, norm, 1e-6, tables, position, keys, values, length)
        counters += 1
        return gemv.gemv(attended.view(1, -1), weight)

    plain_cache, plain_counters = cache.clone(), counters.clone()
    expected = [step(plain_cache, plain_counters).clone() for _ in range(5)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(cache, counters)
    cache.zero_()
    counters.zero_()
    for want in expected:
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.skipif(ON_GPU and torch.cuda.get_device_capability()[0] != 9, reason="needs bulk copies")
# The interpreter multiplies the bit patterns of bf16.
@pytest.mark.skipif(not ON_GPU, reason="the interpreter has no limit, and takes minutes")
def test_more_rows_than_a_grid_has_in_its_second_dimension() -> None:
    gate_up = fresh(65_536 + 3, 64)
    assert_close(fused.swiglu_fused(*there(gate_up)), fused.swiglu(gate_up), close_enough(gate_up.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if ON_GPU else [])], ids=str)
def test_swiglu_matmul(dtype: torch.dtype) -> None:
    tile = swiglu_matmul.TILE if ON_GPU else swiglu_matmul.SwigluTile(32, 16, 32, 4, 2)
    for m, n, k in ((1, 8, 16), (17, 24, 40), (130, 72, 208)):
        x, weight = fresh(m, k).to(dtype), (fresh(2 * n, k) / k**0.5).to(dtype)
        y = swiglu_matmul.swiglu_matmul(*there(x, weight), 3, tile).cpu()
        expected = swiglu_matmul.swiglu_matmul_reference(x.double(), weight.double())
        assert relative_l2(y, expected) < 3 * STEP[dtype]
        assert float((y.double() - expected).abs().max()) < 16 * STEP[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("bias", [True, False])
def test_dense_product_with_swiglu_in_its_matmul(bias: bool) -> None:
    if not can_run(tiles.HOPPER[0]):
        pytest.skip("needs bulk copies")
    tokens, product = swiglu_matmul.LEAST_TOKENS, TritonDense(swiglu_processors=3)
    assert [product.fuses(n, None, SWIGLU) for n in (1, 2, tokens - 1, tokens)] == [True, False, False, True]
    assert not product.fuses(tokens, SWIGLU, None)
    weight, added = fresh(96, 64, dtype=torch.float16, std=0.1), fresh(96, dtype=torch.float16) if bias else None
    given = call(("rmsnorm", "swiglu"), (1, tokens), (96, 64), seed=None).to(torch.float16)
    result = linear(product, *there(weight, None, added))(*given.to(DEVICE)).cpu()
    assert result.shape == (1, tokens, 48)
    assert relative_l2(result, given.exact(weight, added)) < 4 * STEP[torch.float16]


# --- routed experts ---


def uneven(tile: int, rows: int | None) -> Groups:
    """Groups of more rows than a tile has, of none and of few."""
    offsets = torch.tensor([0, tile + 3, tile + 3, tile + 4, tile + 4, tile + 13], dtype=torch.int32)
    return Groups(offsets, None if rows is None else torch.randint(0, rows, (tile + 13,), dtype=torch.int32))


def there_too(groups: Groups) -> Groups:
    return Groups(*there(*groups))


def nf4_of_short_rows(matrix: Tensor) -> Weights:
    """Rows that are no whole blocks, side by side as they are stored."""
    packed, absmax = nf4_codec.quantize(matrix.view(side_by_side(tuple(matrix.shape))))
    return Weights(packed.view(len(matrix), -1), absmax)


# The interpreter multiplies the bit patterns of bf16.
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if ON_GPU else [])], ids=str)
@pytest.mark.parametrize("tile", grouped.TILES, ids=str)
@pytest.mark.parametrize("rows", [None, 20])
def test_grouped_matmul(rows: int | None, tile: grouped.GroupTile, dtype: torch.dtype) -> None:
    for n, k in ((40, 72), (136, 128)):
        groups = uneven(tile.m, rows)
        x, weight = fresh(rows or tile.m + 13, k, dtype=dtype), fresh(5 * n, k, dtype=dtype, std=k**-0.5)
        y = grouped.grouped_matmul(*there(x, weight), there_too(groups), tile)
        expected = grouped.grouped_matmul_reference(x.double(), weight.double(), groups)
        assert y.dtype == dtype
        assert_close(y.cpu().double(), expected, 2 * STEP[dtype])


@pytest.mark.parametrize("tile", int8_grouped.TILES, ids=str)
@pytest.mark.parametrize("rows", [None, 20])
def test_int8_grouped_has_the_bits_of_the_reference(rows: int | None, tile: grouped.GroupTile) -> None:
    for n, k in ((40, 80), (264, 128)):
        groups = uneven(tile.m, rows)
        values, weight = integers(rows or tile.m + 13, k), integers(5 * n, k)
        scales = fresh(len(values)).abs() / 100, fresh(len(weight)).abs() / 100
        y = int8_grouped.int8_grouped(
            *there(values, scales[0], weight, scales[1]), there_too(groups), torch.float32, tile
        )
        expected = int8_grouped.int8_grouped_reference(values, scales[0], weight, scales[1], groups, torch.float32)
        assert_close(y, expected, 1e-6)


ROUTINGS = (
    [(1, 16, 8), (9, 16, 8), (40, 3, 1), (33, 4, 4)] if ON_GPU else [(1, 16, 8), (9, 6, 3), (40, 3, 1), (33, 2, 2)]
)
"""Tokens, experts and how many a token has. The interpreter takes as much longer as there are experts: of those that
nobody asks for it has the first, of all that everybody asks for the last, with more rows than a tile."""


@pytest.mark.parametrize(("tokens", "count", "active"), ROUTINGS)
def test_products_of_routed_experts(tokens: int, count: int, active: int) -> None:
    """A whole MLP as a layer asks for it, in every form that these kernels serve, against a loop over experts."""
    hidden, size = 96, 32
    x, router = fresh(tokens, hidden, dtype=torch.float16), fresh(count, hidden, dtype=torch.float16, std=0.1)
    matrices = [fresh(count * 2 * size, hidden, std=0.1), fresh(count * hidden, size, std=0.2)]
    halves = [Weights(matrix.half()) for matrix in matrices]
    quantized = [Weights(*int8.quantize(matrix)) for matrix in matrices]
    coded = [nf4_of_short_rows(matrix) for matrix in matrices]
    ways: list[tuple[Product, Product, list[Weights], float]] = [
        (TritonDense(groups=True), Dense(), halves, 4 * STEP[torch.float16]),
        (int8_matmul.TritonInt8(tiles.Tiles.of(DEVICE), True), int8.IntMm(), quantized, 3e-3),
        (nf4.TritonNf4(TritonDense(groups=True)), Dequantized(nf4_codec.dequantize), coded, 4 * STEP[torch.float16]),
    ]
    routes = route(x, router, active)
    moved = Routes(*there(routes.offsets, routes.tokens, routes.places, routes.gains))
    residual = fresh(tokens, hidden, dtype=torch.float16)
    for ours, reference, (gate_up, down), tolerance in ways:
        found = ours.grouped(there(x)[0], Weights(*there(*gate_up)), moved.scattered)
        found = ours.grouped(found, Weights(*there(*down)), moved.sorted, SWIGLU)
        found = ours.add_slots(there(residual.clone())[0], found, moved)
        expected = reference.grouped(x, gate_up, routes.scattered)
        expected = reference.grouped(expected, down, routes.sorted, SWIGLU)
        assert_close(found, reference.add_slots(residual.clone(), expected, routes), tolerance)


# --- attention of integers ---

ATTENTION_SHAPES = [
    # queries, keys, heads, key/value heads, head size; in the interpreter three heads share one, not seven
    (130, 201, 14 if ON_GPU else 6, 2, 128),
    (67, 64, 4, 4, 64),
    (1, 1, 2, 1, 32),
    (33, 577, 3, 1, 32),
]
LAUNCHES = [attention_int8.PLAIN, *([attention_int8.HOPPER] if can_run(tiles.HOPPER[0]) else [])]
# The interpreter multiplies the bit patterns of bf16.
HALVES = [torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def views(fused: Tensor, caches: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q a slice of a fused projection; k and v ranges of caches that lie in each other."""
    q = fused[:, : heads * caches.shape[-1]].unflatten(1, (heads, -1))
    k, v = caches[4:-5].unbind(1)
    return q, k, v


def attended(shape: tuple[int, ...], dtype: torch.dtype, outliers: float) -> tuple[Tensor, Tensor, int]:
    """What `views` takes: the entries out of view are NaN, and channels of the keys stand off for all tokens."""
    queries, keys, heads, kv, width = shape
    fused = fresh(queries, (heads + 2 * kv) * width, dtype=dtype)
    caches = torch.full((keys + 9, 2, kv, width), torch.nan, dtype=dtype)
    caches[4:-5] = fresh(keys, 2, kv, width)
    caches[:, 0, :, ::8] += outliers * fresh(kv, width)[:, ::8]
    return fused, caches, heads


def exactly_attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference_attention(q[None], k[None], v[None])[0]


@pytest.mark.parametrize("outliers", [0.0, 30.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_attention_of_integers(
    launch: attention_int8.Launch, shape: tuple[int, ...], dtype: torch.dtype, outliers: float
) -> None:
    fused, caches, heads = attended(shape, dtype, outliers)
    q, k, v = views(fused, caches, heads)
    result = attention_int8.attention_int8(*views(*there(fused, caches), heads), launch)
    assert_close(result, attention_int8.attention_int8_reference(q, k, v), 2 * STEP[dtype])
    assert_close(result.double(), exactly_attended(q, k, v), 0.02)


def test_without_smoothing_outlier_keys_spoil_the_weights() -> None:
    q, k, v = views(*attended((130, 201, 4, 2, 128), torch.float16, 30.0))
    exact = exactly_attended(q, k, v)
    smooth, raw = (
        relative_l2(attention_int8.attend_reference(attention_int8.quantize_reference(q, keys), v), exact)
        for keys in (attention_int8.smoothed(k), k)
    )
    assert smooth < 0.02
    assert raw > 5 * smooth


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_keys_are_quantised_as_by_the_reference(dtype: torch.dtype) -> None:
    q, k, _ = views(*attended((70, 577, 4, 2, 64), dtype, 3.0))
    q[5] = 0
    found = attention_int8.quantize(*there(q, k))
    expected = attention_int8.quantize_reference(q, attention_int8.smoothed(k))
    assert torch.equal(found.q.cpu(), expected.q)
    assert found.q_scale[:, 5].eq(0).all()
    assert_close(found.q_scale, expected.q_scale, 1e-6)
    assert_close(found.k_scale, expected.k_scale, 1e-5)  # a mean is a sum in another order
    difference = (found.k.cpu().int() - expected.k.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3
    assert found.k[:, 577:].eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_attention_of_integers_hides_nothing_that_is_not_finite(launch: attention_int8.Launch, bad: float) -> None:
    for spoiled in range(3):
        given = views(*attended((70, 101, 4, 2, 32), torch.float16, 0.0))
        given[spoiled][66, 1, 7] = bad
        finite = torch.isfinite(attention_int8.attention_int8(*there(*given), launch)).cpu()
        touched = (slice(66, 67), slice(1, 2)) if spoiled == 0 else (slice(None), slice(2, 4))
        reached = finite[touched] if spoiled < 2 else finite[touched][..., 7]
        assert not reached.any()
        assert finite[:, :1].all()


# --- the cases of `bench kernels` ---


def test_the_benchmarks_cases_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kernel, in small; at the 7B model's shapes it is the benchmark itself that checks them."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", quickly_deterministic)
    from lowmem_bagel.benchmarks.cases import Setup
    from lowmem_bagel.benchmarks.suites.kernels import PARTS
    from lowmem_bagel.benchmarks.suites.routed import PARTS as ROUTED

    small = Setup(DEVICE, DecoderConfig(64, 1, 2, 1, 128, 128, 1e6, 1e-6), 18, True, torch.float16)
    cases = {case.kernel: case for part in PARTS for case in part(small)}
    routed = replace(small.decoder, routed=Routed(4, 2, 32, frozenset((0,))))
    cases |= {case.kernel: case for part in ROUTED for case in part(replace(small, decoder=routed))}
    assert {"grouped_matmul", "int8_grouped", "MLP, bf16", "MLP, int8", "MLP, nf4"} <= set(cases)
    assert {"int8_matmul", "gemv bf16", "gemv nf4", "rms_norm", "qk_norm_rope", "decode_attention"} <= set(cases)
    for case in cases.values():
        assert case.check()["error"] <= max(case.tolerance, 2 * STEP[torch.float16]), case.kernel

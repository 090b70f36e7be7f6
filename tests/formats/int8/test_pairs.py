"""The INT8 matmul by pairs of blocks: its source on the CPU, with what it is made of emulated, and where it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import cluster_emulation, cuda_emulation

from lowmem_bagel.formats.int8 import kernels
from lowmem_bagel.formats.int8 import pairs as pairs_module
from lowmem_bagel.formats.int8.codec import IntMm
from lowmem_bagel.formats.int8.kernels import TritonInt8, int8_matmul_reference
from lowmem_bagel.formats.int8.pairs import KINDS, LEAST_TOKENS, Pairs, results
from lowmem_bagel.formats.int8.tiles import Tiles
from lowmem_bagel.formats.int8.trial import why_not_pairs
from lowmem_bagel.kernels.cuda_source import CudaSource
from lowmem_bagel.kernels.elementwise import quantize_reference, swiglu_fused
from lowmem_bagel.ops.linear import SWIGLU, Add, RMSNorm, Weights, swiglu

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(cuda_emulation.compiler() is None, reason="the emulation needs g++")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> CudaSource:
    monkeypatch.setattr(pairs_module, "tensor_map", cluster_emulation.matrix)
    return CudaSource(CPU, torch.bfloat16, cluster_emulation.Module)


def numbers(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """values, token_scale, weight, row_scale, bias, residual."""
    generator = torch.Generator().manual_seed(m + n + k)
    values, weight = (torch.randint(-127, 128, (r, k), generator=generator, dtype=torch.int8) for r in (m, n))
    token_scale, row_scale = (torch.rand(r, generator=generator) / 100 for r in (m, n))
    bias, residual = (torch.randn(shape, generator=generator).bfloat16() for shape in ((n,), (m, n)))
    return values, token_scale, weight, row_scale, bias, residual


@needs_compiler
@pytest.mark.parametrize(
    ("m", "n", "k", "processors"),
    [(300, 272, 528, 4), (130, 16, 144, 3)],
)
def test_products_are_those_of_the_reference_to_the_bit(
    source: CudaSource, m: int, n: int, k: int, processors: int
) -> None:
    operands = numbers(m, n, k)
    values, token_scale, weight, row_scale, bias, residual = operands
    biased, added, activated = results(Pairs(source, processors), operands)
    plain = int8_matmul_reference(values, token_scale, weight, row_scale, None, torch.bfloat16)
    assert torch.equal(added, (plain.float() + residual.float()).bfloat16())
    wanted = swiglu(plain).double()  # by another exponential: a rounding apart, of silu and then of the product
    assert ((activated.double() - wanted).abs() <= 2**-7 * wanted.abs() + 1e-30).all()
    one = int8_matmul_reference(values, torch.ones(m), weight, row_scale, None, torch.float32)
    exact = one.double() * token_scale[:, None].double() + bias.double()
    assert torch.equal(biased, exact.float().bfloat16())  # by a fused multiply-add


@needs_compiler
def test_a_linear_s_products_of_many_tokens_go_by_pairs(source: CudaSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands before and after, as the same products by tiles."""
    monkeypatch.setattr(pairs_module, "LEAST_TOKENS", 40)
    monkeypatch.setattr(kernels, "LEAST_TOKENS", 40)
    monkeypatch.setattr(kernels.fused, "quantized", lambda x, before: quantize_reference(before(x)))
    asked: list[bool] = []

    class Told(Pairs):
        def multiply(self, *given: Any, **named: Any) -> torch.Tensor:
            asked.append(named.get("activates", False))
            return super().multiply(*given, **named)

    _, _, weight, scales, _, _ = numbers(1, 64, 48)
    x, norm = torch.randn(2, 24, 48).bfloat16(), RMSNorm(torch.rand(48).bfloat16(), 1e-6)
    pairs, plain = TritonInt8(Tiles(1, bulk=False), pairs=Told(source, 2)), IntMm()
    for weights, after in (
        (Weights(weight, scales), None),
        (Weights(weight, scales, torch.randn(64).bfloat16()), None),
        (Weights(weight, scales), SWIGLU),
        (Weights(weight, scales), Add(torch.randn(2, 24, 64).bfloat16())),
    ):
        given = [Add(after.residual.clone()) if isinstance(after, Add) else after for _ in range(2)]
        found, expected = (
            product.product(x, weights, norm, one) for product, one in zip((pairs, plain), given, strict=True)
        )
        assert found.shape == expected.shape
        distance = (found.float() - expected.float()).abs() / expected.float().abs().clamp(min=1e-2)
        assert distance.max() < 2**-6
    assert asked == [False, False, True, False]
    assert [pairs.fuses(tokens, norm, SWIGLU) for tokens in (1, 2, 39, 48)] == [True, False, False, True]
    assert not TritonInt8(Tiles(1, bulk=False)).fuses(48, norm, SWIGLU)


def test_what_has_no_whole_pieces_of_16_bytes_is_left_to_tiles(source: CudaSource) -> None:
    pairs = Pairs(source, 2)

    def takes(tokens: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, activates: bool = False) -> bool:
        weights = Weights(torch.zeros(n, k, dtype=torch.int8), torch.zeros(n))
        return pairs.takes(tokens, weights, dtype, activates)

    many = LEAST_TOKENS
    assert takes(many, 24, 48) and takes(many, 48, 48, activates=True)
    assert not takes(many - 1, 24, 48)
    assert not takes(many, 24, 40)
    assert not takes(many, 20, 48)
    assert not takes(many, 24, 48, activates=True)
    assert not takes(many, 24, 48, torch.float32)


def test_it_says_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_pairs(CudaSource(CPU, torch.bfloat16)) == "needs a CUDA GPU, not cpu"
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    why = why_not_pairs(CudaSource(card, torch.bfloat16))
    assert why == "is made for compute capability 9.0; this card has 8.9"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert why_not_pairs(CudaSource(card, torch.float16)) == "computes in bfloat16 only"


def test_every_kind_is_compiled_at_once(source: CudaSource) -> None:
    made: list[dict[str, int]] = []

    class Source(CudaSource):
        def kernel(self, source: str, name: str, *, shared_bytes: int = 0, **defines: int) -> None:
            made.append(defines)
            assert shared_bytes <= cuda_emulation.SHARED_BYTES

    Pairs(Source(CPU, torch.bfloat16), 2).compile()
    assert sorted(made, key=str) == sorted(KINDS, key=str)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("m", "n", "k"), [(1500, 4608, 3584), (4098, 3584, 18944), (1024, 37888, 3584)])
def test_on_a_card_bits_are_those_of_tiles(m: int, n: int, k: int) -> None:
    device = torch.device("cuda", 0)
    source, tiles = CudaSource(device, torch.bfloat16), Tiles.of(device)
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs Hopper")
    assert why_not_pairs(source) is None
    operands = [tensor.to(device) for tensor in numbers(m, n, k)]
    values, token_scale, weight, row_scale, bias, residual = operands

    def by_tiles(b: torch.Tensor | None = None, r: torch.Tensor | None = None) -> torch.Tensor:
        tile, given = tiles.choose(m, n, k), (values, token_scale, weight, row_scale, b, torch.bfloat16)
        return kernels.int8_matmul(*given, tile, tiles.processors, r)

    expected = by_tiles(bias), by_tiles(r=residual.clone()), swiglu_fused(by_tiles())
    for found, wanted in zip(results(Pairs(source, tiles.processors), operands), expected, strict=True):
        assert torch.equal(found, wanted)

"""What a product promises: every product with everything that can stand around it, alone and through its wrappers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from lowmem_bagel.benchmarks.baselines.int8 import BitsandbytesInt8, QuantoInt8
from lowmem_bagel.benchmarks.baselines.nf4 import BitsandbytesNf4
from support.linears import PAIRS, Call, call, linear
from support.numeric import gaussian, relative_l2
from torch import Tensor

from lowmem_bagel.formats import scaled_matmul as scaled
from lowmem_bagel.formats.base import Dequantized
from lowmem_bagel.formats.dense.elementwise import ElementwiseDense
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.int8.cpu_choice import ByTokens
from lowmem_bagel.formats.int8.packed import PackedInt8
from lowmem_bagel.formats.int8.rotation import Rotated, Rotation
from lowmem_bagel.formats.int8.scaled import Int8AsFp16, Int8Products
from lowmem_bagel.formats.nf4 import codec as nf4
from lowmem_bagel.formats.nf4.packed import PackedNf4
from lowmem_bagel.formats.nf4.scaled import ElementwiseNf4, Nf4AsFp16
from lowmem_bagel.ops.elementwise import Elementwise
from lowmem_bagel.ops.linear import SWIGLU, After, Before, Dense, DenseLinear, Product, RMSNorm, Rows, Weights, rms_norm

pytestmark = pytest.mark.usefixtures("poisoned")

IN, OUT = 128, 48
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Int8AsOnACard(PackedInt8):
    """One token times weights as they are stored, in PyTorch's operations."""

    compiled = True


class Nf4AsOnACard(PackedNf4):
    """The same."""

    compiled = True


AROUND = Elementwise(BF16)


@dataclass(frozen=True)
class Case:
    """A product, the form and dtype of its weights, the dtype of activations, and its largest relative L2 error."""

    make: Callable[[], Product]
    weight: str
    wide: torch.dtype
    bound: float
    needs: str = ""
    fuses: bool = False
    """Whether SwiGLU after it is free."""


INTEGERS = 0.07
"""A token is rounded to 254 steps of its largest value, which is 3 times its root mean square where it is normal, and
up to 10 times behind SwiGLU: 10 / 127 / sqrt(12) = 0.023, and SwiGLU after it may double that."""

CASES = {
    "dense": Case(Dense, "float32", FP32, 1e-6),
    "dense bf16": Case(Dense, "bfloat16", BF16, 0.012),
    "elementwise dense": Case(lambda: ElementwiseDense(AROUND), "bfloat16", BF16, 0.012, fuses=True),
    "fp16": Case(lambda: scaled.Fp16Weights(scaled.UPCAST), "float16", FP32, 2e-3, fuses=True),
    "fp16, fp16 result": Case(lambda: scaled.Fp16Weights(scaled.FLOAT16_RESULT), "float16", FP32, 2e-3, fuses=True),
    "int8": Case(int8.IntMm, "int8", FP32, INTEGERS),
    "int8 dequantized": Case(lambda: Dequantized(int8.dequantize), "int8", FP32, 1e-6),
    "int8 weights only": Case(int8.WeightOnly, "int8", FP32, 1e-6),
    "int8 weights only, bf16": Case(int8.WeightOnly, "int8", BF16, 0.012),
    "int8 as fp16": Case(lambda: Int8AsFp16(scaled.UPCAST), "int8", FP32, 2e-3, fuses=True),
    "int8 with steps": Case(lambda: Int8Products(AROUND, Int8AsOnACard(BF16)), "int8", BF16, INTEGERS, fuses=True),
    "int8 bitsandbytes": Case(BitsandbytesInt8, "int8", FP32, INTEGERS, "bitsandbytes"),
    "int8 quanto": Case(QuantoInt8, "int8", FP32, 1e-6, "optimum.quanto"),
    "nf4": Case(lambda: Dequantized(nf4.dequantize), "nf4", FP32, 1e-6),
    "nf4, bf16": Case(lambda: Dequantized(nf4.dequantize), "nf4", BF16, 0.012),
    "nf4 as fp16": Case(lambda: Nf4AsFp16(scaled.UPCAST), "nf4", FP32, 2e-3, fuses=True),
    "nf4 with steps": Case(lambda: ElementwiseNf4(AROUND, Nf4AsOnACard(BF16)), "nf4", BF16, 0.012, fuses=True),
    "nf4 bitsandbytes": Case(BitsandbytesNf4, "nf4", FP32, 1e-6, "bitsandbytes"),
    "nf4 bitsandbytes, bf16": Case(BitsandbytesNf4, "nf4", BF16, 0.012, "bitsandbytes"),
}
GROUP = 64
WRAPPERS: dict[str, Callable[[Product], Product]] = {
    "alone": lambda product: product,
    "by tokens": lambda product: ByTokens((0, 7), (product, product)),
    "rotated": lambda product: Rotated(product, Rotation(GROUP)),
    "rotated by tokens": lambda product: Rotated(ByTokens((0, 7), (product, product)), Rotation(GROUP)),
}
SHAPES = [(1, 1), (1, 2), (3, 6)]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    found = CASES[request.param]
    if found.needs:
        pytest.importorskip(found.needs)
    return found


def stored(form: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weight and scales of a form, and the dense weight that they are."""
    dense = gaussian(OUT, IN, std=0.1)
    if form == "int8":
        values, scale = int8.quantize(dense)
        return values, scale, int8.dequantize(values, scale, FP32)
    if form == "nf4":
        codes, absmax = gaussian(OUT, IN // 2, std=100).int().to(torch.uint8), gaussian(OUT, IN // 64).abs() * 0.1
        return codes, absmax, nf4.dequantize(codes, absmax, FP32)
    weight = dense.to(getattr(torch, form))
    return weight, None, weight.float()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_each_product_with_all_that_can_stand_around_it(case: Case, wrapper: str, pair: tuple[str, str]) -> None:
    weight, scales, dense = stored(case.weight)
    product = WRAPPERS[wrapper](case.make())
    if wrapper.startswith("rotated"):
        dense = Rotation(GROUP)(dense)
    for bias in (None, gaussian(OUT, seed=3, dtype=case.wide)):
        layer = linear(product, weight, scales, bias)
        for shape in SHAPES:
            given = call(pair, shape, (OUT, IN), seed=sum(shape)).to(case.wide)
            wanted = given.exact(dense, bias)
            for same in (given, given.in_rows([1] * shape[0])):
                found = layer(*same.to(case.wide))
                assert (found.shape, found.dtype) == (wanted.shape, case.wide)
                assert relative_l2(found, wanted) < case.bound, (shape, bias is None)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_swiglu_alone_is_fused_and_wrappers_say_so(case: Case, wrapper: str) -> None:
    product = WRAPPERS[wrapper](case.make())
    for before, after in PAIRS:
        _, before_it, after_it = call((before, after), (1,), (OUT, IN))
        for tokens in (1, 2, 7, 5000):
            assert product.fuses(tokens, before_it, after_it) == (case.fuses and after == "swiglu")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_forbids_a_graph_is_said_by_the_linear(wrapper: str) -> None:
    """A file all of whose linears are rotated would be captured with a library that asks the host."""

    class Asking(Dense):
        graph_blocker = "it asks the host"

    for product, reason in ((Asking(), "it asks the host"), (Dense(), None)):
        assert DenseLinear(IN, OUT, False, FP32, WRAPPERS[wrapper](product)).graph_blocker == reason


def test_one_way_of_several_forbids_a_graph() -> None:
    class Asking(Dense):
        graph_blocker = "it asks the host"

    assert ByTokens((0, 8), (Dense(), Asking())).graph_blocker == "it asks the host"


def test_bitsandbytes_forbids_a_graph() -> None:
    assert BitsandbytesInt8.graph_blocker, "LLM.int8() counts outliers on the host"


# --- what a linear and the wrappers hand on


@dataclass
class Recorder(Dense):
    """Keeps what it was asked."""

    calls: list[tuple[Rows, Weights, Before, After]] = field(default_factory=list)

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        self.calls.append((x, weights, before, after))
        return super().product(x, weights, before, after)

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        return tokens == 3 and before is None and after is SWIGLU


def recorded(wrapper: str, pair: tuple[str, str], sizes: list[int]) -> tuple[Call, tuple[Rows, Weights, Before, After]]:
    """What a linear was called with, and what came through to its product."""
    inner = Recorder()
    layer = DenseLinear(IN, OUT, True, FP32, WRAPPERS[wrapper](inner))
    assert layer.bias is not None
    layer.weight.copy_(gaussian(OUT, IN))
    layer.bias.copy_(gaussian(OUT))
    given = call(pair, (3, 2), (OUT, IN)).in_rows(sizes)
    layer(*given)
    (passed,) = inner.calls
    assert [tensor is None for tensor in passed[1]] == [False, True, False]
    assert passed[1].weight.data_ptr() == layer.weight.data_ptr(), "tensors as they lie now"
    return given, passed


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("wrapper", ["alone", "by tokens"])
def test_a_product_gets_what_its_linear_is_given(wrapper: str, pair: tuple[str, str]) -> None:
    """Rows are not put together, and nothing is computed, before a product that may do better."""
    given, (x, _, before, after) = recorded(wrapper, pair, [1, 2])
    assert x is given.x
    assert before is given.before
    assert after is given.after


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_rotated_product_still_fuses_what_follows_it(pair: tuple[str, str]) -> None:
    given, (x, _, before, after) = recorded("rotated", pair, [1, 2])
    assert isinstance(x, Tensor)
    assert before is None
    assert after is given.after
    rows = torch.cat(list(given.x))
    assert torch.equal(x, Rotation(GROUP)(rows if given.before is None else given.before(rows)))


def test_a_wrapper_asks_for_its_own_number_of_tokens_and_for_what_it_leaves_to_do() -> None:
    norm = RMSNorm(torch.ones(IN), 1e-6)
    one, other = Recorder(), Dense()
    by_tokens = ByTokens((0, 4), (one, other))
    rotated = Rotated(by_tokens, Rotation(GROUP))
    for tokens in (1, 3, 4, 5):
        assert by_tokens.fuses(tokens, None, SWIGLU) == (tokens == 3)
        for before in (None, norm, SWIGLU):
            assert rotated.fuses(tokens, before, SWIGLU) == (tokens == 3)
    assert not by_tokens.fuses(3, norm, SWIGLU), "as the way itself says"


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-3, 1.0, 1e3])
def test_the_eps_of_a_norm(size: float) -> None:
    """It decides where activations are small: against float64, token by token."""
    x, weight = torch.randn(5, 64) * size, torch.rand(64) + 0.5
    exact = x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert torch.allclose(rms_norm(x, weight, 1e-6).double(), exact, rtol=1e-6, atol=0)

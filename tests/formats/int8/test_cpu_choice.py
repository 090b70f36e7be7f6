"""INT8 on a processor: which of two ways is taken, by whose measurement, and that the answer holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.linears import PAIRS, call
from support.numeric import gaussian, relative_l2
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import SettingError
from lowmem_bagel.formats.base import Dequantized, Site
from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.int8 import cpu_choice as int8_cpu
from lowmem_bagel.formats.int8.cpu_choice import (
    SECONDS,
    TOKENS,
    ByTokens,
    Timing,
    choose,
    choose_by_trial,
    compare,
    describe,
)
from lowmem_bagel.formats.linears import stored_linears
from lowmem_bagel.ops.linear import Dense, Product, Weights

CPU = torch.device("cpu")


class Machine:
    """A clock, and ways to multiply that let it run: `fixed` seconds a call and `each` for every token."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[int] = []

    def clock(self) -> float:
        return self.now

    def way(self, fixed: float, each: float, first: float = 0.0) -> Product:
        machine = self

        class Way(Product):
            started = False

            def multiply(self, x: Tensor, weights: Weights) -> Tensor:
                machine.now += fixed + each * x.shape[0] + (0.0 if self.started else first)
                self.started = True
                machine.calls.append(x.shape[0])
                return x

        return Way()


MS = 1e-3


@pytest.mark.parametrize(
    ("integer", "dequantized", "starts", "winners"),
    [
        ((0.3 * MS, 0.004 * MS), (1.5 * MS, 0.02 * MS), None, "i"),
        ((2 * MS, 0.04 * MS), (1.0 * MS, 0.01 * MS), None, "d"),
        ((0.4 * MS, 0.006 * MS), (1.5 * MS, 0.003 * MS), (0, 1024), "id"),
        ((2.4 * MS, 0.002 * MS), (1.0 * MS, 0.05 * MS), (0, 64), "di"),
        # No more than equal: weights without rounded activations are taken.
        ((1.0 * MS, 0.010 * MS), (1.05 * MS, 0.0105 * MS), None, "d"),
    ],
)
def test_the_faster_way_is_taken_for_each_number_of_tokens(
    integer: tuple[float, float], dequantized: tuple[float, float], starts: tuple[int, ...] | None, winners: str
) -> None:
    machine = Machine()
    ways = {"i": machine.way(*integer), "d": machine.way(*dequantized)}
    chosen, why = choose_by_trial(ways["i"], ways["d"], torch.float32, machine.clock)
    if starts is None:
        assert chosen is ways[winners]
    else:
        assert isinstance(chosen, ByTokens)
        assert chosen.starts == starts
        assert chosen.ways == tuple(ways[w] for w in winners)
    for tokens in TOKENS:
        for fixed, each in (integer, dequantized):
            assert f"{(fixed + each * tokens) * 1e3:.3g}" in why
    assert why.count("->") == len(TOKENS)


def test_what_the_first_call_costs_does_not_count() -> None:
    machine = Machine()
    timings = compare(machine.way(MS, 0, first=80 * MS), machine.way(3 * MS, 0), torch.float32, machine.clock)
    assert [round(t.integer / MS, 6) for t in timings] == [1.0] * len(TOKENS)


def test_a_clear_difference_is_measured_twice_and_a_close_one_more_often() -> None:
    clear, close = Machine(), Machine()
    compare(clear.way(MS, 0), clear.way(9 * MS, 0), torch.float32, clear.clock)
    compare(close.way(MS, 0), close.way(1.5 * MS, 0), torch.float32, close.clock)
    assert clear.calls == [n for n in TOKENS for _ in range(4)]
    assert close.calls == [n for n in TOKENS for _ in range(2 * int8_cpu.TURNS)]


@pytest.mark.parametrize(("fixed", "measured"), [(20 * MS, [1, 64]), (110 * MS, [1])])
@pytest.mark.parametrize("slower", ["integer", "dequantized"])
def test_a_slow_processor_is_not_kept_waiting(slower: str, fixed: float, measured: list[int]) -> None:
    machine = Machine()
    slow, quick = machine.way(fixed, 2 * MS), machine.way(MS, 0.5 * MS)
    begun = machine.now
    ways = (slow, quick) if slower == "integer" else (quick, slow)
    timings = compare(*ways, torch.float32, machine.clock)
    assert [t.tokens for t in timings] == measured
    assert machine.now - begun < SECONDS
    # The last answer holds for all that was not measured.
    assert choose(*ways, timings) is quick


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_products_go_to_the_way_of_their_number_of_tokens(pair: tuple[str, str]) -> None:
    class Named(Dense):
        def multiply(self, x: Tensor, weights: Weights) -> Tensor:
            asked.append(self)
            return super().multiply(x, weights)

    asked: list[Product] = []
    ways = [Named(), Named(), Named()]
    product, weights = ByTokens((0, 64, 1024), ways), Weights(gaussian(8, 4))
    for shape, way in (((0,), 0), ((1,), 0), ((63,), 0), ((2, 32), 1), ((1023,), 1), ((2, 600), 2)):
        given = call(pair, shape, (8, 4))
        for x, before, after in (given, given.in_rows([shape[0] // 2, shape[0] - shape[0] // 2])):
            product.product(x, weights, before, after)
        assert asked == [ways[way]] * 2
        asked.clear()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_ways_by_tokens_compute_what_each_computes_alone(dtype: torch.dtype, pair: tuple[str, str]) -> None:
    ways = int8.IntMm(), Dequantized(int8.dequantize)
    weight, scale = int8.quantize(gaussian(40, 64, seed=1))
    weights = Weights(weight, scale, gaussian(40, seed=2, dtype=dtype))
    dense = int8.dequantize(weight, scale, torch.float64)
    for tokens, way in zip((7, 8), ways, strict=True):
        given = call(pair, (tokens,), (40, 64), seed=tokens).to(dtype)
        x, before, after = given
        y = ByTokens((0, 8), ways).product(x, weights, before, after)
        assert torch.equal(y, way.product(x, weights, before, after))
        assert relative_l2(y, given.exact(dense, weights.bias)) < 0.03


def test_the_reason_reads_well() -> None:
    timings = [Timing(1, 0.45e-3, 1.74e-3), Timing(1024, 6.05e-3, 5.3e-3)]
    threads = torch.get_num_threads()
    assert describe(timings, torch.bfloat16) == (
        f"measured for 2048x2048 in bfloat16 on {threads} thread{'s' * (threads > 1)}: "
        "1 token 0.45 ms in integers, 1.74 dequantised -> integers; "
        "1024 tokens 6.05 ms in integers, 5.3 dequantised -> dequantised"
    )


@pytest.mark.usefixtures("poisoned")
def test_large_blocks_are_cut_on_a_processor_without_changing_a_bit() -> None:
    width = 4096
    tokens = 2 * (int8.CPU_PRODUCT_VALUES // width) + 3
    x, weights = gaussian(tokens, width, dtype=torch.bfloat16), Weights(*int8.quantize(gaussian(8, width, seed=1)))
    whole = int8.IntMm(block_values=x.numel()).product(x, weights)
    assert torch.equal(int8.IntMm().product(x, weights), whole)


# --- in a loaded model


@pytest.fixture(scope="module")
def folder(variant_of: Callable[[str], Path]) -> Path:
    return variant_of("int8")


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the trials made, each of which says that weights are dequantised from 8 tokens on."""
    made: list[torch.dtype] = []

    def trial(integer: Product, dequantized: Product, dtype: torch.dtype) -> tuple[Product, str]:
        made.append(dtype)
        return ByTokens((0, 8), (integer, dequantized)), f"trial {len(made)}"

    monkeypatch.setattr(int8_cpu, "choose_by_trial", trial)
    return made


@pytest.mark.usefixtures("exact_int_mm")
def test_a_model_is_tried_once_and_the_plan_says_so(folder: Path, trials: list[torch.dtype]) -> None:
    pipe = BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32")
    assert pipe.model.plan.reasons["linears"] == "int8 (ByTokens; trial 1)"
    settings = {"seed": 1, "height": 32, "width": 32, "num_timesteps": 3}
    first, second = (pipe.generate("a red circle", **settings).latent for _ in range(2))
    assert torch.equal(first, second)
    assert trials == [torch.float32]


@pytest.mark.usefixtures("exact_int_mm")
def test_the_trial_itself_decides_in_a_loaded_model(folder: Path) -> None:
    pipe = BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32", tasks=("ask",))
    why = pipe.model.plan.reasons["linears"]
    assert f"measured for {int8_cpu.SIDE}x{int8_cpu.SIDE} in float32" in why
    assert "1 token" in why
    assert pipe.ask("what?", max_new_tokens=2).token_ids


@pytest.mark.usefixtures("exact_int_mm")
@pytest.mark.parametrize("backend", ["native", "quanto", "bitsandbytes"])
def test_a_backend_that_was_asked_for_is_not_tried(folder: Path, trials: list[torch.dtype], backend: str) -> None:
    if backend != "native":
        pytest.importorskip({"quanto": "optimum.quanto"}.get(backend, backend))
    pipe = BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend=backend, tasks=("ask",))
    assert pipe.model.plan.reasons["linears"] == f"int8 ({'IntMm' if backend == 'native' else backend})"
    assert not trials


@pytest.mark.usefixtures("exact_int_mm")
def test_where_integers_do_not_run_there_is_nothing_to_try(
    folder: Path, trials: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    reasons: dict[str, str] = {}
    for dtype, name in ((torch.float32, "WeightOnly"), (torch.float16, "dequantised to fp16")):
        linears = stored_linears(Site(ModelFolder.open(folder), CPU, dtype, "auto", reasons))
        assert linears.name == f"int8 ({name})"
    assert "AttributeError" in reasons["int8 kernel processor"]
    assert not trials


@pytest.mark.usefixtures("saturating_int_mm")
def test_a_processor_without_vnni_dequantizes(folder: Path, trials: list[torch.dtype]) -> None:
    opened = ModelFolder.open(folder)
    for backend in ("auto", "native"):
        reasons: dict[str, str] = {}
        assert stored_linears(Site(opened, CPU, torch.float32, backend, reasons)).name == "int8 (WeightOnly)"
        assert "without VNNI" in reasons["int8 kernel processor"]
    assert not trials


@pytest.mark.usefixtures("saturating_int_mm")
def test_bitsandbytes_is_refused_on_a_processor_without_vnni(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SettingError, match=r"without VNNI.*; choose backend auto"):
        stored_linears(Site(ModelFolder.open(folder), CPU, torch.float32, "bitsandbytes", {}))


def test_the_random_numbers_of_a_program_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    machine = Machine()
    compare(machine.way(MS, 0), machine.way(MS, 0), torch.float32, machine.clock)
    assert torch.equal(torch.rand(3), expected)

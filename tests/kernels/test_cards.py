"""Consumer cards without having one: every Triton kernel compiled for them at the settings that the 7B model has.

What was compiled before is taken from a record, as card_compiler.py says. LOWMEM_BAGEL_ALL_CARDS=1 compiles everything,
for every kind of card instead of three, and for more numbers of few tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import pytest
from support.card_compiler import SHARED, Result
from support.forked import Forked

from lowmem_bagel.kernels import triton_language

EVERY = os.environ.get("LOWMEM_BAGEL_ALL_CARDS") == "1"
CARDS = sorted(SHARED) if EVERY else [86, 90, 120]
FEW = ("1", "2", "4", "8") if EVERY else ("8",)
GGUF = {"gguf-q8_0", "gguf-q6_k", "gguf-q5_k", "gguf-q4_k"}
BEFORE_TENSOR_CORES = {"fused", "gemv", "nf4", "rope", "next_token"} | GGUF
EVERYWHERE = BEFORE_TENSOR_CORES | {"int8_matmul", "int8_grouped", "grouped_matmul", "decode_attention"}

pytestmark = pytest.mark.skipif(triton_language.MISSING is not None, reason=str(triton_language.MISSING))


@pytest.fixture(scope="module")
def found() -> Mapping[int, dict[str, Any]]:
    """What every card's compiler found."""
    program = "import sys; from support.card_compiler import main; main(sys.argv[1:])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    arguments = [",".join(map(str, CARDS)), *FEW, *(["--afresh"] * EVERY)]
    done = Forked(program, arguments, environment=environment).finished()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {int(arch): card for arch, card in json.loads(done.stdout).items()}


@pytest.mark.parametrize("arch", CARDS)
def test_every_kernel_compiles_fits_and_spills_nothing(found: Mapping[int, dict[str, Any]], arch: int) -> None:
    compiled = found[arch]["compiled"]
    assert len(compiled) > (30 if arch < 80 else 60)
    assert [one for one in compiled if one["error"]] == []
    results = [(Result(*one["result"]), one) for one in compiled]
    assert [one for result, one in results if result.shared > SHARED[arch]] == []
    assert [one for result, one in results if result.spilled] == []
    assert all(result.registers for result, _ in results), "ptxas told nothing"


@pytest.mark.parametrize("arch", CARDS)
def test_the_record_says_what_the_compiler_does(found: Mapping[int, dict[str, Any]], arch: int) -> None:
    """Those that this run happened to compile again."""
    assert [one for one in found[arch]["compiled"] if one["stood"] not in (None, one["result"])] == []


@pytest.mark.parametrize("arch", CARDS)
def test_a_trial_at_loading_launches_what_requests_will(found: Mapping[int, dict[str, Any]], arch: int) -> None:
    assert [one for one in found[arch]["compiled"] if one["case"] == "model"] == []


@pytest.mark.parametrize("arch", CARDS)
def test_kernels_are_offered_by_capability(found: Mapping[int, dict[str, Any]], arch: int) -> None:
    expected = BEFORE_TENSOR_CORES if arch < 80 else EVERYWHERE | ({"swiglu_matmul"} if arch == 90 else set())
    assert set(found[arch]["offered"]) == expected


def test_no_kernel_is_left_out(found: Mapping[int, dict[str, Any]]) -> None:
    assert found[90]["left_out"] == []

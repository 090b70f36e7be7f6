"""Triton kernels: the cases of triton_kernels.py in the interpreter and on a GPU, and what can be known without."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from typing import NoReturn

import pytest
import torch
from support.paths import ROOT, TESTS

from lowmem_bagel.diagnostics.trials import kernel_report
from lowmem_bagel.formats.gguf.spec import SPECS as GGUF
from lowmem_bagel.formats.int8.tiles import FEW_ROWS, HOPPER, Tiles
from lowmem_bagel.formats.int8.trial import MATMUL
from lowmem_bagel.formats.nf4 import kernels as nf4
from lowmem_bagel.formats.nf4.kernels import exact_ptx
from lowmem_bagel.formats.nf4.levels import CODEBOOK
from lowmem_bagel.kernels import gemv, triton_language
from lowmem_bagel.kernels import trials as availability
from lowmem_bagel.kernels.packed_gemv import Code
from lowmem_bagel.kernels.trial_inputs import SMALL, Sizes

CASES = TESTS / "support" / "triton_kernels.py"
CPU = torch.device("cpu")
SIZES = Sizes(SMALL, torch.float32)


def run_cases(workers: int, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers), str(CASES)]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")} | environment
    done = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100


@pytest.mark.first
@pytest.mark.skipif(triton_language.MISSING is not None, reason=str(triton_language.MISSING))
def test_kernels_in_the_interpreter() -> None:
    run_cases(0, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_on_the_gpu() -> None:
    # One core compiles for minutes. The workspace is what PyTorch asks for where tests poison fresh memory.
    run_cases(min(8, os.cpu_count() or 1), CUBLAS_WORKSPACE_CONFIG=":4096:8")


@pytest.mark.skipif(triton_language.MISSING is not None, reason=str(triton_language.MISSING))
def test_the_interpreters_haste_leaves_alone_what_is_compiled_for_a_card() -> None:
    from support.triton_interpreter import quick_interpreter
    from triton import language
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    assert not triton_language.interpreted()
    touched = [
        language,
        language.core,
        language.dtype,
        language.tensor,
        language.block_type,
        TritonSemantic,
        interpreter,
    ]
    before = [dict(vars(found)) for found in touched]
    with quick_interpreter():
        assert [dict(vars(found)) for found in touched] == before


def run_ptx(program: str, **inputs: int) -> list[int]:
    """Executes the few instructions that the decoding of weights uses, on registers of 32 bits (or 64, to be split)."""
    registers = {"%lanemask_lt": 0x7FFFFFFF} | {f"${name[1:]}": value for name, value in inputs.items()}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def permute(a: int, b: int, selector: int) -> int:
        table = ((b & 0xFFFFFFFF) << 32 | a).to_bytes(8, "little")
        selected = []
        for place in range(4):
            code = selector >> 4 * place & 0xF
            byte = table[code & 7]
            selected.append(byte if code < 8 else 255 * (byte >> 7))
        return int.from_bytes(bytes(selected), "little")

    def choose(a: int, b: int, c: int, table: int) -> int:
        bits = ((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))
        return sum(bits)

    operations = {
        "mov.u32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "xor.b32": lambda a, b: a ^ b,
        "add.u32": lambda a, b: a + b & 0xFFFFFFFF,
        "shr.b32": lambda a, b: a >> b,
        "shr.u32": lambda a, b: a >> b,
        "prmt.b32": permute,
        "lop3.b32": choose,
    }
    for line in program.splitlines():
        if split := re.fullmatch(r"mov\.b64 {(\w+), (\w+)}, (\$\d+);", line):
            registers[split[1]], registers[split[2]] = value(split[3]) & 0xFFFFFFFF, value(split[3]) >> 32
        elif match := re.fullmatch(r"(\w+\.\w+) ([$\w]+), (.*);", line):
            registers[match[2]] = operations[match[1]](*map(value, match[3].split(", ")))
        else:
            assert line in "{}" or line.startswith(".reg"), f"{line} is not understood"
    return [registers[f"${i}"] for i in range(8) if f"${i}" in registers]


def as_floats(bits: list[int]) -> torch.Tensor:
    signed = [value - (value >> 31 << 32) for value in bits]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def weights(code: Code, word: int) -> torch.Tensor:
    """What `code` says that a word's eight weights are, for a scale of 1."""
    assert code.ptx is not None
    tables = run_ptx(code.tables) if code.tables else []
    values = as_floats(run_ptx(code.ptx, r8=word, **{f"r{9 + i}": table for i, table in enumerate(tables)}))
    return code.down * (code.up * values.double() - code.shift)


@pytest.mark.parametrize("start", range(0, 256, 4))
def test_nf4_is_dequantised_by_permuted_tables(start: int) -> None:
    packed = bytes(range(start, start + 4))
    exact = as_floats(run_ptx(exact_ptx(), r8=int.from_bytes(packed, "little")))
    codes = [byte >> 4 for byte in packed] + [byte & 15 for byte in packed]
    assert torch.equal(exact, torch.tensor([CODEBOOK[code] for code in codes]))


@pytest.mark.parametrize("start", range(0, 256, 4))
def test_words_of_nf4_are_decoded_by_permuted_tables(start: int) -> None:
    packed = bytes(range(start, start + 4))
    levels = torch.tensor([CODEBOOK[code] for byte in packed for code in (byte >> 4, byte & 15)]).double()
    assert float((weights(nf4.nf4_weights(), int.from_bytes(packed, "little")) - levels).abs().max()) <= 2**-15


@pytest.mark.parametrize("start", range(-128, 128, 8))
def test_words_of_int8_are_decoded_exactly(start: int) -> None:
    integers = torch.arange(start, start + 8, dtype=torch.int8)
    word = int(integers.view(torch.int64)) & 2**64 - 1
    assert torch.equal(weights(gemv.int8_weights(), word), integers.double())


@pytest.mark.parametrize("m", [2, 16, 17, 64, 65, 1000, 4096, 8196])
def test_a_tile_is_chosen_for_every_shape(m: int) -> None:
    for n, k in ((3584, 18944), (4608, 3584), (37888, 3584), (256, 512), (100, 100)):
        tile = Tiles(132, bulk=True).choose(m, n, k)
        assert (tile in FEW_ROWS) == (m <= 64)
        assert not (tile.bulk and k % 16), "bulk copies need rows of whole 16 bytes"
        assert not Tiles(132, bulk=False).choose(m, n, k).bulk


def test_the_largest_tile_serves_the_largest_product_and_a_smaller_one_fills_the_card() -> None:
    assert Tiles(132, bulk=True).choose(8192, 37888, 3584) == HOPPER[0]
    small = Tiles(132, bulk=True).choose(512, 3584, 3584)
    assert small.m * small.n < HOPPER[0].m * HOPPER[0].n


def test_reasons_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("elementwise", "attend_token", "int8_pairs", "int8_packed", "nf4_packed", "gguf_packed")
    compiled = dict.fromkeys(names, "needs a CUDA GPU, not cpu")
    for missing in (None, "Triton cannot be imported (test)"):
        monkeypatch.setattr(triton_language, "MISSING", missing)
        kernels = (*availability.KERNELS, "int8_matmul", "int8_grouped", "nf4", *(spec.name for spec in GGUF))
        by_triton = dict.fromkeys(kernels, missing or "needs a CUDA GPU, not cpu")
        assert kernel_report(CPU) == by_triton | compiled


def test_reasons_of_an_old_card_and_of_a_failing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_language, "MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(availability, "passed_on", lambda device: None)
    tried_on: list[torch.device] = []
    monkeypatch.setattr(availability, "on", lambda device: contextlib.nullcontext(tried_on.append(device)))
    card = torch.device("cuda", 1)
    assert availability.why_not(MATMUL, card, SIZES) == "needs compute capability 8.0; this card has 7.5"
    swiglu = availability.KERNELS["swiglu_matmul"]
    assert swiglu.unmet((8, 9)) == "needs compute capability 9.0; this card has 8.9"
    assert swiglu.unmet((9, 0)) is None
    assert swiglu.unmet((12, 0)) == "is cut for compute capability 9.x; this card has 12.0"
    right, nan = torch.ones(100_000), torch.full((100_000,), float("nan"))
    wrong = availability.Kernel(
        (7, 5), lambda *_: [(right, right), (right.clone().index_fill_(0, torch.tensor(7), 0), right)]
    )
    no_number = availability.Kernel((7, 5), lambda *_: [(nan, right), (right, right)])

    def broken(device: torch.device, sizes: Sizes) -> NoReturn:
        raise RuntimeError("no kernel image\nis available")

    kernels = {"wrong": wrong, "no number": no_number, "broken": availability.Kernel((7, 5), broken)}
    monkeypatch.setattr(availability, "KERNELS", kernels)
    assert availability.why_not("wrong", card, SIZES) == "its trial was wrong by 2.5e-01"
    assert availability.why_not("broken", card, SIZES) == "its trial failed (RuntimeError: no kernel image)"
    assert availability.why_not("no number", card, SIZES) == "its trial was wrong by inf"
    assert tried_on == [card] * 3

"""The kernels that need no Triton on this machine's GPU: each against its reference, then timed beside the ceilings.

    python -m lowmem_bagel.benchmarks.suites.kernels_steps RECORD.json

They surround the matmuls of cards without bfloat16, or without Triton; shapes are BAGEL-7B's. "of ceiling" and errors
are as in `suites.kernels`; the rival is the reference, PyTorch's operations. Ends with exit code 1 if any is wrong.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_bagel.formats.int8.packed import CudaPackedInt8, PackedInt8
from lowmem_bagel.formats.nf4.packed import CudaPackedNf4, PackedNf4
from lowmem_bagel.formats.scaled_matmul import FLOAT32_RESULT
from lowmem_bagel.kernels.cuda_source import CudaSource
from lowmem_bagel.kernels.elementwise_cuda import CudaElementwise
from lowmem_bagel.ops.elementwise import Elementwise
from lowmem_bagel.ops.rope import rope_at

from ..record import write_record
from ..timing import ceilings
from .kernels import (
    DEVICE,
    EPS,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LINEARS,
    MIDDLE,
    Case,
    D,
    integers,
    line,
    packed,
    random,
    rotated,
)

TOKENS = 4096
EXPONENT = FLOAT32_RESULT.exponent
INT8, NF4 = (CudaPackedInt8, PackedInt8), (CudaPackedNf4, PackedNf4)


def wide(*shape: int) -> Tensor:
    return random(*shape, dtype=torch.float32)


def half(*shape: int) -> Tensor:
    return random(*shape, dtype=torch.float16)


def words(*shape: int) -> Tensor:
    return torch.randint(-(10**6), 10**6, shape, device=DEVICE, dtype=torch.int32)


def case(
    name: str,
    shape: str,
    step: Callable[[Any, Tensor], Any],
    inputs: list[Tensor],
    work: float,
    reads: bool = False,
    wanted: Callable[[], Tensor] | None = None,
    rival: bool = True,
    arithmetic: torch.dtype = torch.float16,
    kinds: tuple[Callable[[CudaSource], Any], Callable[[torch.dtype], Any]] = (CudaElementwise, Elementwise),
) -> Case:
    """A step on each of the inputs, taken by the first of the kinds and, as its reference, by the second.

    wanted: the result for the first, where a step overwrites what it is given.
    rival: a graph can capture the reference, so that it can be timed.
    """
    ours, eager = partial(step, kinds[0](CudaSource(DEVICE, arithmetic))), partial(step, kinds[1](arithmetic))
    reference = eager if wanted is None else (lambda _: wanted())
    rivals = {"PyTorch": (eager, inputs)} if rival else {}
    return Case(name, shape, ours, reference, inputs, work, reads=reads, rivals=rivals)


def token_cases() -> Iterator[Case]:
    """What stands before and after the matmuls of a picture's tokens."""
    norm, back = wide(HIDDEN), wide(TOKENS).abs()
    for width, kind, make in ((HIDDEN, "float32", wide), (MIDDLE, "float32", wide), (HIDDEN, "fp16", half)):
        xs, n, size = rotated(make, TOKENS, width)[:20], TOKENS * width, 2 if kind == "fp16" else 4
        shape = f"{TOKENS} x {width} {kind}"
        yield case("halve", shape, lambda s, x: s.to_fp16(x, EXPONENT), xs, (size + 2) * n)
        yield case("quantise", shape, lambda s, x: s.to_int8(x), xs, (size + 1) * n)
        if (width, kind) == (HIDDEN, "float32"):
            yield case("norm and halve", shape, lambda s, x: s.to_fp16(x, EXPONENT, norm, EPS), xs, 6 * n)
            yield case("norm and quantise", shape, lambda s, x: s.to_int8(x, norm, EPS), xs, 5 * n)
    for kind, make in (("float32", wide), ("int32", words)):
        for name, width, work in (("widen", LINEARS["qkv"][0], 8), ("add", HIDDEN, 12), ("activate", 2 * MIDDLE, 6)):
            columns, bias = wide(width) if kind == "int32" else None, wide(width) if name == "widen" else None
            residual = wide(TOKENS, width)
            inputs = rotated(make, TOKENS, width)[:20]
            given = inputs[0].clone(), residual.clone()

            def finish(steps: Elementwise, x: Tensor, residual: Tensor, name: str, columns: Any, bias: Any) -> Tensor:
                if name == "add":
                    return steps.epilogue_add(residual, x, back, columns, bias)
                return (steps.epilogue if name == "widen" else steps.epilogue_swiglu)(x, back, columns, bias)

            step = partial(finish, name=name, columns=columns, bias=bias)
            yield case(
                name, f"{TOKENS} x {width} {kind}", partial(step, residual=residual), inputs, work * TOKENS * width,
                wanted=partial(step, Elementwise(), given[0], residual=given[1]),
            )  # fmt: skip
    yield rope_case()


def bf16_cases() -> Iterator[Case]:
    """What differs in bf16 arithmetic."""
    norm, back, columns = random(HIDDEN), wide(TOKENS).abs(), wide(2 * MIDDLE)
    xs, products = rotated(random, TOKENS, HIDDEN), rotated(words, TOKENS, 2 * MIDDLE)[:4]
    steps: list[tuple[str, Callable[[Elementwise, Tensor], Any], list[Tensor], float]] = [
        ("norm", lambda s, x: s.rms_norm(x, norm, EPS), xs, 4),
        ("norm and quantise", lambda s, x: s.to_int8(x, norm, EPS), xs, 3),
        ("swiglu", lambda s, x: s.swiglu(x), rotated(random, TOKENS, 2 * MIDDLE)[:4], 3),
        ("activate", lambda s, x: s.epilogue_swiglu(x, back, columns, None), products, 5),
    ]
    for name, step, inputs, work in steps:
        rows, width = inputs[0].shape
        kind = "int32" if name == "activate" else "bf16"
        shape = f"{rows} x {width} {kind}" + (" to bf16" if kind == "int32" else "")
        yield case(name, shape, step, inputs, work * rows * width, arithmetic=torch.bfloat16)


def rope_case() -> Case:
    heads = HEADS + 2 * KV_HEADS
    norms = wide(D), wide(D)
    rope = rope_at(torch.arange(TOKENS, device=DEVICE)[None], D, 1e6)
    block = torch.empty(1, TOKENS, heads, D, dtype=torch.float16, device=DEVICE)
    q, k, v = block.split((HEADS, KV_HEADS, KV_HEADS), dim=2)

    def run(steps: Elementwise, qkv: Tensor) -> Tensor:
        steps.rotate(qkv, *norms, EPS, rope, HEADS, KV_HEADS, (q, k, v))
        return block

    inputs = rotated(wide, 1, TOKENS, heads * D)[:20]
    return case("norm and rope", f"{TOKENS} x {heads} x {D}", run, inputs, 6 * TOKENS * heads * D)


def weight_cases() -> Iterator[Case]:
    """INT8 and NF4 weights, made fp16, or multiplied with one token as they are read."""
    for name, (n, k) in LINEARS.items():
        shape, values = f"{name} {n}x{k}", n * k
        absmax, token = wide(n, k // 64).abs() * 0.02, half(1, k)
        eight, four = rotated(integers, n, k), rotated(packed, n, k // 2)
        if name in ("o", "gate_up"):
            yield case("INT8 to fp16", shape, lambda s, w: s.to_half(w), eight, 3 * values, kinds=INT8)
            yield case(
                "NF4 to fp16", shape, partial(_nf4_to_half, absmax), four, 2.5625 * values, rival=False, kinds=NF4
            )
        yield case(
            "INT8, one token", shape, partial(_int8_times, token), eight, values, reads=True, kinds=INT8,
        )  # fmt: skip
        yield case(
            "NF4, one token", shape, partial(_nf4_times, token, absmax), four, 0.5625 * values,
            reads=True, rival=False, kinds=NF4,
        )  # fmt: skip


def _nf4_to_half(absmax: Tensor, packed: PackedNf4, weight: Tensor) -> Tensor:
    return packed.to_half(weight, absmax)


def _int8_times(token: Tensor, packed: PackedInt8, weight: Tensor) -> Tensor:
    return packed.times_token(token, weight)


def _nf4_times(token: Tensor, absmax: Tensor, packed: PackedNf4, weight: Tensor) -> Tensor:
    return packed.times_token(token, weight, absmax)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    record = parser.parse_args().record
    torch.manual_seed(0)
    limits = ceilings(DEVICE)
    found = []
    for each in itertools.chain(token_cases(), bf16_cases(), weight_cases()):
        found.append(each.measure(limits))
        print(line(found[-1]), flush=True)
        torch.cuda.empty_cache()
    write_record(record, "kernels without Triton", {"tokens": TOKENS}, {"ceilings": limits, "kernels": found})
    raise SystemExit(0 if all(kernel["right"] for kernel in found) else 1)


if __name__ == "__main__":
    main()

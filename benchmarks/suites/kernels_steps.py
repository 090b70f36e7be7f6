"""`lowmem-bagel bench kernels-steps`: the kernels that need no Triton on this machine's GPU, as `kernels` does it.

They surround the matmuls of cards without bfloat16, or without Triton. The rival is the reference, PyTorch.
"""

from __future__ import annotations

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

from ..cases import EPS, Case, Setup, run_cases
from ..options import CheckOnly, Out, Seed, Shape

TOKENS = 4096
EXPONENT = FLOAT32_RESULT.exponent
INT8, NF4 = (CudaPackedInt8, PackedInt8), (CudaPackedNf4, PackedNf4)


def kernels_steps_command(
    shape: Shape = "bagel-7b", seed: Seed = 0, check_only: CheckOnly = False, out: Out = Path("kernels_steps.json")
) -> None:
    """Compare every kernel of the steps around matmuls with its reference, time it, and write a JSON record."""
    setup = Setup.of(shape, check_only, seed)
    run_cases("kernels without Triton", setup, PARTS, out, {"tokens": setup.tokens(TOKENS)[0], "seed": seed})


def case(
    on: Setup,
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
    ours, eager = partial(step, kinds[0](CudaSource(on.device, arithmetic))), partial(step, kinds[1](arithmetic))
    reference = eager if wanted is None else (lambda _: wanted())
    rivals = {"PyTorch": (eager, inputs)} if rival else {}
    return Case(name, shape, ours, reference, inputs, work, reads=reads, overwrites=wanted is not None, rivals=rivals)


def token_cases(on: Setup) -> Iterator[Case]:
    """What stands before the matmuls of a picture's tokens."""
    (tokens,), hidden, middle = on.tokens(TOKENS), on.decoder.hidden_size, on.decoder.intermediate_size
    norm = on.wide(hidden)
    half = partial(on.random, dtype=torch.float16)
    for width, kind, make in ((hidden, "float32", on.wide), (middle, "float32", on.wide), (hidden, "fp16", half)):
        xs, n, size = on.rotated(make, tokens, width, most=20), tokens * width, 2 if kind == "fp16" else 4
        shape = f"{tokens} x {width} {kind}"
        yield case(on, "halve", shape, lambda s, x: s.to_fp16(x, EXPONENT), xs, (size + 2) * n)
        yield case(on, "quantise", shape, lambda s, x: s.to_int8(x), xs, (size + 1) * n)
        if (width, kind) == (hidden, "float32"):
            yield case(on, "norm and halve", shape, lambda s, x: s.to_fp16(x, EXPONENT, norm, EPS), xs, 6 * n)
            yield case(on, "norm and quantise", shape, lambda s, x: s.to_int8(x, norm, EPS), xs, 5 * n)


def product_cases(on: Setup) -> Iterator[Case]:
    """What stands behind them."""
    (tokens,), hidden = on.tokens(TOKENS), on.decoder.hidden_size
    back = on.wide(tokens).abs()
    steps = (("widen", on.linears["qkv"][0], 8), ("add", hidden, 12), ("activate", on.linears["gate_up"][0], 6))
    for kind, make in (("float32", on.wide), ("int32", partial(_words, on))):
        for name, width, work in steps:
            columns, bias = on.wide(width) if kind == "int32" else None, on.wide(width) if name == "widen" else None
            residual, inputs = on.wide(tokens, width), on.rotated(make, tokens, width, most=20)
            first, its_residual = inputs[0].clone(), residual.clone()

            def finish(steps: Elementwise, x: Tensor, residual: Tensor, name: str, columns: Any, bias: Any) -> Tensor:
                if name == "add":
                    return steps.epilogue_add(residual, x, back, columns, bias)
                return (steps.epilogue if name == "widen" else steps.epilogue_swiglu)(x, back, columns, bias)

            step = partial(finish, name=name, columns=columns, bias=bias)
            wanted = partial(step, Elementwise(), first, residual=its_residual)
            shape = f"{tokens} x {width} {kind}"
            yield case(on, name, shape, partial(step, residual=residual), inputs, work * tokens * width, wanted=wanted)


def bf16_cases(on: Setup) -> Iterator[Case]:
    """What differs in bf16 arithmetic."""
    (tokens,), hidden, wide = on.tokens(TOKENS), on.decoder.hidden_size, on.linears["gate_up"][0]
    make = partial(on.random, dtype=torch.bfloat16)
    norm, back, columns = make(hidden), on.wide(tokens).abs(), on.wide(wide)
    xs, products = on.rotated(make, tokens, hidden), on.rotated(partial(_words, on), tokens, wide, most=4)
    steps: list[tuple[str, Callable[[Elementwise, Tensor], Any], list[Tensor], float]] = [
        ("norm", lambda s, x: s.rms_norm(x, norm, EPS), xs, 4),
        ("norm and quantise", lambda s, x: s.to_int8(x, norm, EPS), xs, 3),
        ("swiglu", lambda s, x: s.swiglu(x), on.rotated(make, tokens, wide, most=4), 3),
        ("activate", lambda s, x: s.epilogue_swiglu(x, back, columns, None), products, 5),
    ]
    for name, step, inputs, work in steps:
        rows, width = inputs[0].shape
        kind = "int32" if name == "activate" else "bf16"
        shape = f"{rows} x {width} {kind}" + (" to bf16" if kind == "int32" else "")
        yield case(on, name, shape, step, inputs, work * rows * width, arithmetic=torch.bfloat16)


def rope_cases(on: Setup) -> Iterator[Case]:
    (tokens,), (heads, kv_heads, d) = on.tokens(TOKENS), on.heads
    norms, every = (on.wide(d), on.wide(d)), heads + 2 * kv_heads
    rope = rope_at(torch.arange(tokens, device=on.device)[None], d, on.decoder.rope_theta)
    block = torch.empty(1, tokens, every, d, dtype=torch.float16, device=on.device)
    q, k, v = block.split((heads, kv_heads, kv_heads), dim=2)

    def run(steps: Elementwise, qkv: Tensor) -> Tensor:
        steps.rotate(qkv, *norms, EPS, rope, heads, kv_heads, (q, k, v))
        return block

    inputs = on.rotated(on.wide, 1, tokens, every * d, most=20)
    yield case(on, "norm and rope", f"{tokens} x {every} x {d}", run, inputs, 6 * tokens * every * d)


def weight_cases(on: Setup) -> Iterator[Case]:
    """INT8 and NF4 weights, made fp16, or multiplied with one token as they are read."""
    for name, (n, k) in on.linears.items():
        shape, values = f"{name} {n}x{k}", n * k
        absmax, token = on.wide(n, k // 64).abs() * 0.02, on.random(1, k, dtype=torch.float16)
        eight, four = on.rotated(on.integers, n, k), on.rotated(on.packed, n, k // 2)
        if name in ("o", "gate_up"):
            yield case(on, "INT8 to fp16", shape, lambda s, w: s.to_half(w), eight, 3 * values, kinds=INT8)
            to_half = partial(_nf4_to_half, absmax)
            yield case(on, "NF4 to fp16", shape, to_half, four, 2.5625 * values, rival=False, kinds=NF4)
        times = partial(_int8_times, token)
        yield case(on, "INT8, one token", shape, times, eight, values, reads=True, kinds=INT8)
        by_codes = partial(_nf4_times, token, absmax)
        yield case(on, "NF4, one token", shape, by_codes, four, 0.5625 * values, reads=True, rival=False, kinds=NF4)


PARTS = (token_cases, product_cases, rope_cases, bf16_cases, weight_cases)


def _words(on: Setup, *shape: int) -> Tensor:
    return torch.randint(-(10**6), 10**6, shape, device=on.device, dtype=torch.int32)


def _nf4_to_half(absmax: Tensor, packed: PackedNf4, weight: Tensor) -> Tensor:
    return packed.to_half(weight, absmax)


def _int8_times(token: Tensor, packed: PackedInt8, weight: Tensor) -> Tensor:
    return packed.times_token(token, weight)


def _nf4_times(token: Tensor, absmax: Tensor, packed: PackedNf4, weight: Tensor) -> Tensor:
    return packed.times_token(token, weight, absmax)

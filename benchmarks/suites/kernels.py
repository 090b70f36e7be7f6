"""`lowmem-bagel bench kernels`: the Triton kernels on this machine's GPU, each against its reference, then timed.

"of ceiling" compares with a device copy (bytes read and written), with a reduction where a kernel reads alone, or with
the measured bf16 matmul; for the int8 matmul with twice that: tensor cores do int8 at twice the rate. Errors are
relative L2 against the reference. Ends with exit code 1 if any kernel is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_bagel.checkpoint.gguf_blocks import BLOCK_TYPES, decoded
from lowmem_bagel.diagnostics.trials import kernel_report
from lowmem_bagel.formats.gguf import kernels as gguf
from lowmem_bagel.formats.gguf.spec import format_of
from lowmem_bagel.formats.int8 import kernels as int8_matmul
from lowmem_bagel.formats.int8.tiles import Tiles
from lowmem_bagel.formats.nf4 import codec as nf4_codec
from lowmem_bagel.formats.nf4 import kernels as nf4
from lowmem_bagel.kernels import decode_attention, elementwise, gemv, rope, swiglu_matmul
from lowmem_bagel.ops.linear import rms_norm, swiglu
from lowmem_bagel.ops.rope import Rotate, rope_at
from lowmem_bagel.ops.rope import qk_norm_rope as qk_norm_rope_reference

from ..cases import EPS, Case, Rivals, Run, Setup, run_cases
from ..options import CheckOnly, Out, Seed, Shape, Threads
from ..synthetic import blocks


def kernels_command(
    shape: Shape = "bagel-7b",
    threads: Threads = 8,
    seed: Seed = 0,
    check_only: CheckOnly = False,
    out: Out = Path("kernels.json"),
) -> None:
    """Compare every Triton kernel with its reference, time it, and write a JSON record."""
    setup = Setup.of(shape, check_only, seed)
    reasons = kernel_report(setup.device)
    for name, reason in reasons.items():
        print(f"{name:20} {reason or 'runs'}")

    def more() -> dict[str, Any]:
        return {"availability": [{"name": name, "reason": reason} for name, reason in reasons.items()]}

    run_cases("kernels", setup, PARTS, out, {"seed": seed}, threads, more)


def int8_cases(on: Setup) -> Iterator[Case]:
    tiles, fp8 = Tiles.of(on.device), on.capability >= (8, 9)

    def case(name: str, m: int, weights: list[Tensor], dense: list[Tensor]) -> Case:
        n, k = weights[0].shape
        a, x, bias = on.integers(m, k), on.random(m, k), on.random(n)
        token, row = on.wide(m) / 127, on.wide(n) / 127
        tile = tiles.choose(m, n, k)

        def ours(weight: Tensor) -> Tensor:
            return int8_matmul.int8_matmul(a, token, weight, row, bias, on.half, tile, on.processors)

        def reference(weight: Tensor) -> Tensor:
            return int8_matmul.int8_matmul_reference(a, token, weight, row, bias, on.half)

        rivals: dict[str, tuple[Run, list[Tensor]]] = {"bf16": (lambda w: F.linear(x, w), dense)}
        if m > 16:
            rivals["_int_mm"] = (lambda w: torch._int_mm(a, w.T), weights)
        if m > 16 and fp8:  # would a variant in fp8 be faster? Scales as for INT8, one a token and one a row.
            x8, token8, row8 = x.to(torch.float8_e4m3fn), token.abs()[:, None], row.abs()[None, :]
            rivals["_scaled_mm fp8"] = (
                lambda w: torch._scaled_mm(x8, w.T, scale_a=token8, scale_b=row8, out_dtype=torch.bfloat16),
                [weight.to(torch.float8_e4m3fn) for weight in dense],
            )
        return Case(
            "int8_matmul", f"{name} {m} x {n} x {k}", ours, reference, weights, 2.0 * m * n * k, "op/s",
            tolerance=1e-4, rivals=rivals,
        )  # fmt: skip

    for name, (n, k) in on.linears.items():
        weights = on.rotated(on.integers, n, k, most=8)
        dense = [weight.bfloat16() for weight in weights]
        for m in on.tokens(16, 64, 512, 4096, 4098, 8192, 8196):
            yield case(name, m, weights, dense)


def swiglu_cases(on: Setup) -> Iterator[Case]:
    if on.capability[0] != 9:
        return
    n, k = on.linears["gate_up"]
    weights = [weight * 0.02 for weight in on.rotated(on.random, n, k, most=3)]
    for m in on.tokens(512, 4098, 8196):
        x = on.random(m, k)

        def library(weight: Tensor, x: Tensor = x) -> Tensor:
            return elementwise.swiglu_fused(F.linear(x, weight))

        yield Case(
            "swiglu_matmul", f"{m} x {n} x {k}", partial(swiglu_matmul.swiglu_matmul, x, processors=on.processors),
            partial(swiglu_matmul.swiglu_matmul_reference, x), weights, 2.0 * m * n * k, "op/s", 1.0,
            rivals={"F.linear, then SwiGLU": (library, weights)},
        )  # fmt: skip


def gemv_cases(on: Setup) -> Iterator[Case]:
    """A weight of each form with one token and with few, and with what is fused with it in a layer."""
    for name, (n, k) in {**on.linears, "lm_head": (on.decoder.vocab_size, on.decoder.hidden_size)}.items():
        weights = {
            "bf16": on.rotated(on.random, n, k),
            "int8": on.rotated(on.integers, n, k),
            "nf4": on.rotated(on.packed, n, k // 2),
        }
        scales = {"int8": on.wide(n), "nf4": on.wide(n, k // 64).abs()}
        fusions: dict[str, dict[str, Any]] = {"plain": {"bias": on.random(n)}}
        if name in ("qkv", "gate_up"):
            fusions["norm"] = {"bias": on.random(n), "norm": on.random(k), "eps": EPS}
        if name == "gate_up":
            fusions["norm, swiglu out"] = {"norm": on.random(k), "eps": EPS, "swiglu_output": True}
        if name == "down":
            fusions["swiglu in"] = {"swiglu_input": True}
        few = (2, 4, 8) if name in ("gate_up", "down") else ()
        for form in weights:
            for fusion, options in fusions.items():
                yield _gemv(on, form, f"{name} 1 {fusion}", 1, weights[form], scales.get(form), options)
            for tokens in few:
                yield _gemv(
                    on, form, f"{name} {tokens} plain", tokens, weights[form], scales.get(form), fusions["plain"]
                )


def _gemv(
    on: Setup, form: str, shape: str, tokens: int, weights: list[Tensor], scale: Tensor | None, options: dict[str, Any]
) -> Case:
    width = weights[0].shape[1] * (2 if form == "nf4" else 1)
    x = on.random(tokens, 2 * width if options.get("swiglu_input") else width)
    rivals: Rivals = {"F.linear": (partial(F.linear, x), weights)} if form == "bf16" and shape.endswith("plain") else {}
    ours: Run = partial(gemv.gemv, x, scale=scale, **options)
    reference: Run = partial(gemv.gemv_reference, x, scale=scale, **options)
    work = weights[0].nbytes
    if form == "nf4":
        assert scale is not None
        ours = partial(nf4.nf4_gemv, x, absmax=scale, **options)
        reference = partial(nf4.nf4_gemv_reference, x, absmax=scale, **options)
        work += scale.nbytes
    return Case(f"gemv {form}", shape, ours, reference, weights, work, reads=True, rivals=rivals)


def gguf_cases(on: Setup) -> Iterator[Case]:
    """Weights in each type of GGUF's blocks with one token and two, and decoded."""
    for kind, block in BLOCK_TYPES.items():
        for name, (n, k) in on.linears.items():
            if k % block.values:
                continue
            weights = on.rotated(partial(blocks, kind, device=on.device), block.bytes_of((n, k)))
            for tokens in (1, 2):
                x, options = on.random(tokens, k), {"norm": on.random(k), "eps": EPS}
                yield Case(
                    f"gemv {format_of(kind)}", f"{name} {tokens} norm",
                    partial(_gguf_gemv, x, kind, options), partial(_gguf_reference, x, kind, options),
                    weights, weights[0].nbytes, reads=True,
                )  # fmt: skip
            if name in ("gate_up", "down"):
                yield Case(
                    f"{format_of(kind)} decoded", f"{n} x {k}",
                    partial(gguf.gguf_dequantize, kind=kind, shape=(n, k), dtype=on.half),
                    partial(decoded, kind=kind, shape=(n, k), dtype=on.half), weights, weights[0].nbytes + 2 * n * k,
                    tolerance=0,
                )  # fmt: skip


def _gguf_gemv(x: Tensor, kind: str, options: dict[str, Any], weight: Tensor) -> Tensor:
    return gguf.gguf_gemv(x, weight, kind, **options)


def _gguf_reference(x: Tensor, kind: str, options: dict[str, Any], weight: Tensor) -> Tensor:
    return gguf.gguf_gemv_reference(x, weight, kind, **options)


def fused_cases(on: Setup) -> Iterator[Case]:
    hidden, wide = on.decoder.hidden_size, on.linears["gate_up"][0]
    norm = on.random(hidden)

    def case(name: str, kernel: Run, reference: Run, inputs: list[Tensor], bytes_a_value: float) -> Case:
        shape, work = " x ".join(map(str, inputs[0].shape)), bytes_a_value * inputs[0].numel()
        return Case(name, shape, kernel, reference, inputs, work, rivals={"eager": (reference, inputs)})

    def normed(run: Callable[..., Any]) -> Run:
        return lambda x: run(x, norm, EPS)

    e = elementwise
    for tokens in on.tokens(17, 4096, 8192):
        xs, pairs = (on.rotated(on.random, tokens, width, most=40) for width in (hidden, wide))
        both = normed(e.rms_norm_quantize), normed(e.rms_norm_quantize_reference)
        yield case("quantize", e.quantize, e.quantize_reference, xs, 3)
        yield case("rms_norm_quantize", *both, xs, 3)
        yield case("swiglu_quantize", e.swiglu_quantize, e.swiglu_quantize_reference, pairs, 2.5)
        yield case("swiglu", e.swiglu_fused, swiglu, pairs, 3)
        yield case("rms_norm", normed(e.rms_norm_fused), normed(rms_norm), xs, 4)


def dequantize_cases(on: Setup) -> Iterator[Case]:
    def case(n: int, k: int) -> Case:
        absmax = on.wide(n, k // 64).abs()
        return Case(
            "nf4_dequantize", f"{n} x {k}", lambda w: nf4.nf4_dequantize(w, absmax, on.half),
            lambda w: nf4_codec.dequantize(w, absmax, on.half), on.rotated(on.packed, n, k // 2),
            n * k * (2.5 + 1 / 16), tolerance=0,
        )  # fmt: skip

    yield from (case(*on.linears[name]) for name in ("gate_up", "down"))


def rope_cases(on: Setup) -> Iterator[Case]:
    heads, kv_heads, d = on.heads
    norm = on.random(d)

    def case(batch: int, tokens: int) -> Case:
        table = rope_at(torch.full((batch, 1), 70, device=on.device), d, on.decoder.rope_theta)

        def rotated_by(rotate: Rotate, qkv: Tensor) -> Any:
            shapes = ((batch, tokens, count, d) for count in (heads, kv_heads, kv_heads))
            q, k, v = (torch.empty(shape, dtype=qkv.dtype, device=on.device) for shape in shapes)
            rotate(qkv, norm, norm, EPS, table, heads, kv_heads, (q, k, v))
            return q, k, v

        ours, eager = partial(rotated_by, rope.qk_norm_rope), partial(rotated_by, qk_norm_rope_reference)
        blocks = on.rotated(on.random, batch, tokens, (heads + 2 * kv_heads) * d, most=40)
        work, rivals = 4.0 * blocks[0].numel(), {"eager": (eager, blocks)}
        return Case("qk_norm_rope", f"{batch} x {tokens}", ours, eager, blocks, work, rivals=rivals)

    (tokens,) = on.tokens(4096)
    yield from (case(*shape) for shape in ((1, tokens), (2, tokens), (1, 1)))


def attention_cases(on: Setup) -> Iterator[Case]:
    """One token of text, its norm and rope included."""
    heads, kv_heads, d = on.heads
    cos, sin = rope_at(torch.arange(100, device=on.device)[None], d, on.decoder.rope_theta)

    def case(length: int) -> Case:
        q, norm = on.random(heads, d), on.random(d)
        qkv = torch.cat((q, on.random(2 * kv_heads, d))).flatten()
        position, count = torch.tensor([70, length - 1], dtype=torch.int32, device=on.device).split(1)
        given = (qkv, norm, norm, EPS, (cos[0, :, 0], sin[0, :, 0]), position)

        def sdpa(cache: Tensor) -> Tensor:
            k, v = (cache[None, :length, i].transpose(1, 2) for i in (0, 1))
            return F.scaled_dot_product_attention(q[None, :, None], k, v, enable_gqa=True)

        caches = on.rotated(on.random, on.longest, 2, kv_heads, d)
        return Case(
            "decode_attention", f"{length} keys, norm and rope",
            lambda c: decode_attention.attend_token(*given, c[:, 0], c[:, 1], count),
            lambda c: decode_attention.attend_token_reference(*given, c[:, 0], c[:, 1], count),
            caches, length * 2 * kv_heads * d * 2, reads=True, rivals={"sdpa, without norm and rope": (sdpa, caches)},
        )  # fmt: skip

    yield from map(case, on.tokens(100, 1000, 8000))


PARTS = (int8_cases, swiglu_cases, gemv_cases, gguf_cases, fused_cases, dequantize_cases, rope_cases, attention_cases)

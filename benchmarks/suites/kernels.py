"""The Triton kernels on this machine's GPU: each against its reference, then timed beside the machine's ceilings.

    python -m lowmem_bagel.benchmarks.suites.kernels RECORD.json [--tune] [--threads 8]

Shapes are BAGEL-7B's. "of ceiling" compares with a device copy (bytes read and written), with a reduction where a
kernel reads alone, or with the measured bf16 matmul; for the int8 matmul with twice that: tensor cores do int8 at twice
the rate. Errors are relative L2 against the reference.
Ends with exit code 1 if any kernel is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_bagel.diagnostics.trials import kernel_report
from lowmem_bagel.formats.int8 import kernels as int8_matmul
from lowmem_bagel.formats.nf4 import codec as nf4_codec
from lowmem_bagel.formats.nf4 import kernels as nf4
from lowmem_bagel.kernels import (
    decode_attention,
    gemv,
    rope,
    swiglu_matmul,
)
from lowmem_bagel.kernels import (
    elementwise as fused,
)
from lowmem_bagel.ops.errors import relative_l2
from lowmem_bagel.ops.linear import rms_norm, swiglu
from lowmem_bagel.ops.rope import Rotate, rope_at

from ..record import write_record
from ..timing import Call, ceilings, compile_ahead, copies_beyond_cache, seconds
from .kernels_tuning import tune

HIDDEN, MIDDLE, HEADS, KV_HEADS, D = 3584, 18944, 28, 4, 128
LINEARS = {"qkv": (4608, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * MIDDLE, HIDDEN), "down": (HIDDEN, MIDDLE)}
DECODED = {**LINEARS, "lm_head": (152064, HIDDEN)}
DEVICE = torch.device("cuda")
EPS = 1e-6


Run = Callable[[Tensor], Any]
"""A kernel or its rival as a function of the one tensor that is rotated, to be beyond the cache at every call."""


@dataclass
class Case:
    """One kernel at one shape. `work`: bytes moved or operations done by a call; `rivals`: what else does the same."""

    kernel: str
    shape: str
    run: Run
    reference: Run
    inputs: Sequence[Tensor]
    work: float
    unit: str = "B/s"
    matmuls: float = 2.0
    """Where `work` is operations: the ceiling in rates of the measured bf16 matmul; int8's is two of it."""
    reads: bool = False
    """Where `work` is bytes: they are read, and next to nothing is written."""
    tolerance: float = 5e-3
    rivals: Mapping[str, tuple[Run, Sequence[Tensor]]] = field(default_factory=dict)

    def calls(self) -> list[Call]:
        return [partial(self.run, tensor) for tensor in self.inputs]

    def measure(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """The figures of the record. Correctness first, on poisoned memory."""
        result, expected = _dense(_poisoned(self.run)(self.inputs[0])), _dense(self.reference(self.inputs[0]))
        error = relative_l2(result, expected)
        taken = seconds(self.calls())
        memory = limits["read_bytes_s" if self.reads else "copy_bytes_s"]
        limit = memory if self.unit == "B/s" else self.matmuls * limits["half_matmul_ops_s"]
        return {
            "kernel": self.kernel, "shape": self.shape, "error": error,
            "right": error <= self.tolerance,  # false for NaN
            "seconds": taken, "unit": self.unit, "rate": self.work / taken, "of_ceiling": self.work / taken / limit,
            "rivals": {
                name: seconds([partial(run, tensor) for tensor in inputs])
                for name, (run, inputs) in self.rivals.items()
            },
        }  # fmt: skip


def line(found: Mapping[str, Any]) -> str:
    scale, unit = (1e9, "GB/s") if found["unit"] == "B/s" else (1e12, "TOP/s")
    rivals = "  ".join(f"{name} {value * 1e6:.1f} us" for name, value in found["rivals"].items())
    verdict = f"error {found['error']:.1e}{'' if found['right'] else ' WRONG'}"
    return (
        f"{found['kernel']:20} {found['shape']:28} {found['seconds'] * 1e6:8.1f} us "
        f"{found['rate'] / scale:6.0f} {unit:5} {found['of_ceiling']:6.1%}  {verdict}  {rivals}"
    )


def _dense(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """One tensor to compare: narrowed values times their scales; q, k and v side by side."""
    if isinstance(output, Tensor):
        return output
    if len(output) == 2:
        return output[0].float() * output[1][:, None]
    return torch.cat(output, dim=2)


def _poisoned(run: Run) -> Run:
    """The call with every fresh tensor full of NaN or of the largest integer."""

    def poisoned(tensor: Tensor) -> Any:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return run(tensor)
        finally:
            torch.use_deterministic_algorithms(False)

    return poisoned


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, device=DEVICE, dtype=torch.int8)


def packed(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, device=DEVICE, dtype=torch.uint8)


def rotated(make: Callable[..., Tensor], *shape: int) -> list[Tensor]:
    """Enough fresh tensors to be beyond the cache together."""
    first = make(*shape)
    return [first] + [make(*shape) for _ in range(copies_beyond_cache(first.nbytes) - 1)]


def fused_cases() -> Iterator[Case]:
    norm = random(HIDDEN)

    def case(name: str, run: Callable[..., Any], reference: Callable[..., Any], xs: list[Tensor], work: float) -> Case:
        extra = (norm, EPS) if "norm" in name else ()
        shape = " x ".join(map(str, xs[0].shape))

        def ours(x: Tensor) -> Any:
            return run(x, *extra)

        def eager(x: Tensor) -> Any:
            return reference(x, *extra)

        return Case(name, shape, ours, eager, xs, work, rivals={"eager": (eager, xs)})

    for tokens in (17, 4096, 8192):
        xs, pairs = rotated(random, tokens, HIDDEN)[:40], rotated(random, tokens, 2 * MIDDLE)[:40]
        n, m = xs[0].numel(), pairs[0].numel()
        yield case("quantize", fused.quantize, fused.quantize_reference, xs, 3 * n)
        yield case("rms_norm_quantize", fused.rms_norm_quantize, fused.rms_norm_quantize_reference, xs, 3 * n)
        yield case("swiglu_quantize", fused.swiglu_quantize, fused.swiglu_quantize_reference, pairs, 2.5 * m)
        yield case("swiglu", fused.swiglu_fused, swiglu, pairs, 3 * m)
        yield case("rms_norm", fused.rms_norm_fused, rms_norm, xs, 4 * n)


def int8_cases() -> Iterator[Case]:
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    capability = torch.cuda.get_device_capability(DEVICE)
    bulk, fp8 = capability[0] == 9, capability >= (8, 9)

    def case(name: str, m: int, weights: list[Tensor], dense: list[Tensor]) -> Case:
        n, k = weights[0].shape
        a, x, token = integers(m, k), random(m, k), random(m, dtype=torch.float32)
        row, bias = random(n, dtype=torch.float32), random(n)
        tile = int8_matmul.choose_tile(m, n, k, processors, bulk)

        def ours(weight: Tensor) -> Tensor:
            return int8_matmul.int8_matmul(a, token, weight, row, bias, torch.bfloat16, tile, processors)

        def reference(weight: Tensor) -> Tensor:
            return int8_matmul.int8_matmul_reference(a, token, weight, row, bias, torch.bfloat16)

        rivals: dict[str, tuple[Run, Sequence[Tensor]]] = {"bf16": (lambda w: F.linear(x, w), dense)}
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

    for name, (n, k) in LINEARS.items():
        weights = rotated(integers, n, k)[:8]
        dense = [weight.bfloat16() for weight in weights]
        for m in (16, 64, 512, 4096, 4098, 8192, 8196):
            yield case(name, m, weights, dense)


def swiglu_cases() -> Iterator[Case]:
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    if torch.cuda.get_device_capability(DEVICE)[0] != 9:
        return
    n, k = LINEARS["gate_up"]
    weights = [weight * 0.02 for weight in rotated(random, n, k)[:3]]

    def case(m: int) -> Case:
        x = random(m, k)

        def library(weight: Tensor) -> Tensor:
            return fused.swiglu_fused(F.linear(x, weight))

        return Case(
            "swiglu_matmul", f"{m} x {n} x {k}", lambda w: swiglu_matmul.swiglu_matmul(x, w, processors),
            lambda w: swiglu_matmul.swiglu_matmul_reference(x, w), weights, 2.0 * m * n * k, "op/s", 1.0,
            rivals={"F.linear, then SwiGLU": (library, weights)},
        )  # fmt: skip

    for m in (512, 4098, 8196):
        yield case(m)


def gemv_cases() -> Iterator[Case]:
    for name, (n, k) in DECODED.items():
        dense, whole, half = rotated(random, n, k), rotated(integers, n, k), rotated(packed, n, k // 2)
        absmax, scale = random(n, k // 64, dtype=torch.float32).abs(), random(n, dtype=torch.float32)

        def case(
            form: str, shape: str, tokens: int, options: Mapping[str, Any],
            dense: list[Tensor] = dense, whole: list[Tensor] = whole, half: list[Tensor] = half,
            absmax: Tensor = absmax, scale: Tensor = scale, k: int = k,
        ) -> Case:  # fmt: skip
            x = random(tokens, 2 * k if options.get("swiglu_input") else k)
            if form == "nf4":

                def ours(w: Tensor) -> Tensor:
                    return nf4.nf4_gemv(x, w, absmax, **options)

                def reference(w: Tensor) -> Tensor:
                    return nf4.nf4_gemv_reference(x, w, absmax, **options)

                return Case("gemv nf4", shape, ours, reference, half, half[0].nbytes + absmax.nbytes, reads=True)
            row = scale if form == "int8" else None
            weights = whole if form == "int8" else dense
            rivals = (
                {"F.linear": (lambda w: F.linear(x, w), dense)} if form == "bf16" and shape.endswith("plain") else {}
            )
            return Case(
                f"gemv {form}", shape, lambda w: gemv.gemv(x, w, scale=row, **options),
                lambda w: gemv.gemv_reference(x, w, scale=row, **options), weights, weights[0].nbytes, reads=True,
                rivals=rivals,
            )  # fmt: skip

        fusions: dict[str, dict[str, Any]] = {"plain": {"bias": random(n)}}
        if name in ("qkv", "gate_up"):
            fusions["norm"] = {"bias": random(n), "norm": random(k), "eps": EPS}
        if name == "gate_up":
            fusions["norm, swiglu out"] = {"norm": random(k), "eps": EPS, "swiglu_output": True}
        if name == "down":
            fusions["swiglu in"] = {"swiglu_input": True}
        for form in ("bf16", "int8", "nf4"):
            for fusion, options in fusions.items():
                yield case(form, f"{name} 1 {fusion}", 1, options)
            for tokens in (2, 4, 8) if name in ("gate_up", "down") else ():
                yield case(form, f"{name} {tokens} plain", tokens, fusions["plain"])


def other_cases() -> Iterator[Case]:
    def dequantize(n: int, k: int) -> Case:
        absmax = random(n, k // 64, dtype=torch.float32).abs()
        return Case(
            "nf4_dequantize", f"{n} x {k}", lambda w: nf4.nf4_dequantize(w, absmax, torch.bfloat16),
            lambda w: nf4_codec.dequantize(w, absmax, torch.bfloat16), rotated(packed, n, k // 2),
            n * k * (2.5 + 1 / 16), tolerance=0,
        )  # fmt: skip

    def norm_rope(batch: int, tokens: int) -> Case:
        norm, table = random(D), rope_at(torch.full((batch, 1), 70, device=DEVICE), D, 1e6)

        def rotated_by(rotate: Rotate) -> Run:
            def run(qkv: Tensor) -> Any:
                shapes = ((batch, tokens, heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS))
                q, k, v = (torch.empty(shape, dtype=qkv.dtype, device=DEVICE) for shape in shapes)
                rotate(qkv, norm, norm, EPS, table, HEADS, KV_HEADS, (q, k, v))
                return q, k, v

            return run

        ours, eager = rotated_by(rope.qk_norm_rope), rotated_by(rope.qk_norm_rope_reference)

        blocks = rotated(random, batch, tokens, (HEADS + 2 * KV_HEADS) * D)[:40]
        work = 4.0 * blocks[0].numel()
        return Case("qk_norm_rope", f"{batch} x {tokens}", ours, eager, blocks, work, rivals={"eager": (eager, blocks)})

    def attention(length: int) -> Case:
        q, norm = random(HEADS, D), random(D)
        qkv = torch.cat((q, random(2 * KV_HEADS, D))).flatten()
        position, count = torch.tensor([70, length - 1], dtype=torch.int32, device=DEVICE).split(1)
        cos, sin = rope_at(torch.arange(100, device=DEVICE)[None], D, 1e6)
        given = (qkv, norm, norm, EPS, (cos[0, :, 0], sin[0, :, 0]), position)

        def sdpa(cache: Tensor) -> Tensor:
            k, v = (cache[None, :length, i].transpose(1, 2) for i in (0, 1))
            return F.scaled_dot_product_attention(q[None, :, None], k, v, enable_gqa=True)

        caches = rotated(random, 10000, 2, KV_HEADS, D)
        return Case(
            "decode_attention", f"{length} keys, norm and rope",
            lambda c: decode_attention.attend_token(*given, c[:, 0], c[:, 1], count),
            lambda c: decode_attention.attend_token_reference(*given, c[:, 0], c[:, 1], count),
            caches, length * 2 * KV_HEADS * D * 2, reads=True, rivals={"sdpa, without norm and rope": (sdpa, caches)},
        )  # fmt: skip

    yield dequantize(*LINEARS["gate_up"])
    yield dequantize(*LINEARS["down"])
    for batch, tokens in ((1, 4096), (2, 4096), (1, 1)):
        yield norm_rope(batch, tokens)
    for length in (100, 1000, 8000):
        yield attention(length)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="JSON file to write")
    parser.add_argument("--tune", action="store_true", help="time the compile-time settings, and print the best")
    parser.add_argument("--threads", type=int, default=8, help="kernels compiled at a time")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU that PyTorch can use")
    torch.manual_seed(options.seed)
    statuses = kernel_report(DEVICE)
    for name, reason in statuses.items():
        print(f"{name:20} {reason or 'runs'}")
    limits = ceilings(DEVICE)
    print({name: f"{value / 1e12:.3f} T" for name, value in limits.items()}, flush=True)

    found: list[dict[str, Any]] = []
    with torch.inference_mode():
        for cases in (int8_cases, swiglu_cases, gemv_cases, fused_cases, other_cases):
            for case in _compiled(cases(), options.threads):
                found.append(case.measure(limits))
                print(line(found[-1]), flush=True)
            torch.cuda.empty_cache()
        tuned = tune(DEVICE, options.threads) if options.tune else []
    write_record(options.record, "kernels", {"seed": options.seed, "tune": options.tune}, {
        "ceilings": limits,
        "availability": [{"name": name, "reason": reason} for name, reason in statuses.items()],
        "kernels": found,
        "tuning": tuned,
    })  # fmt: skip
    wrong = [f"{case['kernel']} {case['shape']}" for case in found if not case["right"]]
    wrong += [f"{name}: {reason}" for name, reason in statuses.items() if reason]
    if wrong:
        raise SystemExit(f"wrong or unavailable: {'; '.join(wrong)}")


def _compiled(cases: Iterator[Case], threads: int) -> Iterator[Case]:
    """The cases some at a time, the kernels of each lot compiled in parallel before the first is timed."""
    while lot := list(itertools.islice(cases, 14)):
        compile_ahead([case.calls()[0] for case in lot], threads)
        yield from lot


if __name__ == "__main__":
    main()

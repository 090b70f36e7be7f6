"""Which kernels can be used on a device, and why not: by capability first, then by trial.

A trial launches the kernel at the settings that the model will have it launched with, and compares it with its PyTorch
reference, so that a broken compiler or driver is found before a picture is drawn with it. Nothing is chosen by a card's
name. What passed is kept in the user's cache (`remembered`): ask once, when a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import first_line
from ..hardware.features import why_off
from ..ops.decode_attention import AttendToken
from ..ops.device import empty_cache, indexed, on
from ..ops.dtypes import wide
from ..ops.elementwise import Elementwise, Scaled
from ..ops.errors import relative_l2
from ..ops.int8 import int_mm, quantize_rows
from ..ops.linear import After, Before, Product, RMSNorm, Rows, SwiGLU, Weights, joined, rms_norm, swiglu
from ..ops.rope import Rotate, rope_at
from ..ops.routed import add_slots as plainly_added
from . import triton_language
from .cuda_source import CudaSource
from .remembered import name_of, passed_on
from .trial_inputs import (
    EPS,
    FEW_ROWS,
    SMALL,
    Call,
    Pair,
    RepeatedRows,
    Sizes,
    layer_calls,
    random,
    repeated,
    row_scales,
    some_routes,
    tried_calls,
    tried_groups,
)

Trial = Callable[[torch.device, Sizes], Iterable[Pair]]
"""Runs a kernel and its reference on the device, for a decoder of these sizes."""

TOLERANCE = 4e-3
"""Largest relative L2 distance of a trial: float32 arithmetic, or int8 values of which a few fall the other way."""

TOLERANCES = {torch.float32: TOLERANCE, torch.float16: TOLERANCE, torch.bfloat16: 4 * TOLERANCE}
"""The same of kernels whose results are half: a reference may round to bf16 several times where they round once."""


@dataclass(frozen=True)
class Kernel:
    """What a kernel needs.

    capability: the least compute capability that it compiles to something useful for. major: the only one, where its
    settings are cut for one kind of card.
    """

    capability: tuple[int, int]
    trial: Trial
    major: int | None = None

    def unmet(self, have: tuple[int, int]) -> str | None:
        """Why it is not for a card of capability `have`, in words; None where it is."""
        if have < self.capability:
            return f"needs compute capability {_dotted(self.capability)}; this card has {_dotted(have)}"
        if self.major not in (None, have[0]):
            return f"is cut for compute capability {self.major}.x; this card has {_dotted(have)}"
        return None


def why_not(kernel: Kernel | str, device: torch.device, sizes: Sizes, again: bool = False) -> str | None:
    """None where the kernel, or the one called so in `KERNELS`, runs on `device` and gives the right answer for a
    decoder of these sizes; else the reason in words. `again`: also where it passed on this machine before."""
    kernel, device = KERNELS[kernel] if isinstance(kernel, str) else kernel, indexed(device)
    missing = why_off("triton") or triton_language.MISSING
    if missing:
        return missing
    if not triton_language.interpreted():
        if device.type != "cuda":
            return f"needs a CUDA GPU, not {device.type}"
        unmet = kernel.unmet(torch.cuda.get_device_capability(device))
        if unmet is not None:
            return unmet
        passed, trial = passed_on(device), name_of(kernel.trial, sizes)
        if passed is not None and not again and passed.has(trial):
            return None
        why = _tried(kernel, device, sizes)
        if passed is not None and why is None:
            passed.add(trial)
        return why
    return _tried(kernel, device, sizes)


def _tried(kernel: Kernel, device: torch.device, sizes: Sizes) -> str | None:
    """Why the kernel is not used, by a trial made now."""
    try:
        with on(device):
            distances = (_distance(*pair) for pair in kernel.trial(device, sizes))
            wrong = next((distance for distance in distances if distance > TOLERANCES[sizes.dtype]), None)
    except Exception as error:  # compilers and drivers fail in their own ways, and each is a reason
        return f"its trial failed ({type(error).__name__}: {first_line(error)})"
    finally:
        empty_cache()
    return None if wrong is None else f"its trial was wrong by {wrong:.1e}"


def choose_elementwise(source: CudaSource) -> tuple[Elementwise, str | None]:
    """What surrounds products in fp16 or bf16 arithmetic: our CUDA kernels, or PyTorch's operations and why."""
    from .elementwise_cuda import CudaElementwise

    kernels, plain, device = CudaElementwise(source), Elementwise(source.half), source.device
    why = why_not_compiled(source, lambda: (_around_results(kernels, device), _around_results(plain, device)))
    return (kernels, None) if why is None else (plain, why)


def choose_attend_token(source: CudaSource) -> tuple[AttendToken, str | None]:
    """One token's attention in fp16 or bf16 arithmetic: by our CUDA kernel, or by PyTorch's operations and why."""
    from ..ops.decode_attention import attend_token as plain
    from .decode_attention_cuda import CudaAttendToken

    kernel, device, sizes = CudaAttendToken(source), source.device, Sizes(SMALL, source.half)
    why = why_not_compiled(source, lambda: ([_attended(kernel, device, sizes)], [_attended(plain, device, sizes)]))
    return (kernel, None) if why is None else (plain, why)


def why_not_compiled(source: CudaSource, trial: Callable[[], tuple[list[Tensor], list[Tensor]]]) -> str | None:
    """None where kernels that NVRTC compiles give what is expected, else the reason."""
    from . import nvrtc

    why = nvrtc.why_unavailable(source.device)
    if why is not None:
        return why
    try:
        with on(source.device):
            distance = max(map(relative_l2, *trial()))
    except RuntimeError as error:  # compilers and drivers fail in their own ways, and each is a reason
        return f"its trial failed ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    return None if distance <= TOLERANCES[source.half] else f"its trial was wrong by {distance:.1e}"


def _around_results(around: Elementwise, device: torch.device) -> list[Tensor]:
    """What every step makes of random numbers."""
    x, norm, bias = (random(device, *shape).to(around.wide) for shape in ((3, 4096), (4096,), (64,)))
    columns, integers = random(device, 64), quantize_rows(random(device, 64, 4096))[0]
    half, whole = around.to_fp16(x, 15, norm, 1e-6), around.to_int8(x, norm, 1e-6)
    product = half[0].float() @ integers.float().t()
    return [
        around.rms_norm(x, norm, 1e-6),
        around.swiglu(x),
        _scaled_back(half),
        _scaled_back(whole),
        around.epilogue(int_mm(whole[0], integers).contiguous(), whole[1], columns, bias),
        around.epilogue_add(random(device, 3, 64).to(around.wide), product.clone(), half[1], None, bias),
        around.epilogue_swiglu(product * 1e-6, half[1], columns, None),
        _rotated(around.rotate, device, Sizes(SMALL, around.half)),
    ]


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2, or a quarter of the largest difference against the largest value: of many programs one may fail."""
    distance = relative_l2(found, expected)
    largest = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    return distance if math.isinf(distance) else max(distance, float(largest) / 4)


def _scaled_back(scaled: Scaled) -> Tensor:
    values, back = scaled
    return values.float() * back[:, None]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


class _OneKernel(Product):
    """Dense weights by what reads them once."""

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        from .gemv import gemv, gemv_options

        return gemv(joined(x), weights.weight, bias=weights.bias, **gemv_options(before, after))

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        return isinstance(after, SwiGLU) and tokens == 1


def _try_gemv(device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    decoder, norm = sizes.decoder, RMSNorm(random(device, sizes.decoder.hidden_size, dtype=sizes.dtype), EPS)

    def rows(n: int, k: int) -> RepeatedRows:
        few, scale = random(device, FEW_ROWS, k, dtype=sizes.dtype), row_scales(device, n, k)
        return RepeatedRows(Weights(repeated(few, n).mul_(scale[:, None])), few.float(), scale)

    product = _OneKernel()
    for tokens in (1, 2):
        yield from tried_calls(product, rows, layer_calls(sizes, device, tokens, product))
    x = random(device, 1, decoder.hidden_size, dtype=sizes.dtype)
    logits = Call(x, _as_many(decoder.vocab_size), decoder.hidden_size, norm)
    yield from tried_calls(product, rows, iter([logits]))


def _as_many(rows: int, limit: int = 1 << 14) -> int:
    """Fewer rows for which `gemv` takes the same settings, where there are more than it asks about."""
    return rows if rows <= limit else limit + rows % 16


def _try_fused(device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    from . import elementwise

    hidden, routed = sizes.decoder.hidden_size, sizes.decoder.routed
    x, norm = (random(device, *shape, dtype=sizes.around) for shape in ((3, hidden), (hidden,)))
    yield elementwise.rms_norm_fused(x, norm, EPS), rms_norm(x, norm, EPS)
    quantized = [
        (elementwise.quantize(x), elementwise.quantize_reference(x)),
        (elementwise.rms_norm_quantize(x, norm, EPS), elementwise.rms_norm_quantize_reference(x, norm, EPS)),
    ]
    for middle in (sizes.decoder.intermediate_size, *([routed.size] if routed else [])):
        gate_up = random(device, 3, 2 * middle, dtype=sizes.around)
        yield elementwise.swiglu_fused(gate_up), swiglu(gate_up)
        quantized.append((elementwise.swiglu_quantize(gate_up), elementwise.swiglu_quantize_reference(gate_up)))
    for found, expected in quantized:
        yield _scaled_back(found), _scaled_back(expected)


def _try_swiglu_matmul(device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    from .swiglu_matmul import TILE, swiglu_matmul

    hidden, n = sizes.decoder.hidden_size, 2 * sizes.decoder.intermediate_size
    few, scale = random(device, FEW_ROWS, hidden, dtype=sizes.dtype), row_scales(device, n, hidden)
    weight = repeated(few, n).mul_(scale[:, None])
    x = random(device, TILE.m + 2, hidden, dtype=sizes.dtype)
    expected = RepeatedRows(Weights(weight), few.float(), scale).expected(Call(x, n, hidden, after=SwiGLU()))
    yield swiglu_matmul(x, weight, 2), expected


def _try_grouped(device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    from .grouped_matmul import TILES, add_slots, grouped_matmul

    def rows(n: int, k: int) -> RepeatedRows:
        few, scale = random(device, FEW_ROWS, k, dtype=sizes.dtype), row_scales(device, n, k)
        return RepeatedRows(Weights(repeated(few, n).mul_(scale[:, None])), few.float(), scale)

    for tile in TILES:
        for weight, groups, expected in tried_groups(device, sizes, rows, tile.m):
            x = random(device, tile.m + 6, weight.few.shape[1], dtype=sizes.dtype)
            yield grouped_matmul(x, weight.weights.weight, groups, tile), expected(x)
    hidden, routes = sizes.decoder.hidden_size, some_routes(device, 5, sizes.routed)
    residual, slots = (random(device, n, hidden, dtype=sizes.around) for n in (5, routes.places.numel()))
    added = plainly_added(residual, slots, routes)  # first: a residual is given up
    yield add_slots(residual, slots, routes), added


def _try_rope(device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    from .rope import qk_norm_rope, qk_norm_rope_reference

    found, expected = (_rotated(f, device, sizes) for f in (qk_norm_rope, qk_norm_rope_reference))
    yield found, expected


def _rotated(rotate: Rotate, device: torch.device, sizes: Sizes) -> Tensor:
    decoder, around = sizes.decoder, wide(sizes.dtype)
    heads, kv_heads, d = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
    qkv, norm = random(device, 1, 3, sizes.qkv, dtype=around), random(device, d, dtype=around)
    q, k, v = (torch.empty(1, 3, n, d, dtype=sizes.dtype, device=device) for n in (heads, kv_heads, kv_heads))
    rotate(qkv, norm, norm, EPS, rope_at(torch.arange(3, device=device)[None], d, 1e4), heads, kv_heads, (q, k, v))
    return torch.cat((q, k, v), dim=2)


def _try_attention(device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    from .decode_attention import attend_token, attend_token_reference

    yield _attended(attend_token, device, sizes), _attended(attend_token_reference, device, sizes)


def _attended(attend: AttendToken, device: torch.device, sizes: Sizes) -> Tensor:
    kv_heads, d, around = sizes.decoder.num_kv_heads, sizes.decoder.head_dim, wide(sizes.dtype)
    qkv, norm = random(device, sizes.qkv, dtype=around), random(device, d, dtype=around)
    cache = random(device, 2, 100, kv_heads, d, dtype=sizes.dtype)
    cos, sin = (table[0, :, 0].contiguous() for table in rope_at(torch.arange(30, device=device)[None], d, 1e4))
    position, length = torch.tensor([20, 70], dtype=torch.int32, device=device).split(1)
    k, v = cache.unbind(0)
    attended = attend(qkv, norm, norm, EPS, (cos, sin), position, k, v, length)
    return torch.cat((attended, k[70], v[70]))


def _try_next_token(device: torch.device, sizes: Sizes) -> Iterator[Pair]:
    from .elementwise import next_token, next_token_reference

    decoder, found = sizes.decoder, []
    logits = random(device, decoder.vocab_size, dtype=sizes.dtype)
    logits[FEW_ROWS - 7] = 100  # so that few rows of the table are enough
    rows = random(device, FEW_ROWS, decoder.hidden_size, dtype=sizes.dtype)
    for choose in (next_token, next_token_reference):
        for table in (rows, None):  # which is not on the device where there is no room for it
            token = torch.zeros(1, dtype=torch.int64, device=device)
            embedded = torch.zeros(1, decoder.hidden_size, dtype=sizes.dtype, device=device)
            at = torch.tensor([3, 70], dtype=torch.int32, device=device)
            choose(logits, table, token, embedded, at)
            found.append(torch.cat((token.float(), embedded[0].float(), at.float())))
    yield torch.cat(found[:2]), torch.cat(found[2:])


KERNELS: Mapping[str, Kernel] = {
    "fused": Kernel((7, 5), _try_fused),
    "gemv": Kernel((7, 5), _try_gemv),
    "rope": Kernel((7, 5), _try_rope),
    # Its tile fills the shared memory of 9.0, and other cards' bulk copies were not tried.
    "swiglu_matmul": Kernel((9, 0), _try_swiglu_matmul, major=9),
    "grouped_matmul": Kernel((8, 0), _try_grouped),
    "decode_attention": Kernel((8, 0), _try_attention),
    "next_token": Kernel((7, 5), _try_next_token),
}
"""Triton's kernels that know no format, by name; formats have theirs beside them (`FormatSpec.trials`)."""

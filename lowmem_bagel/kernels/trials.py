"""Which kernels can be used on a device, and why not: by capability first, then by trial.

A trial runs the kernel on a small input and compares it with its PyTorch reference, so that a broken compiler or driver
is found before a picture is drawn with it. Nothing is chosen by a card's name. Outcomes are not kept: ask once, when a
model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SettingError
from ..formats.base import Dequantized, QuantMatmul
from ..formats.int8 import codec as int8
from ..formats.nf4 import codec as nf4
from ..formats.scaled_matmul import Narrow, TokenSteps
from ..hardware.features import why_off
from ..ops.decode_attention import AttendToken
from ..ops.device import indexed, on
from ..ops.dtypes import wide
from ..ops.errors import relative_l2
from ..ops.rope import Rotate, rope_at
from . import triton_language

Trial = Callable[[torch.device], tuple[Tensor, Tensor]]
"""Runs a kernel and its reference on the device: (result, expected)."""

TOLERANCE = 4e-3
"""Largest relative L2 distance of a trial: float32 arithmetic, or int8 values of which a few fall the other way."""

TOLERANCES = {torch.float16: TOLERANCE, torch.bfloat16: 4 * TOLERANCE}
"""The same of kernels whose results are half: a reference may round to bf16 several times where they round once."""

FIRST_WITH_BF16 = (8, 0)


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


@dataclass(frozen=True)
class KernelStatus:
    """A line of `doctor`: `reason` is why the kernel is not used, None where it is."""

    name: str
    reason: str | None


class Choice(NamedTuple):
    """How to multiply by quantised weights, and why each preferred way was refused: (name, reason)."""

    matmul: QuantMatmul
    refused: list[tuple[str, str]]


def why_not(name: str, device: torch.device) -> str | None:
    """None where the kernel called `name` runs on `device` and gives the right answer, else the reason in words."""
    kernel, device = KERNELS[name], indexed(device)
    missing = why_off("triton") or triton_language.MISSING
    if missing:
        return missing
    if not triton_language.interpreted():
        if device.type != "cuda":
            return f"needs a CUDA GPU, not {device.type}"
        unmet = kernel.unmet(torch.cuda.get_device_capability(device))
        if unmet is not None:
            return unmet
    try:
        with on(device):
            result, expected = kernel.trial(device)
    except Exception as error:  # compilers and drivers fail in their own ways, and each is a reason
        return f"its trial failed ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''})"
    distance = relative_l2(result, expected)
    return None if distance <= TOLERANCE else f"its trial was wrong by {distance:.1e}"


def kernel_report(device: torch.device) -> list[KernelStatus]:
    """Every kernel and whether it can be used on `device`: Triton's, and those that serve where it does not."""
    device = indexed(device)
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16
    half = torch.bfloat16 if modern else torch.float16
    compiled = {
        "token_steps": choose_token_steps(device, half)[1],
        "attend_token": choose_attend_token(device, half)[1],
    }
    return [
        *(KernelStatus(name, why_not(name, device)) for name in KERNELS),
        *(KernelStatus(name, reason) for name, reason in compiled.items()),
    ]


def choose_int8(device: torch.device, name: str = "auto") -> Choice:
    """INT8 linears: "triton", else "int_mm" (PyTorch's), else "dequantized"; or the one called `name`.

    Raises:
        SettingError: no way is called `name`, or it cannot run here.
    """

    def triton() -> QuantMatmul:
        from ..formats.int8.kernels import TritonInt8

        return TritonInt8(device)

    return _choose("INT8", device, name, {
        "triton": (lambda: why_not("int8_matmul", device), triton),
        "int_mm": (lambda: _why_no_int_mm(device), int8.IntMm),
        "dequantized": (lambda: None, int8.WeightOnly),
    })  # fmt: skip


def choose_nf4(device: torch.device, name: str = "auto") -> Choice:
    """NF4 linears: "triton", else "dequantized"; or the one called `name`.

    Raises:
        SettingError: no way is called `name`, or it cannot run here.
    """

    def triton() -> QuantMatmul:
        from ..formats.nf4.kernels import TritonNf4

        return TritonNf4()

    return _choose("NF4", device, name, {
        "triton": (lambda: why_not("nf4", device), triton),
        "dequantized": (lambda: None, lambda: Dequantized(nf4.dequantize)),
    })  # fmt: skip


Way = tuple[Callable[[], str | None], Callable[[], QuantMatmul]]
"""Why it cannot be used (None: it can), and how to make it."""


def _choose(form: str, device: torch.device, name: str, ways: Mapping[str, Way]) -> Choice:
    if name != "auto" and name not in ways:
        raise SettingError(f"unknown {form} kernel {name!r}; choose auto or one of {', '.join(ways)}")
    refused: list[tuple[str, str]] = []
    for candidate in ways if name == "auto" else (name,):
        why, make = ways[candidate]
        reason = why()
        if reason is None:
            return Choice(make(), refused)
        refused.append((candidate, reason))
    raise SettingError(f"{form} kernel {name} cannot run on {device} ({refused[0][1]}); choose auto")


def _why_no_int_mm(device: torch.device) -> str | None:
    x, weight, scale = _activation(device), _integers(device), _scales(device)
    try:
        with on(device):
            result = int8.IntMm().matmul(x, weight, scale, None)
    except Exception as error:  # what cuBLAS lacks on a card shows only when it is called
        return f"its trial failed ({type(error).__name__})"
    expected = x @ int8.dequantize(weight, scale, x.dtype).T
    distance = relative_l2(result, expected)
    return None if distance <= 0.05 else f"its trial was wrong by {distance:.1e}"


def choose_token_steps(device: torch.device, half: torch.dtype) -> tuple[TokenSteps, str | None]:
    """The steps around matmuls in fp16 or bf16 arithmetic: by our CUDA kernels, or by PyTorch's operations and why."""
    from .elementwise_cuda import CudaTokenSteps

    kernels, plain = CudaTokenSteps(device, half), TokenSteps(half)
    why = _why_not_compiled(device, half, lambda: (_step_results(kernels, device), _step_results(plain, device)))
    return (kernels, None) if why is None else (plain, why)


def choose_attend_token(device: torch.device, half: torch.dtype) -> tuple[AttendToken, str | None]:
    """One token's attention in fp16 or bf16 arithmetic: by our CUDA kernel, or by PyTorch's operations and why."""
    from ..ops.decode_attention import attend_token as plain
    from .decode_attention_cuda import CudaAttendToken

    kernel = CudaAttendToken(device, half)
    why = _why_not_compiled(device, half, lambda: ([_attended(kernel, device, half)], [_attended(plain, device, half)]))
    return (kernel, None) if why is None else (plain, why)


def _why_not_compiled(
    device: torch.device, half: torch.dtype, trial: Callable[[], tuple[list[Tensor], list[Tensor]]]
) -> str | None:
    """None where kernels that NVRTC compiles give what is expected, else the reason."""
    from . import nvrtc

    why = nvrtc.why_unavailable(device)
    if why is not None:
        return why
    try:
        with on(device):
            distance = max(map(relative_l2, *trial()))
    except RuntimeError as error:  # compilers and drivers fail in their own ways, and each is a reason
        return f"its trial failed ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    return None if distance <= TOLERANCES[half] else f"its trial was wrong by {distance:.1e}"


def _step_results(steps: TokenSteps, device: torch.device) -> list[Tensor]:
    """What every step makes of random numbers."""
    x, norm, bias = (_random(device, *shape).to(steps.wide) for shape in ((3, 4096), (4096,), (64,)))
    columns = _random(device, 64)
    integers, absmax = int8.quantize(_random(device, 64, 4096))[0], _random(device, 64, 64)
    codes = integers[:, :2048].contiguous().view(torch.uint8)
    half, whole = steps.halved(x, 15, norm, 1e-6), steps.quantised(x, norm, 1e-6)
    product = half[0].float() @ integers.float().t()
    return [
        steps.normed(x, norm, 1e-6),
        steps.gated(x),
        _widened(half),
        _widened(whole),
        steps.widened(int8.int_mm(whole[0], integers).contiguous(), whole[1], columns, bias),
        steps.added(_random(device, 3, 64).to(steps.wide), product.clone(), half[1], None, bias),
        steps.activated(product * 1e-6, half[1], columns, None),
        steps.integers(integers),
        steps.levels(codes, absmax),
        steps.times_token(half[0][:1], integers, None),
        steps.times_token(half[0][:1], codes, absmax),
        _rotated(steps.rotate, device, steps.wide, steps.half),
    ]


def _widened(narrow: Narrow) -> Tensor:
    values, back = narrow
    return values.float() * back[:, None]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(len(shape)), device="cpu").to(device)


def _activation(device: torch.device) -> Tensor:
    return _random(device, 32, 128)


def _integers(device: torch.device) -> Tensor:
    return int8.quantize(_random(device, 48, 128))[0]


def _scales(device: torch.device) -> Tensor:
    return _random(device, 48).abs() + 0.1


def _try_int8(device: torch.device) -> tuple[Tensor, Tensor]:
    from ..formats.int8.kernels import TritonInt8, int8_matmul_reference
    from .gemv import gemv_reference

    x, weight, scale = _activation(device), _integers(device), _scales(device)
    quantized, token_scale = int8.quantize_tokens(x)
    many = TritonInt8(device).matmul(x, weight, scale, None)
    wanted = int8_matmul_reference(quantized, token_scale[:, 0], weight, scale, None, x.dtype)
    one = TritonInt8(device).matmul(x[:1], weight, scale, None)
    return torch.cat((many, one)), torch.cat((wanted, gemv_reference(x[:1], weight, scale=scale)))


def _try_gemv(device: torch.device) -> tuple[Tensor, Tensor]:
    from .gemv import gemv, gemv_reference

    x, weight, norm = _activation(device)[:1], _random(device, 48, 128), _random(device, 128)
    return gemv(x, weight, norm=norm, eps=1e-6), gemv_reference(x, weight, norm=norm, eps=1e-6)


def _try_nf4(device: torch.device) -> tuple[Tensor, Tensor]:
    from ..formats.nf4.kernels import nf4_dequantize, nf4_gemv, nf4_gemv_reference

    x, absmax = _activation(device)[:1], _random(device, 48, 2).abs()
    packed = (_integers(device).int() & 0xFF).to(torch.uint8)[:, :64].contiguous()
    once = (nf4_gemv(x, packed, absmax), nf4_gemv_reference(x, packed, absmax))
    whole = (nf4_dequantize(packed, absmax, x.dtype), nf4.dequantize(packed, absmax, x.dtype))
    result, expected = (torch.cat((a.flatten(), b.flatten())) for a, b in zip(once, whole, strict=True))
    return result, expected


def _try_fused(device: torch.device) -> tuple[Tensor, Tensor]:
    from .elementwise import swiglu_quantize, swiglu_quantize_reference

    values, expected = (f(_random(device, 3, 200))[0] for f in (swiglu_quantize, swiglu_quantize_reference))
    return values, expected


def _try_swiglu_matmul(device: torch.device) -> tuple[Tensor, Tensor]:
    from .swiglu_matmul import swiglu_matmul, swiglu_matmul_reference

    x, weight = _random(device, 140, 128).half(), _random(device, 2 * 144, 128).half()
    return swiglu_matmul(x, weight, 2), swiglu_matmul_reference(x, weight)


def _try_rope(device: torch.device) -> tuple[Tensor, Tensor]:
    from .rope import qk_norm_rope, qk_norm_rope_reference

    wide = torch.float32
    return _rotated(qk_norm_rope, device, wide, wide), _rotated(qk_norm_rope_reference, device, wide, wide)


def _rotated(rotate: Rotate, device: torch.device, wide: torch.dtype, half: torch.dtype) -> Tensor:
    qkv, norm = _random(device, 1, 3, 6 * 32).to(wide), _random(device, 32).to(wide)
    block = torch.empty(1, 3, 6, 32, dtype=half, device=device)
    q, k, v = block.split((4, 1, 1), dim=2)
    rotate(qkv, norm, norm, 1e-6, rope_at(torch.arange(3, device=device)[None], 32, 1e4), 4, 1, (q, k, v))
    return block


def _try_attention(device: torch.device) -> tuple[Tensor, Tensor]:
    from .decode_attention import attend_token, attend_token_reference

    return _attended(attend_token, device, torch.float32), _attended(attend_token_reference, device, torch.float32)


def _attended(attend: AttendToken, device: torch.device, dtype: torch.dtype) -> Tensor:
    qkv, norm = _random(device, 8 * 32).to(wide(dtype)), _random(device, 32).to(wide(dtype))
    cache = _random(device, 100, 2, 2, 32).to(dtype)
    cos, sin = (table[0, :, 0].contiguous() for table in rope_at(torch.arange(30, device=device)[None], 32, 1e4))
    position, length = torch.tensor([20, 70], dtype=torch.int32, device=device).split(1)
    k, v = cache.unbind(1)
    attended = attend(qkv, norm, norm, 1e-6, (cos, sin), position, k, v, length)
    return torch.cat((attended, k[70], v[70]))


def _try_next_token(device: torch.device) -> tuple[Tensor, Tensor]:
    from .elementwise import next_token, next_token_reference

    logits, table, found = _random(device, 3000), _random(device, 3000, 32), []
    for choose in (next_token, next_token_reference):
        token, embedded = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, 32, device=device)
        at = torch.tensor([3, 70], dtype=torch.int32, device=device)
        choose(logits, table, token, embedded, at)
        found.append(torch.cat((token.float(), embedded[0], at.float())))
    return found[0], found[1]


KERNELS: Mapping[str, Kernel] = {
    "fused": Kernel((7, 5), _try_fused),
    "gemv": Kernel((7, 5), _try_gemv),
    "nf4": Kernel((7, 5), _try_nf4),
    "rope": Kernel((7, 5), _try_rope),
    # Before 8.0 Triton has no tensor cores: products of integers do not compile, those of halves spill.
    "int8_matmul": Kernel((8, 0), _try_int8),
    # Its tile fills the shared memory of 9.0, and other cards' bulk copies were not tried.
    "swiglu_matmul": Kernel((9, 0), _try_swiglu_matmul, major=9),
    "decode_attention": Kernel((8, 0), _try_attention),
    "next_token": Kernel((7, 5), _try_next_token),
}
"""The kernels by name."""

"""Which kernels can be used on a device, and why not: by capability first, then by trial.

A trial runs the kernel on a small input and compares it with its PyTorch reference, so that a broken compiler or driver
is found before a picture is drawn with it. Nothing is chosen by a card's name. Outcomes are not kept: ask once, when a
model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hardware.features import why_off
from ..ops.decode_attention import AttendToken
from ..ops.device import indexed, on
from ..ops.dtypes import wide
from ..ops.elementwise import Elementwise, Scaled
from ..ops.errors import relative_l2
from ..ops.int8 import int_mm, quantize_rows
from ..ops.rope import Rotate, rope_at
from . import triton_language
from .cuda_source import CudaSource

Trial = Callable[[torch.device], tuple[Tensor, Tensor]]
"""Runs a kernel and its reference on the device: (result, expected)."""

TOLERANCE = 4e-3
"""Largest relative L2 distance of a trial: float32 arithmetic, or int8 values of which a few fall the other way."""

TOLERANCES = {torch.float16: TOLERANCE, torch.bfloat16: 4 * TOLERANCE}
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


def why_not(kernel: Kernel | str, device: torch.device) -> str | None:
    """None where the kernel, or the one called so in `KERNELS`, runs on `device` and gives the right answer; else the
    reason in words."""
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
    try:
        with on(device):
            result, expected = kernel.trial(device)
    except Exception as error:  # compilers and drivers fail in their own ways, and each is a reason
        return f"its trial failed ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''})"
    distance = relative_l2(result, expected)
    return None if distance <= TOLERANCE else f"its trial was wrong by {distance:.1e}"


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

    kernel, device, half = CudaAttendToken(source), source.device, source.half
    why = why_not_compiled(source, lambda: ([_attended(kernel, device, half)], [_attended(plain, device, half)]))
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
        _rotated(around.rotate, device, around.wide, around.half),
    ]


def _scaled_back(scaled: Scaled) -> Tensor:
    values, back = scaled
    return values.float() * back[:, None]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(len(shape)), device="cpu").to(device)


def _try_gemv(device: torch.device) -> tuple[Tensor, Tensor]:
    from .gemv import gemv, gemv_reference

    x, weight, norm = random(device, 32, 128)[:1], random(device, 48, 128), random(device, 128)
    return gemv(x, weight, norm=norm, eps=1e-6), gemv_reference(x, weight, norm=norm, eps=1e-6)


def _try_fused(device: torch.device) -> tuple[Tensor, Tensor]:
    from .elementwise import swiglu_quantize, swiglu_quantize_reference

    values, expected = (f(random(device, 3, 200))[0] for f in (swiglu_quantize, swiglu_quantize_reference))
    return values, expected


def _try_swiglu_matmul(device: torch.device) -> tuple[Tensor, Tensor]:
    from .swiglu_matmul import swiglu_matmul, swiglu_matmul_reference

    x, weight = random(device, 140, 128).half(), random(device, 2 * 144, 128).half()
    return swiglu_matmul(x, weight, 2), swiglu_matmul_reference(x, weight)


def _try_rope(device: torch.device) -> tuple[Tensor, Tensor]:
    from .rope import qk_norm_rope, qk_norm_rope_reference

    wide = torch.float32
    return _rotated(qk_norm_rope, device, wide, wide), _rotated(qk_norm_rope_reference, device, wide, wide)


def _rotated(rotate: Rotate, device: torch.device, wide: torch.dtype, half: torch.dtype) -> Tensor:
    qkv, norm = random(device, 1, 3, 6 * 32).to(wide), random(device, 32).to(wide)
    block = torch.empty(1, 3, 6, 32, dtype=half, device=device)
    q, k, v = block.split((4, 1, 1), dim=2)
    rotate(qkv, norm, norm, 1e-6, rope_at(torch.arange(3, device=device)[None], 32, 1e4), 4, 1, (q, k, v))
    return block


def _try_attention(device: torch.device) -> tuple[Tensor, Tensor]:
    from .decode_attention import attend_token, attend_token_reference

    return _attended(attend_token, device, torch.float32), _attended(attend_token_reference, device, torch.float32)


def _attended(attend: AttendToken, device: torch.device, dtype: torch.dtype) -> Tensor:
    qkv, norm = random(device, 8 * 32).to(wide(dtype)), random(device, 32).to(wide(dtype))
    cache = random(device, 100, 2, 2, 32).to(dtype)
    cos, sin = (table[0, :, 0].contiguous() for table in rope_at(torch.arange(30, device=device)[None], 32, 1e4))
    position, length = torch.tensor([20, 70], dtype=torch.int32, device=device).split(1)
    k, v = cache.unbind(1)
    attended = attend(qkv, norm, norm, 1e-6, (cos, sin), position, k, v, length)
    return torch.cat((attended, k[70], v[70]))


def _try_next_token(device: torch.device) -> tuple[Tensor, Tensor]:
    from .elementwise import next_token, next_token_reference

    logits, table, found = random(device, 3000), random(device, 3000, 32), []
    for choose in (next_token, next_token_reference):
        token, embedded = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, 32, device=device)
        at = torch.tensor([3, 70], dtype=torch.int32, device=device)
        choose(logits, table, token, embedded, at)
        found.append(torch.cat((token.float(), embedded[0], at.float())))
    return found[0], found[1]


KERNELS: Mapping[str, Kernel] = {
    "fused": Kernel((7, 5), _try_fused),
    "gemv": Kernel((7, 5), _try_gemv),
    "rope": Kernel((7, 5), _try_rope),
    # Its tile fills the shared memory of 9.0, and other cards' bulk copies were not tried.
    "swiglu_matmul": Kernel((9, 0), _try_swiglu_matmul, major=9),
    "decode_attention": Kernel((8, 0), _try_attention),
    "next_token": Kernel((7, 5), _try_next_token),
}
"""Triton's kernels that know no format, by name; formats have theirs beside them (`FormatSpec.trials`)."""

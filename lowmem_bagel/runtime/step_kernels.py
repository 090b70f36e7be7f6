"""Which kernels a captured step of text runs on."""

from __future__ import annotations

import torch

from ..kernels.trial_inputs import Sizes
from ..ops.decode_attention import attend_token as plain_attention
from ..sampling.text_graph import StepKernels


def graph_kernels(device: torch.device, sizes: Sizes) -> tuple[StepKernels | None, str | None]:
    """What a step runs on, None where there is no graph; and why it is not kernels of ours."""
    dtype = sizes.dtype
    if device.type != "cuda":
        return None, f"needs a CUDA GPU, not {device.type}"
    from ..kernels.cuda_source import CudaSource
    from ..kernels.elementwise import next_token, next_token_reference
    from ..kernels.trials import choose_attend_token, why_not

    names = () if dtype == torch.float16 else ("decode_attention", "next_token")  # Triton serves no fp16 arithmetic
    reasons = [f"kernel {name}: {why}" for name in names if (why := why_not(name, device, sizes))]
    if dtype == torch.float16 or (dtype == torch.bfloat16 and reasons):
        attend, why = choose_attend_token(CudaSource(device, dtype))
        return StepKernels(attend, next_token_reference), why and f"attention by PyTorch's operations: {why}"
    if reasons:
        plain = StepKernels(plain_attention, next_token_reference)
        return plain, f"by PyTorch's operations ({reasons[0]})"
    from ..kernels.decode_attention import attend_token

    return StepKernels(attend_token, next_token), None

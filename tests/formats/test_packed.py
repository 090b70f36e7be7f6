"""INT8 and NF4 weights that CUDA kernels read as they are, against PyTorch's operations: emulated, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from support.cuda_emulation import CudaSources
from support.numeric import gaussian, relative_l2
from torch import Tensor

from lowmem_bagel.formats.int8 import codec as int8
from lowmem_bagel.formats.int8 import trial as int8_trial
from lowmem_bagel.formats.int8.packed import INTEGERS_DOWN, CudaPackedInt8, PackedInt8
from lowmem_bagel.formats.nf4 import trial as nf4_trial
from lowmem_bagel.formats.nf4.packed import CudaPackedNf4, PackedNf4
from lowmem_bagel.kernels import nvrtc
from lowmem_bagel.kernels.cuda_source import CudaSource
from lowmem_bagel.ops.elementwise import Elementwise

EXPONENT = 15
CLOSE = 2e-6
"""Relative L2: sums are not taken in the same order."""


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def source(request: pytest.FixtureRequest, cuda_sources: CudaSources) -> CudaSource:
    return CudaSource(cuda_sources.device, request.param, cuda_sources.load)


def random(*shape: int, std: float = 1.0, seed: int = 0) -> Tensor:
    device = torch.get_default_device()
    with torch.device("cpu"):
        return gaussian(*shape, std=std, seed=seed).to(device)


def codes(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Random NF4 bytes and their absmax."""
    found = (random(rows, width // 2, std=100.0).int() & 255).to(torch.uint8)
    return found, random(rows, width // 64, seed=1).abs() * 0.02


@pytest.mark.parametrize(("rows", "width"), [(3, 64), (33, 3584), (16, 448)])
def test_weights_become_halves_to_the_bit(source: CudaSource, rows: int, width: int) -> None:
    packed, absmax = codes(rows, width)
    found = CudaPackedNf4(source).to_half(packed, absmax)
    assert found.dtype == source.half
    assert torch.equal(found, PackedNf4(source.half).to_half(packed, absmax))
    weight = packed.view(torch.int8).contiguous()
    found = CudaPackedInt8(source).to_half(weight)
    assert torch.equal(found, PackedInt8(source.half).to_half(weight))
    assert torch.equal(found.double() / INTEGERS_DOWN, weight.double())


@pytest.mark.parametrize(("rows", "width"), [(3, 64), (33, 3584), (16, 18944), (17, 2112), (1, 2048), (5, 4128)])
def test_one_token_is_multiplied_as_the_weights_are_read(source: CudaSource, rows: int, width: int) -> None:
    even = width // 64 * 64
    packed, absmax = codes(rows, even)
    integers = int8.quantize(random(rows, width, seed=6))[0]
    token, _ = Elementwise(source.half).to_fp16(random(1, width, seed=7), EXPONENT)
    first = token[:, :even].contiguous()
    for found, wanted in (
        (
            CudaPackedNf4(source).times_token(first, packed, absmax),
            PackedNf4(source.half).times_token(first.double(), packed, absmax),
        ),
        (
            CudaPackedInt8(source).times_token(token, integers),
            PackedInt8(source.half).times_token(token.double(), integers),
        ),
    ):
        assert found.shape == (1, rows)
        assert found.dtype == torch.float32
        assert relative_l2(found, wanted) < CLOSE


def test_the_trial_before_use_accepts_them_and_refuses_wrong_ones(
    source: CudaSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "why_unavailable", lambda _: None)
    assert int8_trial.why_not_packed(source) is None
    assert nf4_trial.why_not_packed(source) is None
    for kind, trial in ((CudaPackedInt8, int8_trial), (CudaPackedNf4, nf4_trial)):
        right = kind.to_half
        monkeypatch.setattr(kind, "to_half", lambda *given, right=right: right(*given) * 1.0625)
        why = trial.why_not_packed(source)
        assert why is not None
        assert why.startswith("its trial was wrong by 6.")

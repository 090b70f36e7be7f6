"""The cases of the kernel benchmarks, in small: each kernel's own source emulated on the CPU, or on a GPU.

Triton's cases run in support/triton_kernels.py, with the interpreter that it needs.
"""

from __future__ import annotations

import pytest
import torch
from lowmem_bagel.benchmarks.cases import Case, Setup
from lowmem_bagel.benchmarks.shapes import TINY, linears, projections, shape_named
from lowmem_bagel.benchmarks.suites import kernels_lossless, kernels_steps
from support.cuda_emulation import CudaSources

from lowmem_bagel.errors import SettingError
from lowmem_bagel.kernels import nvrtc
from lowmem_bagel.planner.facts import BAGEL_7B


@pytest.fixture
def small(cuda_sources: CudaSources, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Where sources are emulated, whoever asks NVRTC for one gets the emulation."""
    load = cuda_sources.load
    if load is not None:
        monkeypatch.setattr(nvrtc, "load", lambda source, device, defines=None: load(source, defines or {}))
    torch.manual_seed(0)
    return Setup(cuda_sources.device, TINY.decoder, 40, check_only=True)


def test_steps_around_matmuls_are_right(small: Setup) -> None:
    found = [case.check() for part in kernels_steps.PARTS for case in part(small)]
    assert {case["kernel"] for case in found} >= {"halve", "add", "norm and rope", "swiglu", "NF4, one token"}
    assert not [case for case in found if not case["right"]]


def test_decoded_weights_have_equal_bits(small: Setup) -> None:
    group = {"layer": [kernels_lossless.DeviceGroup(small, 64, 100), kernels_lossless.DeviceGroup(small, 7, 9)]}
    (case,) = kernels_lossless.cases(small, group)
    assert case.check()["right"]
    signs = case.inputs[0].components[1][2]
    signs[5] ^= 1
    assert not case.check()["right"], "one bit is wrong"


def test_a_kernel_that_is_wrong_is_told() -> None:
    def case(run: object) -> Case:
        return Case("k", "s", run, lambda x: x + 1, [torch.ones(4)], 1.0)  # type: ignore[arg-type]

    assert case(lambda x: x + 1).check()["right"] is True
    assert case(lambda x: x + 1.1).check()["right"] is False
    assert case(torch.empty_like).check()["right"] is False, "fresh memory is poisoned"
    assert case(lambda x: x.div_(0)).check()["right"] is False

    place = torch.zeros(4)

    def written(x: torch.Tensor) -> torch.Tensor:
        return place.copy_(x)

    reference = Case("k", "s", lambda x: place, written, [torch.ones(4)], 1.0)
    assert reference.check()["right"] is False, "the reference writes to the same place afterwards"


def test_shapes_are_the_planners() -> None:
    assert linears(BAGEL_7B.decoder) == {
        "qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)
    }  # fmt: skip
    assert projections(BAGEL_7B.decoder)["k"] == (512, 3584)
    assert shape_named("bagel-7b") is BAGEL_7B
    with pytest.raises(SettingError, match="unknown shape 'huge'; choose one of bagel-7b, bagel-moe-7b, tiny, "):
        shape_named("huge")

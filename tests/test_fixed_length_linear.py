"""Folders kept in the fixed-length form: the very pictures and answers of the weights they were made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cuda_emulation
import pytest
import torch
from lowmem_bagel.converters.registry import convert_folder
from test_streaming import UNITS, drawn, fake_cuda

from lowmem_bagel import BagelPipeline
from lowmem_bagel.folder import ModelFolder
from lowmem_bagel.kernels.fixed_length import FixedLengthKernels
from lowmem_bagel.kernels.fixed_length_packed import PACKED_TENSORS
from lowmem_bagel.loader import load as load_planned
from lowmem_bagel.plan import Residency
from lowmem_bagel.planning import plan_for
from lowmem_bagel.quant import fixed_length_linear
from lowmem_bagel.quant.fixed_length_linear import EncodedAtLoad, fixed_length_linears
from lowmem_bagel.quant.stored import DenseLinears

CHECKPOINT = Path(__file__).parent / "data" / "golden" / "checkpoint"
QUESTION = "what is this?"

__all__ = ["fake_cuda"]


@pytest.fixture(scope="module")
def dfloat11(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants") / "dfloat11"
    convert_folder(CHECKPOINT, folder, "dfloat11")
    return folder


def load(folder: Path, backend: str, dtype: str = "bfloat16", **options: object) -> BagelPipeline:
    return BagelPipeline.from_pretrained(folder, device="cpu", dtype=dtype, backend=backend, **options)


def encoded(pipe: BagelPipeline) -> list[EncodedAtLoad]:
    return [module for module in pipe.model.bagel.modules() if isinstance(module, EncodedAtLoad)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_changes(dfloat11: Path, dtype: str) -> None:
    plain = load(CHECKPOINT, "native", dtype)
    for folder in (CHECKPOINT, dfloat11):
        pipe = load(folder, "fixed-length", dtype)
        assert len(encoded(pipe)) == 4 * len(UNITS)
        assert "fixed-length" in pipe.model.plan.reasons["linears"]
        assert "not cpu" in pipe.model.plan.reasons["fixed-length kernels"]
        assert torch.equal(drawn(pipe), drawn(plain))
        assert pipe.ask(QUESTION, max_new_tokens=8).token_ids == plain.ask(QUESTION, max_new_tokens=8).token_ids


def test_weights_take_the_room_that_the_form_promises() -> None:
    """Of tensors this small the padding to tiles is the larger part, so it is counted."""
    (layer,) = {linear.in_features for linear in encoded(load(CHECKPOINT, "fixed-length", tasks=("ask",)))} - {128}
    for linear in encoded(load(CHECKPOINT, "fixed-length", tasks=("ask",))):
        padded = linear.out_features * -(-linear.in_features // 256) * 256
        nbytes = sum(getattr(linear, name).nbytes for name in PACKED_TENSORS)
        escapes = int(linear.tile_starts[-1])
        assert 11 * padded <= 8 * nbytes <= 11 * padded + 24 * (escapes + 16) + 32 * (padded // 256 + 1) + 64
    assert layer > 128


@pytest.mark.usefixtures("fake_cuda")
def test_it_streams_like_any_other_form() -> None:
    opened = ModelFolder.open(CHECKPOINT)
    plan = plan_for(opened, device="cpu", dtype="bfloat16", backend="fixed-length")
    wanted = drawn(load(CHECKPOINT, "native"))
    for source in ("pageable", "disk"):
        streamed = replace(plan, residency=Residency(UNITS[1:], 3, source), guidance_batch=True)
        assert torch.equal(drawn(BagelPipeline(load_planned(opened, streamed))), wanted)


@pytest.mark.skipif(cuda_emulation.compiler() is None, reason="needs g++ to emulate the kernels")
def test_tokens_read_the_form_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' own source, emulated; both ways of multiplying: a prompt is decoded first, a token is not."""
    calls: list[tuple[str, int]] = []

    class Counted(FixedLengthKernels):
        def decode_into(self, weight: object, out: torch.Tensor) -> None:
            out.fill_(float("nan"))
            calls.append(("decode", 0))
            super().decode_into(weight, out)

        def matmul(self, weight: object, x: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
            calls.append(("direct", x.numel() // x.shape[-1]))
            return super().matmul(weight, x, *rest, **options)

    kernels = Counted(torch.device("cpu"), cuda_emulation.Module, cuda_emulation.SHARED_BYTES)
    monkeypatch.setattr(fixed_length_linear, "_kernels", lambda device: kernels)
    pipe = load(CHECKPOINT, "fixed-length", tasks=("ask",))
    long = "what is in this picture, and where is it, and why? " * 2
    found = pipe.ask(long, max_new_tokens=4).token_ids
    assert found == load(CHECKPOINT, "native", tasks=("ask",)).ask(long, max_new_tokens=4).token_ids
    assert ("decode", 0) in calls and ("direct", 1) in calls


def refusal(folder: ModelFolder, dtype: torch.dtype) -> str:
    reasons: dict[str, str] = {}
    assert fixed_length_linears(folder, torch.device("cpu"), dtype, DenseLinears(dtype), reasons) is None
    return reasons["fixed-length form"]


def test_where_it_cannot_be_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ModelFolder.open(CHECKPOINT)
    assert "fp16 arithmetic" in refusal(folder, torch.float16)
    entry = folder.entry
    monkeypatch.setattr(folder, "entry", lambda name: replace(entry(name), dtype="F32"))
    assert "is stored as F32" in refusal(folder, torch.bfloat16)

"""The error table: recorded activations are real inputs, and every format's row is of the size it must be."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from lowmem_bagel.benchmarks.activations import TOKENS_KEPT, TOKENS_PER_CALL, Recorder, record
from lowmem_bagel.benchmarks.suites.codec_errors import errors, model_cases
from support.numeric import gaussian
from support.paths import CHECKPOINT

from lowmem_bagel.ops.linear import SWIGLU, DenseLinear, RMSNorm, rms_norm, swiglu
from lowmem_bagel.pipeline import BagelPipeline

# Found and not imported: it takes seconds, from every worker that collects.
pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def test_a_recorder_keeps_what_the_matmul_is_given_and_changes_nothing() -> None:
    dense = DenseLinear(16, 4, False, torch.float32)
    dense.weight.copy_(gaussian(4, 16))
    x, norm, gate_up = gaussian(3, 16, seed=1), gaussian(16, seed=2), gaussian(2, 32, seed=3)
    calls = [(x, RMSNorm(norm, 1e-6)), (gate_up, SWIGLU), (x.split([1, 2]), None, SWIGLU)]
    wanted = [dense(*given) for given in calls]
    recorder = dense.product = Recorder(dense)
    assert all(torch.equal(dense(*given), result) for given, result in zip(calls, wanted, strict=True))
    assert torch.equal(recorder.recorded(), torch.cat((rms_norm(x, norm, 1e-6), swiglu(gate_up), x)))
    for seed in range(2 * TOKENS_KEPT // TOKENS_PER_CALL):
        dense(gaussian(5 * TOKENS_PER_CALL, 16, seed=seed))
    assert recorder.recorded().shape == (TOKENS_KEPT, 16)


def test_every_linear_of_a_checkpoint_is_recorded_and_measured() -> None:
    pipeline = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float32")
    settings = {"num_timesteps": 2, "height": 64, "width": 64}
    expected = pipeline.generate("a cat", seed=3, **settings).latent
    activations = record(pipeline, ["a cat"], "What is it?", **settings)
    assert torch.equal(pipeline.generate("a cat", seed=3, **settings).latent, expected)
    cases = list(model_cases(CHECKPOINT, activations))
    decoder = pipeline.model.folder.config.decoder
    assert len(cases) == decoder.num_layers * 2 * 4
    # A linear's activations lie under the name of a weight that they can multiply.
    assert all(x.shape[1] == weight.shape[1] and x.abs().amax() > 0 for _, weight, x in cases)


def test_the_table_orders_the_formats_by_what_they_keep() -> None:
    rows = {row.format: row for row in errors("", gaussian(64, 512, std=0.02).bfloat16(), gaussian(8, 512, seed=1))}
    gguf = ["gguf-q8_0", "gguf-q6_k", "gguf-q5_k", "gguf-q4_k"]
    assert list(rows) == ["int8", "int8 rotated", "fp8", "nf4", "fp16", *gguf]
    assert rows["gguf-q8_0"].weight < rows["int8"].weight < rows["gguf-q6_k"].weight < rows["fp8"].weight
    assert rows["gguf-q6_k"].weight < rows["gguf-q5_k"].weight < rows["gguf-q4_k"].weight < rows["nf4"].weight
    assert all(rows[name].file == rows[name].arithmetic for name in gguf)
    assert rows["fp16"].weight < 1e-4 < 0.004 < rows["int8"].weight < 0.012 < 0.08 < rows["nf4"].weight < 0.1
    assert 2 * rows["int8"].weight < rows["fp8"].weight < 0.04 < 0.08 < rows["nf4"].weight
    assert rows["fp8"].file < rows["fp8"].arithmetic < 2 * rows["fp8"].file
    assert rows["int8"].file < rows["int8"].arithmetic < 2 * rows["int8"].file
    assert rows["fp16"].file < 1e-4 < rows["fp16"].arithmetic < 5e-4

"""The static decoding step: what the CUDA graph captures gives what the ordinary forward gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from support.cuda_emulation import CudaSources
from support.numeric import relative_l2
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline
from lowmem_bagel.generation.inputs import Contexts, TextBlock
from lowmem_bagel.kernels import decode_attention_cuda as attend_token
from lowmem_bagel.kernels import nvrtc
from lowmem_bagel.kernels import trials as availability
from lowmem_bagel.kernels.cuda_source import CudaSource
from lowmem_bagel.kernels.decode_attention import attend_token_reference
from lowmem_bagel.kernels.decode_attention_cuda import CudaAttendToken
from lowmem_bagel.kernels.elementwise import next_token_reference
from lowmem_bagel.kernels.trial_inputs import SMALL, Sizes
from lowmem_bagel.ops import decode_attention as token_attention
from lowmem_bagel.ops.decode_attention import AttendToken
from lowmem_bagel.ops.device import GraphMemory
from lowmem_bagel.ops.linear import Dense
from lowmem_bagel.ops.rope import rope_at
from lowmem_bagel.runtime.step_kernels import graph_kernels
from lowmem_bagel.sampling.text import EagerNextToken, TokenChoice, append_text
from lowmem_bagel.sampling.text_graph import GraphNextToken, StepKernels, TokenStep, why_not_graph

TOKENS = 12
NEAR_TIE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.2}
"""Standard deviations of the logits."""


def contexts(pipe: BagelPipeline) -> Contexts:
    block = TextBlock(tuple(pipe.model.tokenizer.text_block("the quick brown fox")))
    made = Contexts(pipe.model, [block], 0, image_branch=False, spare=TOKENS)
    made.append(block, torch.Generator())
    return made


def decoded(next_token: object, start: int) -> list[int]:
    ids = [start]
    for _ in range(TOKENS - 1):
        ids.append(next_token(ids[-1]))
    return ids


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 3e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("attend", [attend_token_reference, token_attention.attend_token])
def test_static_step_equals_the_ordinary_forward(attend: AttendToken, dtype: str, bound: float) -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype=dtype, tasks=("ask",))
    bagel, token = pipe.model.bagel, pipe.model.tokenizer.im_start
    with torch.inference_mode():
        ordinary, given = contexts(pipe).full, contexts(pipe).full
        for cache in (given.kv_cache.keys, given.kv_cache.values):  # what nothing was written to may be anything
            cache[:, given.spans[0].stop :] = torch.nan
        step = TokenStep(bagel, given, StepKernels(attend, next_token_reference))
        step.append(token)
        for _ in range(TOKENS - 1):
            hidden = append_text(bagel, ordinary, torch.tensor([token]), pipe.model.attention)
            wanted = bagel.logits(hidden[:, -1:])[0, 0]
            step()
            assert relative_l2(step.logits, wanted) < bound
            assert int(step.token) == int(step.logits.argmax())
            if dtype == "float32":
                assert int(step.token) == int(wanted.argmax())
            token = int(step.token)


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def half(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of the cache."""
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def kernel(cuda_sources: CudaSources, half: torch.dtype) -> CudaAttendToken:
    return CudaAttendToken(CudaSource(cuda_sources.device, half, cuda_sources.load))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "length"),
    [
        (28, 4, 128, 600),  # the 7B model's
        *((4, 2, 32, length) for length in (0, 1, 7, 33, 515)),
        *(
            (*shape, length)
            for shape in [(7, 1, 128), (3, 3, 64), (14, 2, 96), (4, 1, 48), (2, 1, 256)]
            for length in (0, 33, 515)
        ),
    ],
)
def test_the_kernel_attends_as_the_reference(
    kernel: CudaAttendToken, heads: int, kv_heads: int, d: int, length: int
) -> None:
    """In a cache with gaps, whose rows from `length` on hold nothing."""
    rows = length + 3
    half, wide = kernel.half, kernel.wide
    qkv, q_norm, k_norm = (torch.randn(n).to(wide) for n in ((heads + 2 * kv_heads) * d, d, d))
    cos, sin = (table[0, :, 0].contiguous() for table in rope_at(torch.arange(50)[None], d, 1e6))
    given = (qkv, q_norm, k_norm, 1e-6, (cos, sin), torch.tensor([7], dtype=torch.int32))
    room = torch.randn(2, rows, kv_heads + 1, d).to(half)
    room[:, length:] = torch.nan if d in (128, 32, 64, 96) else 0.0
    ours, theirs = (room.clone()[:, :, 1:] for _ in range(2))
    at = torch.tensor([length], dtype=torch.int32)
    found = kernel(*given, ours[0], ours[1], at)
    wanted = attend_token_reference(*given, theirs[0], theirs[1], at)
    assert found.dtype == wide
    assert relative_l2(found, wanted) < (1e-3 if half == torch.float16 else 6e-3)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[1][length], theirs[1][length])
    assert relative_l2(ours[0][length], theirs[0][length]) < 1e-3
    assert torch.equal(ours[:, :length], room[:, :length, 1:])


def test_the_trial_before_use_accepts_the_kernel(
    kernel: CudaAttendToken, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "why_unavailable", lambda _: None)
    monkeypatch.setattr(attend_token, "CudaAttendToken", lambda *_: kernel)
    assert availability.choose_attend_token(CudaSource(torch.get_default_device(), half)) == (kernel, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_attention_is_the_references(dtype: torch.dtype) -> None:
    heads, kv_heads, d, rows = 14, 2, 64, 37
    qkv, q_norm, k_norm = (torch.randn(n) for n in ((heads + 2 * kv_heads) * d, d, d))
    tables = rope_at(torch.arange(50)[None], d, 1e6)
    cos, sin = (table[0, :, 0] for table in tables)
    for length in (0, 1, 20, rows - 1):
        caches = [torch.randn(rows, kv_heads, d).to(dtype) for _ in range(2)]
        given = (qkv, q_norm, k_norm, 1e-6, (cos, sin), torch.tensor([7], dtype=torch.int32))
        at = torch.tensor([length], dtype=torch.int32)
        ours, theirs = [c.clone() for c in caches], [c.clone() for c in caches]
        found = token_attention.attend_token(*given, *ours, at)
        wanted = attend_token_reference(*given, *theirs, at)
        assert relative_l2(found, wanted) < (1e-5 if dtype == torch.float32 else 6e-3)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert not torch.equal(ours[0][length], caches[0][length])


def test_a_graph_that_cannot_be_captured_is_refused_and_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float32", tasks=("ask",))
    wanted = pipe.run(["the quick brown fox"], output="text", max_new_tokens=40).token_ids

    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    pipe.model.step_kernels = StepKernels(attend_token_reference, next_token_reference)
    monkeypatch.setattr("lowmem_bagel.generation.executor.why_not_graph", lambda *_: None)
    monkeypatch.setattr("lowmem_bagel.generation.executor.GraphNextToken", refuse)
    assert pipe.run(["the quick brown fox"], output="text", max_new_tokens=40).token_ids == wanted
    assert pipe.model.step_kernels is None
    reason = "cannot be captured: operation not permitted when stream is capturing"
    assert pipe.model.plan.reasons["text decoding by graph"] == reason


def test_fp16_arithmetic_asks_for_no_kernel_of_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "why_not", lambda name, *_: pytest.fail(f"{name} was tried"))
    chosen = lambda *_: (token_attention.attend_token, "no NVRTC")  # noqa: E731
    monkeypatch.setattr(availability, "choose_attend_token", chosen)
    kernels, why = graph_kernels(torch.device("cuda"), Sizes(SMALL, torch.float16))
    assert kernels is not None
    assert kernels.attend is token_attention.attend_token
    assert why == "attention by PyTorch's operations: no NVRTC"


def test_graph_is_refused_on_a_cpu_with_the_reason() -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", tasks=("ask",))
    assert "CUDA" in (why_not_graph(pipe.model.bagel, contexts(pipe).full) or "")


def test_linears_say_that_no_graph_can_capture_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dense, "graph_blocker", "it asks the host")
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", tasks=("ask",))
    assert pipe.model.step_kernels is None
    assert pipe.model.plan.reasons["text decoding by graph"] == "it asks the host"


class ReplayedAtOnce:
    """In place of a CUDA graph: what was captured is called again, on the CPU."""

    step: TokenStep
    replays = 0

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        pass

    def capture_end(self) -> None:
        pass

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        type(self).replays += 1
        self.step()


def on_a_cpu(monkeypatch: pytest.MonkeyPatch, step: TokenStep) -> type[ReplayedAtOnce]:
    graph = type("Graph", (ReplayedAtOnce,), {"step": step})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return graph


@pytest.mark.parametrize("table", ["on the device", "elsewhere"])
def test_steps_queued_ahead_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float32", tasks=("ask",))
    bagel, start = pipe.model.bagel, pipe.model.tokenizer.im_start
    with torch.inference_mode():
        eager = EagerNextToken(bagel, contexts(pipe).full, pipe.model.attention, TokenChoice(), torch.Generator())
        wanted = decoded(eager, start)
        step = TokenStep(bagel, contexts(pipe).full, StepKernels(attend_token_reference, next_token_reference))
        room = step.keys.shape[1] - step.length
        if table == "elsewhere":
            step.table = None
        graph = on_a_cpu(monkeypatch, step)
        assert decoded(GraphNextToken(step, TokenChoice(), torch.Generator(), start, pytest.fail), start) == wanted
    ahead = GraphNextToken.AHEAD - 1 if table == "on the device" else 0
    assert graph.replays == min(TOKENS - 2 + ahead, room - 1), "the first token comes before the graph"


@pytest.mark.parametrize("table", ["on the device", "elsewhere"])
def test_a_capture_that_fails_after_the_first_token_changes_no_token(
    monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float32", tasks=("ask",))
    bagel, start = pipe.model.bagel, pipe.model.tokenizer.im_start
    captures: list[str] = []

    def fail(device: torch.device, step: TokenStep, warm_up: Callable[[], None], memory: GraphMemory) -> None:
        captures.append("begun")
        warm_up()
        step()  # as far as it got
        raise RuntimeError("operation not permitted when stream is capturing")

    with torch.inference_mode():
        eager = EagerNextToken(bagel, contexts(pipe).full, pipe.model.attention, TokenChoice(), torch.Generator())
        wanted = decoded(eager, start)
        step = TokenStep(bagel, contexts(pipe).full, StepKernels(attend_token_reference, next_token_reference))
        if table == "elsewhere":
            step.table = None
        on_a_cpu(monkeypatch, step)
        monkeypatch.setattr("lowmem_bagel.sampling.text_graph.captured", fail)
        why: list[str] = []
        made = GraphNextToken(step, TokenChoice(), torch.Generator(), start, lambda error: why.append(str(error)))
        assert made(start) == wanted[1] and not captures, "it does not wait for the capture"
        found = [start, wanted[1]]
        for _ in range(TOKENS - 2):
            found.append(made(found[-1]))
    assert found == wanted
    assert captures == ["begun"] and why == ["operation not permitted when stream is capturing"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("without", ["", "triton", "triton,nvrtc"])
def test_graph_equals_eager_decoding(dtype: str, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", without)
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cuda", dtype=dtype, tasks=("ask",))
    bagel, start = pipe.model.bagel, pipe.model.tokenizer.im_start
    kernels, why = graph_kernels(bagel.device, Sizes(bagel.config.decoder, bagel.dtype))
    assert kernels is not None, why
    assert (why is None) == (not without or (without == "triton" and dtype != "float32")), why
    with torch.inference_mode():
        ordinary = contexts(pipe).full
        step = TokenStep(bagel, contexts(pipe).full, kernels)
        ids = decoded(GraphNextToken(step, TokenChoice(), torch.Generator(), start, pytest.fail), start)
        if dtype == "float32":
            eager = EagerNextToken(bagel, contexts(pipe).full, pipe.model.attention, TokenChoice(), torch.Generator())
            assert ids == decoded(eager, start)
        for token, chosen in itertools.pairwise(ids):  # in half precision, near ties may fall either way
            hidden = append_text(bagel, ordinary, torch.tensor([token]), pipe.model.attention)
            logits = bagel.logits(hidden[:, -1:])[0, 0].float()
            assert logits[chosen] >= logits.max() - NEAR_TIE[dtype] * logits.std()


@pytest.mark.gpu
def test_answers_neither_give_memory_back_nor_pile_it_up() -> None:
    """The next request finds what torch keeps; and what one graph computed in is the next one's."""
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cuda", tasks=("ask",))
    freed = lambda: torch.cuda.memory_stats()["segment.all.freed"]  # noqa: E731
    pipe.ask("what is it?", max_new_tokens=40)
    given_back, held = freed(), torch.cuda.memory_reserved()
    for _ in range(4):
        pipe.ask("what is it?", max_new_tokens=40)
    assert freed() == given_back
    assert torch.cuda.memory_reserved() == held

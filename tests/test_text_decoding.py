"""The static decoding step: what the CUDA graph captures gives what the ordinary forward gives."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from lowmem_bagel import BagelPipeline
from lowmem_bagel.kernels.decode_attention import attend_token_reference
from lowmem_bagel.kernels.fused import next_token_reference
from lowmem_bagel.model.linear import DenseLinear
from lowmem_bagel.quant.int8_backends import BitsandbytesInt8
from lowmem_bagel.request import Contexts, TextBlock
from lowmem_bagel.sampling.text import EagerNextToken, TokenChoice
from lowmem_bagel.sampling.text_graph import GraphNextToken, Step, StepKernels, why_not_graph

CHECKPOINT = Path(__file__).parent / "data" / "golden" / "checkpoint"
TOKENS = 12


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


def test_static_step_equals_the_ordinary_forward() -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype="float32", tasks=("ask",))
    bagel, start = pipe.model.bagel, pipe.model.tokenizer.im_start
    with torch.inference_mode():
        eager = EagerNextToken(bagel, contexts(pipe).full, pipe.model.attention, TokenChoice(), torch.Generator())
        wanted = decoded(eager, start)
        step = Step(bagel, contexts(pipe).full, StepKernels(attend_token_reference, next_token_reference))
        found = [start]
        step.append(start)
        for _ in range(TOKENS - 1):
            step()
            found.append(int(step.token))
    assert found == wanted


def test_graph_is_refused_on_a_cpu_with_the_reason() -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", tasks=("ask",))
    assert "CUDA" in (why_not_graph(pipe.model.bagel, contexts(pipe).full) or "")


def test_linears_say_that_no_graph_can_capture_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BitsandbytesInt8.why_not_captured, "LLM.int8() counts outliers on the host"
    monkeypatch.setattr(DenseLinear, "why_not_captured", "it asks the host")
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", tasks=("ask",))
    assert pipe.model.step_kernels is None
    assert pipe.model.plan.reasons["text decoding by graph"] == "it asks the host"


@pytest.mark.parametrize("fills", [False, True])
def test_attention_waits_for_its_turn_beside_kernels_that_fill_the_card(
    fills: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(DenseLinear, "fills_the_card", fills)
    monkeypatch.setattr("lowmem_bagel.loader.graph_kernels", lambda device, early: asked.append(early) or "none here")
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", tasks=("ask",))
    assert asked == [not fills]
    assert pipe.model.plan.reasons["text decoding by graph"] == "none here"


class ReplayedAtOnce:
    """In place of a CUDA graph: what was captured is called again, on the CPU."""

    step: Step
    replays = 0

    def replay(self) -> None:
        type(self).replays += 1
        self.step()


def on_a_cpu(monkeypatch: pytest.MonkeyPatch, step: Step) -> type[ReplayedAtOnce]:
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
        step = Step(bagel, contexts(pipe).full, StepKernels(attend_token_reference, next_token_reference))
        room = step.keys.shape[1] - step.length
        if table == "elsewhere":
            step.table = None
        graph = on_a_cpu(monkeypatch, step)
        assert decoded(GraphNextToken(step, TokenChoice(), torch.Generator()), start) == wanted
    ahead = GraphNextToken.AHEAD - 1 if table == "on the device" else 0
    assert graph.replays == min(TOKENS - 1 + ahead, room)


@pytest.mark.gpu
def test_graph_equals_eager_decoding() -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cuda", dtype="float32", tasks=("ask",))
    from lowmem_bagel.sampling.text_graph import graph_kernels

    bagel, start = pipe.model.bagel, pipe.model.tokenizer.im_start
    kernels = graph_kernels(bagel.device, early=True)
    assert isinstance(kernels, StepKernels), kernels
    with torch.inference_mode():
        eager = EagerNextToken(bagel, contexts(pipe).full, pipe.model.attention, TokenChoice(), torch.Generator())
        graph = GraphNextToken(Step(bagel, contexts(pipe).full, kernels), TokenChoice(), torch.Generator())
        assert decoded(graph, start) == decoded(eager, start)

"""What a model's decoder linears really multiply: inputs recorded while a pipeline draws and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lowmem_bagel.checkpoint.tensors import FUSED
from lowmem_bagel.model.decoder import Layer
from lowmem_bagel.model.names import linear_module
from lowmem_bagel.ops.linear import Linear, Product, Weights
from lowmem_bagel.pipeline import BagelPipeline

TOKENS_PER_CALL = 8
TOKENS_KEPT = 256


class Recorder(Product):
    """Multiplies as the product it stands for and keeps some of the rows multiplied, evenly spread over every call."""

    def __init__(self, linear: Linear) -> None:
        self.linear, self.inner = linear, linear.product
        self.in_features = linear.in_features
        self.rows: list[Tensor] = []

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        tokens = x.reshape(-1, self.in_features)
        self.rows.append(_evenly(tokens, TOKENS_PER_CALL).float().cpu())
        return self.inner.product(x, weights)

    def recorded(self) -> Tensor:
        """float32 [tokens, in_features], none where the linear was never called."""
        rows = torch.cat(self.rows) if self.rows else torch.empty(0, self.in_features)
        return _evenly(rows, TOKENS_KEPT).clone()


def record(pipeline: BagelPipeline, prompts: Sequence[str], question: str, **settings: Any) -> dict[str, Tensor]:
    """Draw each prompt with the settings of `BagelPipeline.generate`, and ask the question about each picture.

    Returns float32 activations [tokens, in_features] under the stored name of each fused linear's first weight, as
    `convert --to int8 --rotate --activations FILE` reads them. The pipeline is left as it was.
    """
    recorders: dict[str, Recorder] = {}
    for layer, experts in enumerate(cast("Sequence[Layer]", pipeline.model.bagel.decoder.layers)):
        for expert, module in experts.items():
            for fused, shorts in FUSED.items():
                name = f"{linear_module(layer, expert, shorts[0])}.weight"
                recorders[name] = Recorder(getattr(module, fused))
    try:
        for recorder in recorders.values():
            recorder.linear.product = recorder
        for seed, prompt in enumerate(prompts):
            drawn = pipeline.generate(prompt, seed=seed, **settings)
            pipeline.ask(question, drawn.image, max_new_tokens=16)
    finally:
        for recorder in recorders.values():
            recorder.linear.product = recorder.inner
    recorded = {name: recorder.recorded() for name, recorder in recorders.items()}
    return {name: rows for name, rows in recorded.items() if len(rows)}


def _evenly(rows: Tensor, count: int) -> Tensor:
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long().to(rows.device)]

"""The cases recorded from the original implementation, and how they are run again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lowmem_bagel import BagelPipeline, Result
from lowmem_bagel.errors import Cancelled
from lowmem_bagel.generation import executor
from lowmem_bagel.sampling.denoise import Step
from support.numeric import relative_l2
from support.paths import GOLDEN

CASES = json.loads((GOLDEN / "cases" / "cases.json").read_text())
FP32_TOLERANCE = 1e-5


def request_of(name: str) -> tuple[list, dict]:
    """Terms and settings of a reference case, upstream's option names translated."""
    case = CASES["cases"][name]
    terms = [t["text"] if "text" in t else GOLDEN / "cases" / t["image"] for t in case["inputs"]]
    options = dict(case["options"])
    settings = {"seed": case["seed"], "think": options.pop("think", False)}
    limit = options.pop("max_think_token_n", None)
    if options.pop("understanding_output", False):
        return terms, settings | {"output": "text", "max_new_tokens": limit}
    if "image_shapes" in options:
        settings["height"], settings["width"] = options.pop("image_shapes")
    if options.pop("enable_taylorseer", False):
        settings["step_cache"] = "taylorseer"
    return terms, settings | options | {"output": "image", "max_think_tokens": limit}


@dataclass(frozen=True)
class Begun:
    """A case as far as it was run, beside the record; `logits` are [tokens, vocab_size], None where there is no
    text."""

    name: str
    steps: list[Step]
    logits: Tensor | None

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        return recorded(self.name)


@dataclass(frozen=True)
class CaseRun(Begun):
    """A case that was run to its end."""

    result: Result

    @cached_property
    def levels(self) -> np.ndarray:
        """Absolute differences of the picture's levels, in 255."""
        wanted = np.asarray(Image.open(GOLDEN / "cases" / f"{self.name}_out.png").convert("RGB"), dtype=int)
        return np.abs(np.asarray(self.result.image, dtype=int) - wanted)

    def check_picture_in_float32(self) -> None:
        for row, index in enumerate(self.reference["steps_kept"].tolist()):
            assert relative_l2(self.steps[index].x_t, self.reference["x_t"][row]) < FP32_TOLERANCE
            assert relative_l2(self.steps[index].velocity, self.reference["velocities"][row]) < FP32_TOLERANCE
        assert relative_l2(self.result.latent, self.reference["latent"]) < FP32_TOLERANCE
        assert (self.levels <= 1).mean() >= 0.999

    def check_text(self) -> None:
        """In float32 the least likely of the recorded choices leads by 1e-3, a hundred times what rounding changes."""
        assert [self.result.text] == (CASES["cases"][self.name]["text"] or [""])
        assert self.result.token_ids == recorded_ids(self.name)


def recorded(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases" / f"{name}.safetensors")


def recorded_ids(name: str) -> list[int]:
    return recorded(name).get("token_ids", torch.empty(0)).tolist()


def run_case(pipe: BagelPipeline, name: str, *, led: bool = False) -> CaseRun:
    """Of two tokens that are nearly as likely a rounding takes one, and everything after it is different. Arithmetic
    that rounds more than the original's is therefore `led` along the recorded tokens, and its logits are compared."""
    terms, settings = request_of(name)
    steps: list[Step] = []

    def keep_steps(event: Any) -> None:
        steps.extend([event] if isinstance(event, Step) else [])

    with choosing(name, led) as choice:
        result = pipe.run(terms, callback=keep_steps, **settings)
    return CaseRun(name, steps, choice.all_logits(), result)


def first_step(pipe: BagelPipeline, name: str, *, led: bool = False) -> Begun:
    """A case that draws, up to its first step; the rest of it is not run."""
    terms, settings = request_of(name)
    steps: list[Step] = []

    def stop_at_step(event: Any) -> bool:
        steps.extend([event] if isinstance(event, Step) else [])
        return not steps

    with choosing(name, led) as choice, pytest.raises(Cancelled):
        pipe.run(terms, callback=stop_at_step, **settings)
    return Begun(name, steps, choice.all_logits())


@contextmanager
def choosing(name: str, led: bool) -> Iterator[KeptChoice]:
    """What chooses the tokens of a request in here."""
    choice = KeptChoice(recorded_ids(name) if led else ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "TokenChoice", lambda *_: choice)
        yield choice


class KeptChoice:
    """Chooses greedily, or gives `ids`, which begin with the token before the first choice; keeps the logits."""

    do_sample = True  # asked for every token: a captured graph does not choose by itself

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.logits = ids, list[Tensor]()

    def __call__(self, logits: Tensor, generator: torch.Generator) -> int:
        self.logits.append(logits.float().cpu().clone())
        return self.ids[len(self.logits)] if self.ids else int(logits.argmax())

    def all_logits(self) -> Tensor | None:
        return torch.stack(self.logits) if self.logits else None

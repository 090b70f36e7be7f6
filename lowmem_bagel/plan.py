"""What was decided before anything is loaded, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .tensors import EXPERTS, Expert

Task = Literal["generate", "edit", "ask"]
TASKS: tuple[Task, ...] = ("generate", "edit", "ask")


@dataclass(frozen=True)
class Plan:
    """How a folder is loaded and run. dtypes are torch's names; `reasons` says why each choice was made."""

    device: str
    dtype: str
    residual_dtype: str
    vae_dtype: str
    attention: str
    backend: str
    tasks: tuple[Task, ...] = TASKS
    guidance_batch: bool = False
    reasons: tuple[str, ...] = ()

    @property
    def experts(self) -> tuple[Expert, ...]:
        """Answers need only und; pictures need both."""
        return EXPERTS if {"generate", "edit"} & set(self.tasks) else ("und",)

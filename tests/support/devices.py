"""Several devices of the test bed: pipelines whose work is shared by stand-ins on one processor, and what they draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lowmem_bagel import BagelPipeline, Result
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.planner.plan import Launcher
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.settings import LoadOptions

SMALL: dict[str, Any] = {"height": 32, "width": 48, "seed": 3, "num_timesteps": 6}
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=np.uint8))
OTHER = PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
Requests = Mapping[str, Callable[[BagelPipeline], Result]]


def requests(timesteps: int) -> Requests:
    """Of every kind."""
    small = SMALL | {"num_timesteps": timesteps}
    return {
        "generate": lambda pipe: pipe.generate("a red circle", **small),
        "edit": lambda pipe: pipe.edit(PICTURE, "make it blue", **small),
        "think": lambda pipe: pipe.generate("a red circle", think=True, max_think_tokens=6, cfg_img_scale=1.5, **small),
        "thoughtful edit": lambda pipe: pipe.edit(PICTURE, "make it blue", think=True, max_think_tokens=6, **small),
        "several pictures": lambda pipe: pipe.run(["a", PICTURE, "and", OTHER, "side by side"], **small),
        "picture last": lambda pipe: pipe.run(["a circle", PICTURE, "a square", OTHER], **small),
        "without guidance": lambda pipe: pipe.generate("a red circle", cfg_text_scale=1.0, **small),
        "frames": lambda pipe: pipe.generate("a red circle", frames=3, frame_delta=2, **small),
        "frames in turn": lambda pipe: pipe.edit(PICTURE, "make it blue", frames=2, frame_mode="turn", **small),
        "answer": lambda pipe: pipe.ask("what is it?", PICTURE, max_new_tokens=6, seed=0),
    }


REQUESTS = requests(SMALL["num_timesteps"])
BRIEF = requests(3)
"""For what does not change from step to step."""
ON_SEVERAL = [*((3, name) for name in BRIEF), *((2, name) for name in ("generate", "edit", "frames in turn", "answer"))]
"""Devices, and what is asked of them: everything of three, and of two each kind of result and three branches."""


def shared(
    folder: Path, devices: str, dtype: str = "float32", changed: Mapping[str, Any] | None = None,
    launcher: Launcher | None = None, **options: Any,
) -> BagelPipeline:  # fmt: skip
    """On one device branch by branch, or on several; `changed` are fields of the first device's plan, and `launcher` is
    who launches on the others, in place of whom the plan says."""
    opened, divide = ModelFolder.open(folder), "guidance" if "," in devices else "auto"
    plan = plan_for(opened, LoadOptions(devices=devices, dtype=dtype, **{"divide": divide, **options}))
    assert len(plan.others) == devices.count(","), plan.reasons
    if launcher is not None:
        plan = replace(plan, others=tuple(replace(other, launcher=launcher) for other in plan.others))
    return BagelPipeline(load_model(opened, replace(plan, guidance_batch=False, **(changed or {}))))


def same(found: Result, wanted: Result) -> bool:
    """To the bit."""
    assert (found.latent is None) == (wanted.latent is None)
    drawn = found.latent is None or (bool(found.latent.isfinite().all()) and bool(found.latent.equal(wanted.latent)))
    return drawn and found.token_ids == wanted.token_ids and found.settings == wanted.settings

"""What a pipeline on a card gives for a picture, an edit and an answer, to be compared with another's."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lowmem_bagel.converters.engine.registry import convert_folder
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.planner.plan import Plan, Residency, Unit
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.settings import LoadOptions

from .paths import CHECKPOINT

UNITS: tuple[Unit, ...] = tuple((layer, expert) for layer in range(3) for expert in ("und", "gen"))
RESIDENT = Residency()
STREAMED = Residency(UNITS, 3, "pinned", ("vit", "vae", "lm_head", "embedding"), pageable=UNITS[1:2], disk=UNITS[::3])
"""From everywhere at once: two copy streams, a worker thread and parts that visit the card."""
ARITHMETIC = {
    "source": "bfloat16", "fp16": "float16", "int8": "bfloat16", "nf4": "bfloat16", "dfloat11": "bfloat16",
    "gguf-q8_0": "bfloat16",
}  # fmt: skip
"""Every format, and what it is computed in here."""
DRAWING = {"height": 64, "width": 96, "seed": 3, "num_timesteps": 5}
PICTURE = CHECKPOINT.parent / "cases" / "edit_0.png"


@dataclass(frozen=True)
class Told:
    """What one pipeline gave."""

    drawn: Tensor
    edited: Tensor
    answer: list[int]

    def __eq__(self, other: object) -> bool:
        """To the bit."""
        return (
            isinstance(other, Told)
            and torch.equal(self.drawn, other.drawn)
            and torch.equal(self.edited, other.edited)
            and self.answer == other.answer
        )


def every_format(out: Path) -> dict[str, Path]:
    """A folder of each, with limits that keep input pictures small."""
    folders = {"source": Path(shutil.copytree(CHECKPOINT, out / "source"))}
    vae = {"max_side": 128, "min_side": 32, "stride": 16}
    vit = {"max_side": 112, "min_side": 28, "stride": 14}
    (folders["source"] / "resize_config.json").write_text(json.dumps({"vae": vae, "vit": vit}))
    for name in ARITHMETIC:
        if name != "source":
            folders[name] = out / name
            convert_folder(folders["source"], folders[name], name)
    return folders


def pipeline_on(device: str, folder: Path, dtype: str, residency: Residency, **options: object) -> BagelPipeline:
    opened = ModelFolder.open(folder)
    plan: Plan = plan_for(opened, LoadOptions(device=device, dtype=dtype, **options))
    return BagelPipeline(load_model(opened, replace(plan, guidance_batch=True, residency=residency)))


def told(pipe: BagelPipeline) -> Told:
    drawn = pipe.generate("a red circle", **DRAWING).latent
    edited = pipe.edit(PICTURE, "make it blue", seed=4, num_timesteps=4).latent
    answer = pipe.ask("what is this?", PICTURE, max_new_tokens=24).token_ids
    assert drawn is not None and drawn.isfinite().all()
    assert edited is not None and edited.isfinite().all()
    assert len(answer) > 1, "an answer that is empty"
    return Told(drawn, edited, answer)

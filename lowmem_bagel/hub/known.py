"""Known models of BAGEL's architecture, by short name: where they are, what they are for, under which license.

Facts as their authors publish them; "not stated" where they state none that could be found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import DownloadError

APACHE, UNKNOWN = "Apache-2.0", "not stated"


@dataclass(frozen=True)
class Known:
    """A published model. `weights` is the file or form of its weights, `needs_base` whether the base completes it."""

    repo: str
    weights: str
    use: str
    license: str = UNKNOWN
    folder: str = ""
    needs_base: bool = False
    modelscope: str = ""
    """Its repository there, where one is known."""

    def place(self, source: str) -> str:
        """OWNER/NAME[/FOLDER] at a hub.

        Raises:
            DownloadError: it is not known to be there.
        """
        repo = self.modelscope if source == "modelscope" else self.repo
        if not repo:
            raise DownloadError(f"{self.repo} is not known to be at {source}; leave --source out, or give a repository")
        return f"{repo}/{self.folder}" if self.folder else repo


KNOWN: Mapping[str, Known] = {
    "bagel": Known(
        "ByteDance-Seed/BAGEL-7B-MoT", "ema.safetensors", "the base: draws, edits, answers", APACHE,
        modelscope="ByteDance-Seed/BAGEL-7B-MoT",
    ),
    "bagel-df11": Known("DFloat11/BAGEL-7B-MoT-DF11", "model.safetensors", "the base, losslessly compressed"),
    "bagel-moe": Known(
        "LLM-Drop/BAGEL-MoE-7B-GEN-16to8", "shards", "draws with 8 of 16 small experts; 58 GB in float32", APACHE,
    ),
    "bagel-moe-32": Known(
        "LLM-Drop/BAGEL-MoE-7B-GEN-32to16", "shards", "draws with 16 of 32 smaller experts; 58 GB in float32", APACHE,
    ),
    "consistcompose": Known(
        "sensenova/ConsistCompose-BAGEL-7B-MoT", "model.safetensors", "pictures composed by a layout of boxes", APACHE,
        needs_base=True, modelscope="SenseNova/ConsistCompose-BAGEL-7B-MoT",
    ),
    "echo-4o": Known("Yejy53/Echo-4o", "ema.safetensors", "instructions and several input pictures"),
    "mathcanvas": Known("shiwk24/BAGEL-Canvas", "ema.safetensors", "mathematics with diagrams drawn on the way"),
    "nhr-edit": Known("iitolstykh/Bagel-NHR-Edit", "shards", "editing", needs_base=True),
    "reca": Known(
        "sanaka87/BAGEL-RecA", "model_bf16.safetensors", "draws and edits closer to what was asked", needs_base=True,
    ),
    "scone": Known("Ryann829/Scone", "model.safetensors", "subjects of several pictures put together", needs_base=True),
    "sensenova-si": Known(
        "sensenova/SenseNova-SI-1.1-BAGEL-7B-MoT", "model.safetensors", "answers about space", APACHE, needs_base=True,
        modelscope="SenseNova/SenseNova-SI-1.1-BAGEL-7B-MoT",
    ),
    "sensenova-vision": Known(
        "sensenova/SenseNova-Vision-7B-MoT", "ema.safetensors",
        "depth, normals, segmentation, text, poses and 3D maps, as pictures and answers", APACHE,
    ),
    "srum": Known("Wayne-King/SRUM_BAGEL_7B_MoT", "ema.safetensors", "compositions drawn more faithfully"),
    "thinkmorph": Known("ThinkMorph/ThinkMorph-7B", "shards", "reasoning by texts and drawn pictures in turn"),
    "twiff": Known("Liu-Junhua/TwiFF-7B", "model.safetensors", "what comes next, frame by frame", needs_base=True),
    "unicot": Known("Fr0zencr4nE/UniCoT-7B-MoT", "ema.safetensors", "pictures planned, drawn and corrected in turn"),
    "unimedvl": Known("General-Medical-AI/UniMedVL", "ema_bf16.safetensors", "medical pictures"),
    "unireason": Known(
        "Alex11556666/UniReason", "ema.safetensors", "drawing and editing with reasoning; its second stage",
        folder="stage_2", needs_base=True,
    ),
    "weave": Known("WeiChow/Bagel-weave", "ema.safetensors", "editing over several turns"),
    "zebra-cot": Known(
        "multimodal-reasoning-lab/Bagel-Zebra-CoT", "model_bf16.safetensors",
        "reasoning by texts and drawn pictures in turn", needs_base=True,
    ),
}  # fmt: skip

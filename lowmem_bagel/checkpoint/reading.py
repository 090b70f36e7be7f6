"""How a folder was read: what was chosen, completed, computed, ignored and rounded, in lines that are shown later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .tensors import TensorSpec


@dataclass(frozen=True)
class Reading:
    """Lines by topic: "weights", "names", "completed", "limits" and so on, in the order in which they are shown."""

    lines: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, str]:
        return dict(self.lines)

    def joined(self, **more: str) -> Reading:
        """With more lines; an empty one is left out."""
        return Reading({**self.lines, **{topic: line for topic, line in more.items() if line}})


WORDS: Mapping[str, str] = {
    "decoder und": "the understanding expert",
    "decoder gen": "the generating expert",
    "embedding": "the embedding",
    "lm_head": "lm_head",
    "vit": "the vision tower and its connector (vit_model, connector)",
    "latent": "the latent projections and time embedder (vae2llm, llm2vae, time_embedder)",
    "vae": "the VAE in ae.safetensors",
}
"""Parts of the model as people are told of them; see `part_of`."""


def part_of(spec: TensorSpec) -> str:
    """The part that a tensor is missing with: what a task needs as a whole."""
    if spec.part == "decoder":
        return f"decoder {spec.expert}"
    return "vit" if spec.part == "connector" else spec.part


def counted(specs: Iterable[TensorSpec]) -> str:
    """How many tensors of which parts: "the VAE in ae.safetensors: 64 tensors"."""
    parts = Counter(part_of(spec) for spec in specs)
    return ", ".join(f"{WORDS[part]}: {count} tensor{'s' * (count > 1)}" for part, count in parts.items())

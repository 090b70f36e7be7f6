"""Classifier-free guidance with two conditions, and its renormalisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..settings import RenormType

EPSILON = 1e-8


@dataclass(frozen=True)
class Guidance:
    """Scales and limits of guidance; on where interval[0] < t <= interval[1]."""

    text_scale: float
    image_scale: float
    interval: tuple[float, float]
    renorm_type: RenormType
    renorm_min: float

    def active(self, t: float) -> bool:
        """Whether a step at time t (after the shift) is guided."""
        return self.text_scale > 1 and self.interval[0] < t <= self.interval[1]

    @property
    def uses_image_branch(self) -> bool:
        return self.text_scale > 1 and self.image_scale > 1

    def combine(self, full: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        """The guided velocity.

        full, text, image: velocities [T, values] of the full context, of the one without the last text, and of the
        texts alone (None where image guidance is off).
        """
        guided = text + self.text_scale * (full - text)
        if self.renorm_type == "text_channel":
            guided = guided * self._scale(full, guided, per_token=True)
        if image is not None:
            guided = image + self.image_scale * (guided - image)
        if self.renorm_type != "text_channel":
            guided = guided * self._scale(full, guided, per_token=self.renorm_type == "channel")
        return guided

    def _scale(self, reference: Tensor, guided: Tensor, per_token: bool) -> Tensor:
        if per_token:
            wanted, found = (v.norm(dim=-1, keepdim=True) for v in (reference, guided))
        else:
            wanted, found = reference.norm(), guided.norm()
        scale: Tensor = wanted / (found + EPSILON)
        return scale.clamp(min=self.renorm_min, max=1.0)

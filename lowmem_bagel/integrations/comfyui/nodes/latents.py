"""Nodes between LATENT and IMAGE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .common import CATEGORY, model_input, output

if TYPE_CHECKING:
    from torch import Tensor

    from ..memory import ManagedModel


class DecodeLatent:
    """Decodes latents of FLUX's autoencoder with the model's own: of BAGEL's latents, the same picture to the bit."""

    @classmethod
    def define_schema(cls) -> Any:
        from comfy_api.latest import io

        return io.Schema(
            node_id="LowmemBagelDecodeLatent",
            display_name="BAGEL Decode Latent",
            category=CATEGORY,
            description=cls.__doc__ or "",
            inputs=[model_input(), io.Latent.Input("latent")],
            outputs=[output(io.Image, "image")],
        )

    @classmethod
    def execute(cls, model: ManagedModel, latent: dict[str, Any]) -> tuple[Tensor]:
        from ..pictures import from_latent, to_image

        return (to_image(model.in_use().decode(from_latent(latent, model.config))),)

"""ComfyUI's IMAGE and LATENT, from and to ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import ImageError, SettingError
from ...model.vision import unpatchify

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL import Image

    from ...checkpoint.config import BagelConfig
    from ...generation.results import Result

EXACT = "lowmem_bagel"
"""Key of a LATENT's scaled form, beside `samples`: going back from those would round."""


def to_image(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> float32 [B, H, W, 3] from 0 to 1; times 255 they are the pictures' bytes."""
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(picture, dtype=np.uint8)) for picture in pictures]).float() / 255


def from_image(image: Tensor) -> list[ndarray]:
    """Float [B, H, W, C] -> uint8 [H, W, C] each. What nodes before let out of 0 to 1 is clipped, as everywhere in
    ComfyUI.

    Raises:
        ImageError: it is no IMAGE, or holds what is no number.
    """
    if image.dim() != 4 or image.shape[3] not in (1, 3, 4) or not image.numel():
        raise ImageError(f"an IMAGE is [B, H, W, 3], not {list(image.shape)}; check the node before")
    values = image.detach().to("cpu", torch.float32)
    if not values.isfinite().all():
        raise ImageError("the IMAGE holds values that are no numbers; check the node before")
    return [one.numpy() for one in (values.clamp(0, 1) * 255).round().to(torch.uint8)]


def to_latent(result: Result, config: BagelConfig) -> dict[str, Tensor]:
    """A drawn result's LATENT: `samples` float32 [frames, 16, H / 8, W / 8] as FLUX's autoencoder has them, unscaled,
    which is what the stock VAE nodes take and give."""
    assert result.latent is not None
    side = config.token_pixels
    rows, columns = (result.settings[name] // side for name in ("height", "width"))
    maps = [unpatchify(one, rows, columns, config.latent_patch) for one in result.latent.split(rows * columns)]
    scaled = torch.stack(maps)
    return {"samples": _unscaled(scaled, config), EXACT: scaled}


def from_latent(latent: Mapping[str, Any], config: BagelConfig) -> Tensor:
    """A LATENT scaled as our sampler has it; to the bit where it is one of ours that no node has changed."""
    samples = latent["samples"]
    if not isinstance(samples, Tensor) or samples.is_nested:
        raise SettingError("the LATENT is not a picture's; give one of FLUX's autoencoder")
    samples = samples.float()
    exact = latent.get(EXACT)
    if exact is not None and exact.shape == samples.shape and torch.equal(_unscaled(exact, config), samples.cpu()):
        scaled: Tensor = exact
        return scaled
    return config.vae.scale_factor * (samples - config.vae.shift_factor)


def _unscaled(scaled: Tensor, config: BagelConfig) -> Tensor:
    return scaled / config.vae.scale_factor + config.vae.shift_factor


def joined(drawn: Sequence[tuple[Tensor, dict[str, Tensor], str]]) -> tuple[Tensor, dict[str, Tensor], str]:
    """What was drawn one by one as one batch; texts one below the other."""
    images, latents, texts = zip(*drawn, strict=True)
    together = {name: torch.cat([latent[name] for latent in latents]) for name in latents[0]}
    return torch.cat(images), together, "\n".join(text for text in texts if text)

"""A latent as a small picture without its decoder: colors that are linear in the latent's channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .vae import Vae

PICTURES = 8
SIDE = 64
OCTAVES = (1, 2, 4, 8)
"""Squares a side of the random colors that are added up: from the whole picture's to an edge a position."""
CONTRAST = 3.0
"""Above 1 many values are clipped: black, white and full colors must be among the pictures."""


class LatentColors:
    """The colors that an autoencoder's latents stand for, nearly: one pixel a position, so an eighth of the picture.

    Fitted by least squares to what the autoencoder itself makes of a few random pictures, so it is right for whichever
    checkpoint is loaded. Encoding pictures whose colors are known fits better than decoding random latents, which are
    latents of no picture (tests/model/test_preview.py has the figures), and takes half the time.

    Attributes:
        weight: float32 [3, z_channels], on the CPU, so that a preview takes no memory of the device.
        bias: float32 [3, 1, 1].
    """

    def __init__(self, vae: Vae) -> None:
        with torch.inference_mode():
            fitted = _fitted(vae)
        self.weight = fitted[:-1].T.contiguous()
        self.bias = fitted[-1][:, None, None]

    def __call__(self, latent: Tensor) -> Tensor:
        """Scaled latent, float32 [z_channels, h, w] -> pixels float32 [3, h, w], nominally in [-1, 1]; on the CPU."""
        return torch.einsum("cz,zhw->chw", self.weight, latent) + self.bias


def _fitted(vae: Vae) -> Tensor:
    """float32 [z_channels + 1, 3] on the CPU: the row for each channel, then the constant."""
    weight, factor, channels = vae.encoder.conv_in.weight, vae.config.downsample, vae.config.z_channels
    latents, colors = [], []
    for picture in _pictures():  # one by one, so that it takes next to no memory
        pixels = picture[None].to(weight.device, weight.dtype)
        noise = pixels.new_zeros(1, channels, SIDE // factor, SIDE // factor)
        latents.append(vae.encode(pixels, noise)[0].cpu())
        colors.append(F.avg_pool2d(picture, factor))
    known = torch.stack(latents, dim=1).flatten(1).T.double().nan_to_num()
    known = torch.cat((known, torch.ones(known.shape[0], 1, dtype=known.dtype)), dim=1)
    wanted = torch.stack(colors, dim=1).flatten(1).T.double()
    fitted: Tensor = torch.linalg.lstsq(known, wanted, driver="gelsd").solution
    return fitted.float()


def _pictures() -> Tensor:
    """Always the same pictures, float32 [PICTURES, 3, SIDE, SIDE] in [-1, 1]: blurred squares of several sizes."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.zeros(PICTURES, 3, SIDE, SIDE)
    for count in OCTAVES:
        squares = torch.rand(PICTURES, 3, count, count, generator=generator) * 2 - 1
        pictures += F.interpolate(squares, size=SIDE, mode="bicubic") / (1 if count == 1 else 2)
    return (pictures * CONTRAST).clamp(-1, 1)

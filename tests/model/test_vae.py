"""The autoencoder in strips: the same picture as in one piece, and no larger maps than needed."""

from __future__ import annotations

import pytest
import torch

from lowmem_bagel.checkpoint.config import VaeConfig
from lowmem_bagel.model import vae as module
from lowmem_bagel.model.vae import Vae
from lowmem_bagel.ops.errors import relative_l2

CONFIG = VaeConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)


@pytest.fixture
def vae() -> Vae:
    torch.manual_seed(0)
    vae = Vae(CONFIG).double()
    for parameter in vae.parameters():
        parameter.requires_grad_(False)
    return vae


@pytest.mark.parametrize("values", [1 << 14, 3001, 40_000])
def test_strips_change_nothing(vae: Vae, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, noise = torch.randn(1, 3, 56, 72).double(), torch.randn(1, 16, 7, 9).double()
    whole = vae.encode(pixels, noise)
    picture = vae.decode(whole)
    monkeypatch.setattr(module, "STRIP_VALUES", values)
    assert len(module._strips((32, 56, 72))) > 1
    with torch.inference_mode():
        # The affine of the norm is kept in float32, hence not 1e-12.
        assert relative_l2(vae.encode(pixels, noise), whole) < 1e-6
        assert relative_l2(vae.decode(whole), picture) < 1e-6


def test_gradients_flow_when_training(vae: Vae) -> None:
    vae.requires_grad_(True)
    vae.decode(torch.randn(1, 16, 4, 4).double()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.decoder.parameters())


@pytest.mark.gpu
def test_float32_on_a_card_is_float32(vae: Vae) -> None:
    """TF32, which PyTorch lets cuDNN use for float32, would be off by 1e-3. Another thread may have it on."""
    pixels, noise = torch.randn(1, 3, 128, 128).double(), torch.randn(1, 16, 16, 16).double()
    latent = vae.encode(pixels, noise)
    picture = vae.decode(latent)
    vae.to("cuda", torch.float32)
    with torch.inference_mode():
        found = vae.encode(pixels.float().cuda(), noise.float().cuda()).cpu().double()
        drawn = vae.decode(latent.float().cuda()).cpu().double()
    assert relative_l2(found, latent) < 1e-5
    assert relative_l2(drawn, picture) < 1e-5

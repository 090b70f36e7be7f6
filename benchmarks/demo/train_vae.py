"""Training of the demo checkpoint's autoencoder on random scenes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_bagel.config import VaeConfig
from lowmem_bagel.model.vae import Vae

from .draw import Canvas, render_rows, to_signed
from .optimizer import AdamW, cosine

LEARN_RATE = 1.5e-3
KL_WEIGHT = 1e-3
EMA_SHARE = 2e-3
WORST_SHARE = 1 / 256
"""Share of each picture's pixels whose squared error counts once more: without it, a small spot that is always
wrong costs next to nothing."""


def vae_loss(vae: Vae, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and the mean squared error by itself. pictures in [-1, 1] [B, 3, H, W], noise [B, z, H/8, W/8]."""
    mean, logvar = vae.encoder(pictures).float().chunk(2, dim=1)
    logvar = logvar.clamp(-20, 10)
    out = vae.decoder(mean + torch.exp(0.5 * logvar) * noise).float()
    squared = (out - pictures).square()
    mse = squared.mean()
    per_pixel = squared.mean(1).flatten(1)
    worst = per_pixel.topk(int(per_pixel.shape[1] * WORST_SHARE), dim=1).values.mean()
    edges = F.l1_loss(out.diff(dim=2), pictures.diff(dim=2)) + F.l1_loss(out.diff(dim=3), pictures.diff(dim=3))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = F.l1_loss(out, pictures) + 4 * mse + 0.25 * edges + 0.3 * worst + KL_WEIGHT * kl
    return loss, mse


def train_vae(
    config: VaeConfig,
    rows: list[tuple[Canvas, Tensor]],
    steps: int,
    batch: int,
    device: torch.device,
    seconds: float,
    say: Callable[[str], None] = print,
) -> Vae:
    """Train on scenes (`draw.scene_rows` per canvas, all on `device`), at most `seconds` long.

    The learning rate follows the share of steps or of the time that is used up, whichever is larger. Returns the
    exponential average of the weights.
    """
    vae = Vae(config).to(device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = [p.detach().clone() for p in vae.parameters()]
    lr = torch.zeros((), device=device)
    optimizer = AdamW(list(vae.parameters()), lr, betas=(0.9, 0.95))
    loss_of = torch.compile(vae_loss, dynamic=False) if device.type == "cuda" else vae_loss
    started = time.monotonic()
    clock = started
    for step in range(steps):
        # Compilation happens in the first steps; it must not count as time spent on learning.
        if step == 10:
            clock = time.monotonic()
            say(f"vae compiled after {clock - started:.0f} s")
        used = max(step / steps, (time.monotonic() - clock) / seconds if step > 10 else 0.0)
        if used >= 1:
            break
        lr.fill_(LEARN_RATE * min(cosine(int(used * steps), steps, 1), (step + 1) / 100))
        canvas, scenes = rows[(0, 0, 0, 1, 0, 0, 0, 2)[step % 8]]
        chosen = scenes[torch.randint(len(scenes), (batch,), device=device)]
        pictures = to_signed(render_rows(chosen, canvas)).contiguous(memory_format=torch.channels_last)
        side = config.downsample
        noise = torch.randn(batch, config.z_channels, canvas.height // side, canvas.width // side, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, mse = loss_of(vae, pictures, noise)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        vae.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(vae.parameters()), max(EMA_SHARE, 1 / (step / 10 + 1)))
        if step % 250 == 0 or step == steps - 1:
            psnr = 10 * torch.log10(4 / mse.detach()).item()
            say(f"vae step {step} loss {loss.item():.4f} psnr {psnr:.2f} dB {time.monotonic() - started:.0f} s")
    with torch.no_grad():
        for parameter, average in zip(vae.parameters(), averaged, strict=True):
            parameter.copy_(average)
    vae.requires_grad_(False)
    return vae


@torch.no_grad()
def encode_all(vae: Vae, rows: Tensor, canvas: Canvas, batch: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the unscaled latents of all scenes, as latent tokens: two bf16
    [N, tokens, 4 * z]."""
    means, stds = [], []
    for part in rows.split(batch):
        moments = vae.encoder(to_signed(render_rows(part, canvas)).contiguous(memory_format=torch.channels_last))
        mean, logvar = moments.float().chunk(2, dim=1)
        means.append(latent_tokens(mean).bfloat16())
        stds.append(latent_tokens(torch.exp(0.5 * logvar)).bfloat16())
    return torch.cat(means), torch.cat(stds)


def latent_tokens(latent: Tensor) -> Tensor:
    """[B, z, h, w] -> [B, h/2 * w/2, 4 z], values ordered (row, column, channel) in the 2x2 patch."""
    b, z, h, w = latent.shape
    return latent.reshape(b, z, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // 4, 4 * z)


def latent_images(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `latent_tokens`: [B, rows * columns, 4 z] -> [B, z, 2 rows, 2 columns]."""
    b = tokens.shape[0]
    return tokens.reshape(b, rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, 2 * rows, 2 * columns)

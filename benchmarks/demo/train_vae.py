"""Training of the demo checkpoint's autoencoder on random scenes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_bagel.checkpoint.config import VaeConfig
from lowmem_bagel.model.vae import Vae

from .draw import VALUES, Canvas, palette_on, render_rows, to_signed
from .optimizer import AdamW, Matrix, Muon, average_into, cosine

MUON_LEARN_RATE = 2.5e-3
ADAM_LEARN_RATE = 1.5e-3
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


CROP = Canvas(64, 64)
CROP_PHASE = 0.6
"""Share of the time that is spent mostly on crops: a quarter of the pixels, and no place in them is the same twice."""


class VaeTrainer:
    """Training steps on random scenes; on CUDA one graph per picture size is captured and replayed.

    rows: `draw.scene_rows` per canvas, on the device; the first canvas is the one that crops are taken from.
    batch: crops in a step; of whole pictures it takes half as many.
    """

    def __init__(self, config: VaeConfig, rows: list[tuple[Canvas, Tensor]], batch: int, device: torch.device) -> None:
        self.vae = Vae(config).to(device)
        self.rows, self.batch, self.device = rows, batch, device
        self.parameters = list(self.vae.parameters())
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.muon_lr, self.adam_lr, self.share, self.mse = (torch.zeros((), device=device) for _ in range(4))
        ends = ("conv_in", "conv_out")
        inner = [p for n, p in self.vae.named_parameters() if p.ndim == 4 and n.split(".")[1] not in ends]
        rest = [p for p in self.parameters if not any(p is q for q in inner)]
        self.muon = Muon([Matrix(p, (p.shape[0],)) for p in inner], self.muon_lr, decay=0.0)
        self.adam = AdamW(rest, self.adam_lr, betas=(0.9, 0.95))
        self.palette = palette_on(device)
        self.graphs: dict[Canvas, torch.cuda.CUDAGraph] = {}

    def _pictures(self, canvas: Canvas) -> Tensor:
        source, scenes = self.rows[0] if canvas == CROP else next(r for r in self.rows if r[0] == canvas)
        count = self.batch if canvas == CROP else self.batch // 2
        chosen = scenes[torch.randint(len(scenes), (count,), device=self.device)].clone()
        if canvas == CROP:
            for column, side, part in ((2, source.width, CROP.width), (3, source.height, CROP.height)):
                chosen[:, column:-1:VALUES] -= torch.rand(count, 1, device=self.device) * (side - part)
        return to_signed(render_rows(chosen, canvas, self.palette))

    def _step(self, canvas: Canvas) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        pictures = self._pictures(canvas)
        z, side = self.vae.config.z_channels, self.vae.config.downsample
        noise = torch.randn(len(pictures), z, canvas.height // side, canvas.width // side, device=self.device)
        gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=gpu, cache_enabled=False):
            loss, mse = vae_loss(self.vae, pictures, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step()
        self.adam.step()
        with torch.no_grad():
            self.mse.copy_(mse)
        average_into(self.averaged, self.parameters, self.share)

    def _replay(self, canvas: Canvas) -> None:
        if self.device.type != "cuda":
            self._step(canvas)
            return
        if canvas not in self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step(canvas)
            torch.cuda.current_stream().wait_stream(stream)
            self.graphs[canvas] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[canvas]):
                self._step(canvas)
        self.graphs[canvas].replay()

    def train(self, steps: int, seconds: float, say: Callable[[str], None] = print) -> Vae:
        """Up to `steps` steps or `seconds`; the schedule follows whichever is used up faster.

        Returns the model with the exponential average of the weights.
        """
        whole = [canvas for canvas, _ in self.rows]
        mostly_crops = [CROP] * 7 + whole[:1]
        mostly_whole = [whole[0], whole[0], whole[1 % len(whole)], whole[0], whole[0], whole[2 % len(whole)]]
        started, progress = time.monotonic(), 0.0
        for step in range(steps):
            factor = min(cosine(int(progress * 10000), 10000, 1), (step + 1) / 100)
            self.muon_lr.fill_(MUON_LEARN_RATE * factor)
            self.adam_lr.fill_(ADAM_LEARN_RATE * factor)
            self.share.fill_(max(EMA_SHARE, 1 / (step / 10 + 1)))
            pattern = mostly_crops if progress < CROP_PHASE else mostly_whole
            self._replay(pattern[step % len(pattern)])
            if step % 20 == 0:
                mse = self.mse.item()
                assert mse == mse, "the autoencoder's loss is not a number"
                progress = max(step / steps, (time.monotonic() - started) / seconds)
                if step % 500 == 0:
                    psnr = 10 * math.log10(4 / mse)
                    say(f"vae step {step} psnr {psnr:.2f} dB {time.monotonic() - started:.0f} s")
                if progress >= 1:
                    say(f"vae {step + 1} steps")
                    break
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self.parameters), self.averaged)
        return self.vae.requires_grad_(False)


@torch.no_grad()
def encode_all(vae: Vae, rows: Tensor, canvas: Canvas, batch: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the unscaled latents of all scenes, as latent tokens: two bf16
    [N, tokens, 4 * z]."""
    means, stds = [], []
    gpu = rows.device.type == "cuda"
    for part in rows.split(batch):
        with torch.autocast(rows.device.type, torch.float16, enabled=gpu):
            moments = vae.encoder(to_signed(render_rows(part, canvas)))
        mean, logvar = moments.float().chunk(2, dim=1)
        means.append(latent_tokens(mean).bfloat16())
        stds.append(latent_tokens(torch.exp(0.5 * logvar)).bfloat16())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def reconstruction_psnr(vae: Vae, rows: list[tuple[Canvas, Tensor]], count: int) -> list[float]:
    """Peak signal-to-noise ratio in dB of sampled reconstructions, per canvas, over its first `count` scenes."""
    ratios = []
    for canvas, scenes in rows:
        pictures = to_signed(render_rows(scenes[:count], canvas))
        mean, logvar = vae.encoder(pictures).chunk(2, dim=1)
        out = vae.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).clamp(-1, 1)
        ratios.append(10 * math.log10(4 / F.mse_loss(out, pictures).item()))
    return ratios


def latent_tokens(latent: Tensor) -> Tensor:
    """[B, z, h, w] -> [B, h/2 * w/2, 4 z], values ordered (row, column, channel) in the 2x2 patch."""
    b, z, h, w = latent.shape
    return latent.reshape(b, z, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // 4, 4 * z)


def latent_images(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `latent_tokens`: [B, rows * columns, 4 z] -> [B, z, 2 rows, 2 columns]."""
    b = tokens.shape[0]
    return tokens.reshape(b, rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, 2 * rows, 2 * columns)

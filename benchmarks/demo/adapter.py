"""Teaches the demo checkpoint a new shape by an adapter: `python -m lowmem_bagel.benchmarks.demo.adapter OUT`.

The shape is a cross, which no scene has. The adapter changes the gen expert's linears alone, as those of others for
BAGEL do, and is written as PEFT writes one. Scenes of the training show crosses where they had diamonds; some stay as
they are, so that nothing is unlearnt. The shipped one took 1318 steps, 11 minutes on two cores.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.config import BagelConfig
from lowmem_bagel.checkpoint.tensors import FUSED
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.decoder import ExpertLayer
from lowmem_bagel.model.names import linear_module
from lowmem_bagel.model.vae import Vae
from lowmem_bagel.ops.linear import Dense, Linear

from .classifier import judge_drawing
from .data import pad_texts
from .draw import to_signed
from .export import load_checkpoint
from .forward import Block, Embedder, Shape, run_groups, text_lengths
from .mixture import DROP_CAPTION
from .optimizer import cosine
from .scenes import CROSS, SHAPES, Scene, held_out_scene, render, training_scene
from .sentences import TRAINED_RELATED, caption
from .tokens import special_ids
from .train import draw_group, random_times
from .train_vae import latent_tokens

REPLACED = "diamond"
CHANGED_SHARE = 0.75
"""Of the training's scenes show a cross."""
CAPTION_ROOM = 42
"""Tokens; a new word takes several."""
SIDE = 8
"""Latent tokens along a picture's side."""


def with_crosses(scene: Scene) -> Scene:
    """The scene with a cross wherever it has a diamond."""
    items = tuple(replace(item, shape=CROSS) if item.shape == REPLACED else item for item in scene.items)
    return replace(scene, items=items)


def adapter_scenes(rng: Random, count: int) -> list[Scene]:
    """Scenes of the training: a share of them with crosses, the others as they always were."""
    return [_crossed(rng) if rng.random() < CHANGED_SHARE else training_scene(rng) for _ in range(count)]


def _crossed(rng: Random) -> Scene:
    while True:
        scene = training_scene(rng)
        if any(item.shape == REPLACED for item in scene.items):
            return with_crosses(scene)


def drawn_rightly(pipe: BagelPipeline, count: int, seed: int, num_timesteps: int = 25) -> int:
    """How many of `count` captions with a cross, of scenes of up to two shapes, are drawn as they say."""
    rng, right = Random(seed), 0
    for number in range(count):
        while True:
            scene = with_crosses(held_out_scene(rng))
            if len(scene.items) < 3 and any(item.shape == CROSS for item in scene.items):
                break
        said = caption(rng, scene)
        result = pipe.generate(
            said.text, seed=seed + number, num_timesteps=num_timesteps, height=scene.height, width=scene.width
        )
        right += not judge_drawing(np.asarray(result.image), said, (*SHAPES, CROSS))
    return right


@dataclass
class Factors:
    """What is trained of one linear; `mask` keeps B of stacked weights block-diagonal."""

    linear: Linear
    modules: tuple[str, ...]
    rows: tuple[int, ...]
    rank: int
    mask: Tensor

    @property
    def a(self) -> Tensor:
        return self.linear.get_parameter("low_rank_a")

    @property
    def b(self) -> Tensor:
        return self.linear.get_parameter("low_rank_b")

    def stored(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of PEFT's file."""
        for index, (module, b) in enumerate(zip(self.modules, self.b.split(self.rows), strict=True)):
            own = slice(index * self.rank, (index + 1) * self.rank)
            yield f"{prefix}{module}.lora_A.weight", self.a[own]
            yield f"{prefix}{module}.lora_B.weight", b[:, own]


def add_factors(bagel: Bagel, config: BagelConfig, rank: int) -> list[Factors]:
    """Freeze the model and give the gen expert's linears factors to train; B begins at zero."""
    bagel.requires_grad_(False)
    d = config.decoder
    rows = {"qkv": d.qkv_rows, "gate_up": (d.intermediate_size,) * 2}
    made = []
    for layer, experts in enumerate(cast("Sequence[Any]", bagel.decoder.layers)):
        expert: ExpertLayer = experts["gen"]
        for name, shorts in FUSED.items():
            linear: Linear = getattr(expert, name)
            parts = rows.get(name, (linear.out_features,))
            linear.add_low_rank(rank * len(parts), torch.float32, Dense())
            blocks = torch.block_diag(*(torch.ones(size, rank) for size in parts)).to(bagel.device)
            factors = Factors(linear, tuple(linear_module(layer, "gen", s) for s in shorts), parts, rank, blocks)
            torch.nn.init.normal_(factors.a, std=linear.in_features**-0.5).requires_grad_(True)
            torch.nn.init.zeros_(factors.b).requires_grad_(True)
            made.append(factors)
    return made


class AdapterTrainer:
    """Drawing alone: velocity on pictures with crosses, their captions sometimes left out."""

    def __init__(self, folder: Path, examples: int, rank: int, alpha: float, batch: int, rng: Random) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bagel, vae, self.config = load_checkpoint(folder, device)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = special_ids(tokenizer)
        self.pad = special["<|endoftext|>"]
        self.factors = add_factors(self.bagel, self.config, rank)
        self.rank, self.alpha, self.batch = rank, alpha, batch
        self.embed, self.shape = (
            Embedder(self.bagel, special, SIDE, SIDE),
            Shape(Block("text", CAPTION_ROOM), Block("latent", SIDE * SIDE)).to(device),
        )
        scenes = adapter_scenes(rng, examples)
        texts = [[caption(rng, scene, TRAINED_RELATED).text] for scene in scenes]
        self.captions = torch.from_numpy(pad_texts(tokenizer, texts, CAPTION_ROOM)[:, 0]).to(device)
        pictures = torch.from_numpy(np.stack([render(scene) for scene in scenes])).to(device)
        self.mean, self.std = encoded(vae, pictures.permute(0, 3, 1, 2))
        # The product scales by alpha / rank where the adapter is read; here it is part of B.
        for factors in self.factors:
            factors.b.register_hook(lambda gradient, mask=factors.mask: gradient * mask)

    def loss(self) -> Tensor:
        """Of one batch: mean squared error of the velocity."""
        device = self.bagel.device
        chosen = torch.randint(len(self.captions), (self.batch,), device=device)
        ids = self.captions[chosen]
        kept = (torch.rand(self.batch, device=device) >= DROP_CAPTION).long()
        clean = self.mean[chosen] + self.std[chosen] * torch.randn_like(self.mean[chosen])
        t, noise = random_times(self.batch, device), torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, t[:, None, None])
        group = draw_group(self.embed, self.shape, ids, text_lengths(ids, self.pad) * kept, noisy, t)
        ((_, gen),) = run_groups(self.bagel, [group])
        return F.mse_loss(self.bagel.velocity(gen[:, -SIDE * SIDE :]), noise - clean)

    def train(self, steps: int, seconds: float, rate: float) -> int:
        """Up to so many steps or seconds; returns the steps."""
        parameters = [p for factors in self.factors for p in (factors.a, factors.b)]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        started, progress = time.monotonic(), 0.0
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * min(cosine(int(progress * 10000), 10000, 1), (step + 1) / 30)
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            optimizer.step()
            progress = max((step + 1) / steps, (time.monotonic() - started) / seconds)
            if step % 25 == 0 or progress >= 1:
                print(f"step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
            if progress >= 1:
                return step + 1
        return steps

    def write(self, out: Path) -> None:
        """The adapter as PEFT saves it, in bfloat16."""
        out.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for factors in self.factors:
            for name, value in factors.stored("base_model.model."):
                value = value.detach() * (self.rank / self.alpha if ".lora_B." in name else 1.0)
                tensors[name.replace("language_model.", "", 1)] = value.to(torch.bfloat16).contiguous()
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        (out / "adapter_config.json").write_text(json.dumps(self.settings(), indent=1) + "\n")

    def settings(self) -> dict[str, Any]:
        names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
        targets = [f"{name}_proj_moe_gen" for name in names]
        targets += [f"mlp_moe_gen.{name}_proj" for name in ("gate", "up", "down")]
        return {
            "peft_type": "LORA", "task_type": None, "base_model_name_or_path": "lowmem-bagel demo",
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "use_rslora": False, "use_dora": False, "modules_to_save": None, "target_modules": targets,
            "rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True, "init_lora_weights": True,
        }  # fmt: skip


@torch.no_grad()
def encoded(vae: Vae, pictures: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents of uint8 pictures [N, 3, H, W], as latent tokens, float32."""
    means, stds = [], []
    for part in pictures.split(batch):
        mean, logvar = vae.encoder(to_signed(part)).chunk(2, dim=1)
        means.append(latent_tokens((mean - vae.config.shift_factor) * vae.config.scale_factor))
        stds.append(latent_tokens(torch.exp(0.5 * logvar) * vae.config.scale_factor))
    return torch.cat(means), torch.cat(stds)


def main(
    out: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    examples: Annotated[int, typer.Option(help="Scenes.")] = 3000,
    rank: Annotated[int, typer.Option(help="Of the factors.")] = 16,
    alpha: Annotated[float, typer.Option(help="Scale times rank.")] = 32.0,
    batch: Annotated[int, typer.Option(help="Pictures a step.")] = 32,
    steps: Annotated[int, typer.Option(help="At most.")] = 3000,
    seconds: Annotated[float, typer.Option(help="At most.")] = 640.0,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 5e-3,
    seed: Annotated[int, typer.Option(help="Of scenes, noise and factors.")] = 7,
) -> None:
    """Train the adapter and write it to a folder."""
    torch.manual_seed(seed)
    started = time.monotonic()
    trainer = AdapterTrainer(FOLDER, examples, rank, alpha, batch, Random(seed))
    print(f"{examples} scenes encoded, {time.monotonic() - started:.0f} s", flush=True)
    done = trainer.train(steps, seconds, rate)
    trainer.write(out)
    record = {"steps": done, "seconds": round(time.monotonic() - started, 1), "rank": rank, "alpha": alpha}
    print(json.dumps(record), flush=True)
    assert all(math.isfinite(float(p.norm())) for f in trainer.factors for p in (f.a.detach(), f.b.detach()))


if __name__ == "__main__":
    typer.run(main)

"""Drawing, editing and answering in batches, to watch a training. The measured figures come from the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.vae import Vae

from .classifier import judge_drawing, judge_edit
from .data import ANSWER_TOKENS, CAPTION_TOKENS, INSTRUCTION_TOKENS, QUESTION_TOKENS, pad_texts
from .draw import Canvas, render_rows, scene_rows, to_signed, vit_patches
from .forward import Embedder, Group, Watch, run_groups, text_lengths, unwatched
from .scenes import held_out_scene, random_edit
from .sentences import caption, instruction, question
from .train import ask_shape, draw_group, draw_shape, edit_group, edit_shape
from .train_vae import latent_images, latent_tokens


class Sampler:
    """The trained model on one canvas. All sampling settings are the pipeline's defaults."""

    def __init__(
        self,
        bagel: Bagel,
        vae: Vae,
        scale: float,
        shift: float,
        tokenizer: Any,
        special: dict[str, int],
        canvas: Canvas,
    ) -> None:
        self.bagel, self.vae, self.scale, self.shift = bagel, vae, scale, shift
        self.tokenizer, self.canvas, self.pad = tokenizer, canvas, special["<|endoftext|>"]
        self.rows, self.columns = canvas.height // 16, canvas.width // 16
        self.embed = Embedder(bagel, special, self.rows, self.columns)

    def ids(self, texts: list[str], room: int) -> Tensor:
        padded = pad_texts(self.tokenizer, [[text] for text in texts], room)[:, 0]
        return torch.from_numpy(padded).to(self.bagel.device)

    def velocities(self, groups: list[Group], watch: Watch = unwatched) -> list[Tensor]:
        """Of each group's noisy pictures, [B, L, 64]; `watch` as `run_groups` has it."""
        tokens = self.rows * self.columns
        return [self.bagel.velocity(gen[:, -tokens:]) for _, gen in run_groups(self.bagel, groups, watch=watch)]

    @torch.no_grad()
    def draw(self, texts: list[str], seed: int, timesteps: int = 50) -> Tensor:
        """Latents [B, L, 64] drawn from captions; guidance 4 where t > 0.4."""
        ids = self.ids(texts, CAPTION_TOKENS)
        lengths = text_lengths(ids, self.pad)
        shape = draw_shape(self.rows * self.columns).to(self.bagel.device)

        def velocities(x: Tensor, t: Tensor) -> list[Tensor]:
            return self.velocities([draw_group(self.embed, shape, ids, lengths * keep, x, t) for keep in (1, 0)])

        def guided(x: Tensor, t: Tensor, now: float) -> Tensor:
            full, dropped = velocities(x, t)
            if now <= 0.4:
                return full
            v = dropped + 4 * (full - dropped)
            ratio = full.norm(dim=(1, 2), keepdim=True) / v.norm(dim=(1, 2), keepdim=True)
            out: Tensor = v * ratio.clamp(max=1)
            return out

        return self._sample(len(texts), torch.Generator().manual_seed(seed), timesteps, guided)

    @torch.no_grad()
    def edit(self, pictures: Tensor, texts: list[str], seed: int, timesteps: int = 50) -> Tensor:
        """Latents [B, L, 64] of edited pictures uint8 [B, 3, H, W]; guidance 4 on the text and 2 on the picture."""
        ids = self.ids(texts, INSTRUCTION_TOKENS)
        lengths = text_lengths(ids, self.pad)
        shape = edit_shape(self.rows * self.columns).to(self.bagel.device)
        mean, logvar = self.vae.encoder(to_signed(pictures)).chunk(2, dim=1)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        source = latent_tokens(mean + torch.exp(0.5 * logvar) * noise)
        source = (source - self.shift) * self.scale
        seen = self.embed.pictures(vit_patches(pictures, 14, 16))
        there = torch.ones_like(lengths)

        def branch(x: Tensor, t: Tensor, picture: int, text: int) -> Group:
            return edit_group(self.embed, shape, source, seen, there * picture, ids, lengths * text, x, t)

        def guided(x: Tensor, t: Tensor, now: float) -> Tensor:
            c, ct, ci = self.velocities([branch(x, t, 1, 1), branch(x, t, 1, 0), branch(x, t, 0, 1)])
            v = ct + 4 * (c - ct)
            v = v * (c.norm(dim=-1, keepdim=True) / (v.norm(dim=-1, keepdim=True) + 1e-8)).clamp(max=1)
            out: Tensor = ci + 2 * (v - ci)
            return out

        return self._sample(len(texts), generator, timesteps, guided)

    def _sample(
        self,
        batch: int,
        generator: torch.Generator,
        timesteps: int,
        velocity: Callable[[Tensor, Tensor, float], Tensor],
    ) -> Tensor:
        device = self.bagel.device
        u = torch.linspace(1, 0, timesteps)
        times = (3 * u / (1 + 2 * u)).tolist()
        x = torch.randn(batch, self.rows * self.columns, 64, generator=generator).to(device)
        for now, following in pairwise(times):
            x = x - velocity(x, torch.full((batch,), now, device=device), now).float() * (now - following)
        return x

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> NDArray[np.uint8]:
        """[B, L, 64] -> uint8 [B, H, W, 3]."""
        latent = latent_images(latents, self.rows, self.columns) / self.scale + self.shift
        out = (self.vae.decoder(latent).float() * 0.5 + 0.5).clamp(0, 1) * 255
        return np.asarray(out.to(torch.uint8).permute(0, 2, 3, 1).cpu())

    def answered_right(self, pictures: Tensor, questions: list[str], answers: list[str]) -> list[bool]:
        """Whether greedy decoding would give each answer."""
        right = self.likeliest(pictures, questions, self.ids(answers, ANSWER_TOKENS))
        return [bool(r) for r in right.all(1).tolist()]

    @torch.no_grad()
    def likeliest(self, pictures: Tensor, questions: list[str], a: Tensor) -> Tensor:
        """Whether each token after the first of answers a, int [B, ANSWER_TOKENS], is the likeliest after those
        before it, or padding: bool [B, ANSWER_TOKENS - 1]."""
        q = self.ids(questions, QUESTION_TOKENS)
        shape = ask_shape(self.rows * self.columns).to(self.bagel.device)
        seen = self.embed.pictures(vit_patches(pictures, 14, 16))
        und = torch.cat((self.embed.between_markers(len(q), seen), self.embed.text(q), self.embed.text(a)), dim=1)
        q_lengths = text_lengths(q, self.pad)
        lengths = torch.stack((torch.ones_like(q_lengths), q_lengths, text_lengths(a, self.pad)), dim=1)
        group = Group(shape, und, und.new_empty(len(q), 0, und.shape[-1]), *shape.place(lengths))
        states = run_groups(self.bagel, [group])[0][0][:, -ANSWER_TOKENS:-1]
        return (self.bagel.logits(states).argmax(-1) == a[:, 1:]) | (a[:, 1:] == self.pad)


def quick_measure(sampler: Sampler, count: int, seed: int, timesteps: int = 50) -> dict[str, Any]:
    """Right drawings, edits and answers of `count` held-out ones each, and what was wrong with the others."""
    rng = Random(seed)
    canvas = (sampler.canvas.height, sampler.canvas.width)
    scenes = [held_out_scene(rng, canvas) for _ in range(count)]
    device = sampler.bagel.device
    pictures = render_rows(torch.from_numpy(scene_rows(scenes)).to(device), sampler.canvas)
    captions = [caption(rng, scene) for scene in scenes]
    drawn = sampler.pictures(sampler.draw([c.text for c in captions], seed, timesteps))
    edits = [random_edit(rng, scene) for scene in scenes]
    orders = [instruction(rng, edit) for edit in edits]
    edited = sampler.pictures(sampler.edit(pictures, orders, seed, timesteps))
    asked = [question(rng, scene) for scene in scenes]
    answered = sampler.answered_right(pictures, [q.text for q in asked], [q.answer for q in asked])
    draw_faults = {c.text: f for c, p in zip(captions, drawn, strict=True) if (f := judge_drawing(p, c))}
    edit_faults = [
        (order, faults)
        for order, edit, picture in zip(orders, edits, edited, strict=True)
        if (faults := judge_edit(picture, edit.target))
    ]
    wrong = [(q.text, q.answer) for q, right in zip(asked, answered, strict=True) if not right]
    return {
        "count": count,
        "drawings_right": count - len(draw_faults),
        "edits_right": count - len(edit_faults),
        "answers_right": count - len(wrong),
        "draw_faults": draw_faults,
        "edit_faults": edit_faults,
        "wrong_answers": wrong,
        "pictures": (drawn, edited),
    }

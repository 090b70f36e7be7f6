"""Drawing, editing and answering in batches, to watch a training. The measured figures come from the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .data import ANSWER_TOKENS, QUESTION_TOKENS, REQUEST_TOKENS, pad_texts
from .draw import Canvas, render_rows, scene_rows, to_signed, vit_patches
from .forward import (
    Block,
    Content,
    Embedder,
    Group,
    Shape,
    Watch,
    assemble,
    run_groups,
    text_lengths,
    unwatched,
)
from .scenes import held_out_scene, random_edit
from .sentences import caption, description, instruction, question, request
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
        self.tokenizer, self.canvas = tokenizer, canvas
        self.pad, self.end, self.ask = (special[t] for t in ("<|endoftext|>", "<|im_end|>", "<|vision_start|>"))
        self.rows, self.columns = canvas.height // 16, canvas.width // 16
        self.embed = Embedder(bagel, special, self.rows, self.columns)

    def ids(self, texts: list[str], room: int) -> Tensor:
        padded = pad_texts(self.tokenizer, [[text] for text in texts], room)[:, 0]
        return torch.from_numpy(padded).to(self.bagel.device)

    def velocities(self, groups: list[Group], watch: Watch = unwatched, frames: int = 1) -> list[Tensor]:
        """Of each group's noisy pictures, [B, frames * L, 64]; `watch` as `run_groups` has it."""
        tokens = frames * self.rows * self.columns
        return [self.bagel.velocity(gen[:, -tokens:]) for _, gen in run_groups(self.bagel, groups, watch=watch)]

    def draw(self, texts: list[str], seed: int, timesteps: int = 50) -> Tensor:
        """Latents [B, L, 64] drawn from captions."""
        return self.frames([texts], None, 1, seed, timesteps)[:, 0]

    def edit(self, pictures: Tensor, texts: list[str], seed: int, timesteps: int = 50) -> Tensor:
        """Latents [B, L, 64] of edited pictures uint8 [B, 3, H, W]."""
        return self.frames([texts], pictures[:, None], 1, seed, timesteps)[:, 0]

    @torch.no_grad()
    def frames(
        self,
        texts: Sequence[list[str]],
        shown: Tensor | None,
        count: int,
        seed: int,
        timesteps: int = 50,
        guided: bool = True,
    ) -> Tensor:
        """Latents [B, count, L, 64], drawn in one split after pictures and texts.

        Guidance is 4 on the last text: where t > 0.4 without pictures, and with them at all times, beside 2 on them.

        Args:
            texts: one text or several for each context.
            shown: uint8 [B, pictures, 3, H, W], None for none.
            guided: False goes by the whole context alone.
        """
        batch, tokens, device = len(texts[0]), self.rows * self.columns, self.bagel.device
        generator = torch.Generator().manual_seed(seed)
        pictures = [] if shown is None else [self._seen(picture, generator) for picture in shown.unbind(1)]
        ids = [self.ids(text, self._room(text)) for text in texts]
        blocks = [Block("latent", tokens), Block("vit", tokens)] * len(pictures)
        blocks += [Block("text", i.shape[1]) for i in ids] + [Block("latent", tokens, noisy=True)] * count
        shape, still = Shape(*blocks).to(device), torch.zeros(batch, device=device)
        seen = [content for latents, features in pictures for content in ((latents, still), features)]
        there = [torch.ones_like(still, dtype=torch.int64)] * len(seen), [text_lengths(i, self.pad) for i in ids]

        def branch(x: Tensor, t: Tensor, picture: int, last: int) -> Group:
            lengths = [*(n * picture for n in there[0]), *there[1][:-1], there[1][-1] * last]
            lengths += [torch.ones_like(lengths[0])] * count
            drawn = [(frame, t) for frame in x.split(tokens, dim=1)]
            return assemble(self.embed, shape, [*seen, *ids, *drawn], torch.stack(lengths, 1))

        def of_text(x: Tensor, t: Tensor, now: float) -> Tensor:
            if now <= 0.4 or not guided:
                return self.velocities([branch(x, t, 1, 1)], frames=count)[0]
            full, dropped = self.velocities([branch(x, t, 1, 1), branch(x, t, 1, 0)], frames=count)
            v = dropped + 4 * (full - dropped)
            ratio = full.norm(dim=(1, 2), keepdim=True) / v.norm(dim=(1, 2), keepdim=True)
            out: Tensor = v * ratio.clamp(max=1)
            return out

        def of_both(x: Tensor, t: Tensor, now: float) -> Tensor:
            groups = [branch(x, t, 1, 1), branch(x, t, 1, 0), branch(x, t, 0, 1)]
            c, ct, ci = self.velocities(groups, frames=count)
            v = ct + 4 * (c - ct)
            v = v * (c.norm(dim=-1, keepdim=True) / (v.norm(dim=-1, keepdim=True) + 1e-8)).clamp(max=1)
            out: Tensor = ci + 2 * (v - ci)
            return out

        x = torch.randn(batch, count * tokens, 64, generator=generator).to(device)
        drawn = self._sample(x, timesteps, of_both if pictures and guided else of_text)
        return drawn.view(batch, count, tokens, 64)

    def _room(self, texts: list[str]) -> int:
        """Tokens of the longest text with its marks."""
        return max(len(e.ids) for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)) + 2

    def _seen(self, pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What both encoders make of pictures uint8 [B, 3, H, W]: scaled latents and ViT tokens."""
        mean, logvar = self.vae.encoder(to_signed(pictures)).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        latents = latent_tokens(mean + torch.exp(0.5 * logvar) * noise)
        return (latents - self.shift) * self.scale, self.embed.pictures(vit_patches(pictures, 14, 16))

    def _sample(self, x: Tensor, timesteps: int, velocity: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        u = torch.linspace(1, 0, timesteps)
        times = (3 * u / (1 + 2 * u)).tolist()
        for now, following in pairwise(times):
            time = torch.full((len(x),), now, device=x.device)
            x = x - velocity(x, time, now).float() * (now - following)
        return x

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> NDArray[np.uint8]:
        """[B, L, 64] -> uint8 [B, H, W, 3]."""
        latent = latent_images(latents, self.rows, self.columns) / self.scale + self.shift
        out = (self.vae.decoder(latent).float() * 0.5 + 0.5).clamp(0, 1) * 255
        return np.asarray(out.to(torch.uint8).permute(0, 2, 3, 1).cpu())

    def paint(
        self,
        texts: list[str],
        shown: list[list[NDArray[np.uint8]]],
        frames: int,
        seed: int,
        timesteps: int = 50,
        guided: bool = True,
    ) -> list[list[NDArray[np.uint8]]]:
        """A `clip_cases.Painter`."""
        pictures = None
        if shown[0]:
            pictures = torch.from_numpy(np.array(shown)).permute(0, 1, 4, 2, 3).to(self.bagel.device)
        latents = self.frames([texts], pictures, frames, seed, timesteps, guided)
        drawn = self.pictures(latents.flatten(0, 1))
        return [list(drawn[at * frames : (at + 1) * frames]) for at in range(len(texts))]

    def answered_right(self, pictures: Tensor, questions: list[str], answers: list[str]) -> list[bool]:
        """Whether greedy decoding would give each answer."""
        right = self.likeliest(pictures, questions, self.ids(answers, ANSWER_TOKENS))
        return [bool(r) for r in right.all(1).tolist()]

    def likeliest(self, pictures: Tensor, questions: list[str], a: Tensor) -> Tensor:
        """Whether each token after the first of answers a, int [B, ANSWER_TOKENS], is the likeliest after those
        before it, or padding: bool [B, ANSWER_TOKENS - 1]."""
        seen = self.embed.pictures(vit_patches(pictures, 14, 16))
        blocks = (Block("vit", seen.shape[1]), Block("text", QUESTION_TOKENS))
        return self._likeliest(blocks, (seen, self.ids(questions, QUESTION_TOKENS)), a, a)

    @torch.no_grad()
    def conversed_right(
        self, requests: list[str], plans: list[str], pictures: Tensor, replies: list[str]
    ) -> tuple[list[bool], list[bool]]:
        """Whether greedy decoding would say each plan and then ask for a picture, and whether after the picture (uint8
        [B, 3, H, W]) it would give each reply."""
        asked, planned = self.ids(requests, REQUEST_TOKENS), self.ids(plans, ANSWER_TOKENS)
        replied = self.ids(replies, ANSWER_TOKENS)
        texts = Block("text", REQUEST_TOKENS), Block("text", ANSWER_TOKENS)
        said = self._likeliest(texts[:1], (asked,), planned, planned.masked_fill(planned == self.end, self.ask))
        latents, features = self._seen(pictures, torch.Generator().manual_seed(0))
        tokens, still = features.shape[1], torch.zeros(len(requests), device=features.device)
        blocks = (*texts, Block("latent", tokens), Block("vit", tokens))
        answered = self._likeliest(blocks, (asked, planned, (latents, still), features), replied, replied)
        return said.all(1).tolist(), answered.all(1).tolist()

    @torch.no_grad()
    def _likeliest(self, blocks: Sequence[Block], contents: Sequence[Content], words: Tensor, wanted: Tensor) -> Tensor:
        """Whether after each of the words, int [B, L], which come after the blocks, the next one of those wanted is the
        likeliest, or padding: bool [B, L - 1]."""
        shape = Shape(*blocks, Block("text", words.shape[1])).to(self.bagel.device)
        ids = [c if isinstance(c, Tensor) and c.ndim == 2 else None for c in (*contents, words)]
        whole = torch.ones(len(words), dtype=torch.int64, device=words.device)
        lengths = torch.stack([whole if i is None else text_lengths(i, self.pad) for i in ids], dim=1)
        group = assemble(self.embed, shape, (*contents, words), lengths)
        states = run_groups(self.bagel, [group])[0][0][:, -words.shape[1] : -1]
        right: Tensor = self.bagel.logits(states).argmax(-1) == wanted[:, 1:]
        return right | (wanted[:, 1:] == self.pad)


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


def measure_conversations(sampler: Sampler, count: int, seed: int, timesteps: int = 50) -> dict[str, Any]:
    """Of `count` requests to draw and then answer about held-out scenes: plans that are said rightly and end by asking
    for a picture, pictures that are drawn rightly from request and plan, and replies that are right after a true
    picture; and what was drawn."""
    rng, canvas = Random(seed), (sampler.canvas.height, sampler.canvas.width)
    scenes = [held_out_scene(rng, canvas) for _ in range(count)]
    captions, asked, requests = (list(part) for part in zip(*(request(rng, s) for s in scenes), strict=True))
    plans = [description(scene) for scene in scenes]
    rows = torch.from_numpy(scene_rows(scenes)).to(sampler.bagel.device)
    true = render_rows(rows, sampler.canvas)
    said, replied = sampler.conversed_right(requests, plans, true, [q.answer for q in asked])
    drawn = sampler.pictures(sampler.frames([requests, plans], None, 1, seed, timesteps)[:, 0])
    faults = [judge_drawing(picture, c) for picture, c in zip(drawn, captions, strict=True)]
    return {
        "total": count,
        "plans_right": sum(said),
        "drawings_right": sum(not f for f in faults),
        "replies_right": sum(replied),
        "faults": [[r, f] for r, f in zip(requests, faults, strict=True) if f],
        "pictures": [[picture] for picture in drawn],
    }

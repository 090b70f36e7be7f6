"""Training of the demo checkpoint's decoder, ViT and connector: drawing, editing and answering in every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.vae import Vae

from .data import ANSWER_TOKENS, CAPTION_TOKENS, INSTRUCTION_TOKENS, QUESTION_TOKENS, Examples
from .draw import Canvas, render_rows, vit_patches
from .forward import Block, Embedder, Group, Kernels, Shape, finish, merge, project, run_groups, text_lengths
from .optimizer import AdamW, Matrix, Muon, average_into, cosine
from .train_vae import encode_all

MUON_LEARN_RATE = 3e-3
ADAM_LEARN_RATE = 2e-3
EMA_DECAY = 0.999
WARM_UP = 200
"""Steps until the full learning rate."""
DROP_CAPTION = 0.12
DROP_INSTRUCTION = 0.13
DROP_PICTURE = 0.14
TIME_SHIFT = 3.0
DECISIVE_LOGIT, DECISIVE_SPREAD = 2.2, 0.8
"""Of the times at which a picture's layout is decided: around 0.9."""


Hidden = list[tuple[Tensor, Tensor]]
"""Per group what `forward.run_groups` returns."""


@dataclass(frozen=True)
class BatchSizes:
    """Contexts of each task in a step, per canvas (as `scenes.CANVASES`). Drawing takes longest to learn, on the large
    canvas longest of all."""

    draw: tuple[int, ...] = (512, 56, 56)
    edit: tuple[int, ...] = (128, 16, 16)
    ask: tuple[int, ...] = (112, 14, 14)

    def divided(self, divisor: int) -> BatchSizes:
        """Smaller batches, for a trial on a small machine."""
        return BatchSizes(*(tuple(max(1, n // divisor) for n in part) for part in (self.draw, self.edit, self.ask)))


@dataclass
class CanvasData:
    """The examples of one canvas on the device, encoded."""

    canvas: Canvas
    source: tuple[Tensor, Tensor]
    """Mean and std of the latent tokens, bf16 [N, L, 64]; scaled and shifted."""
    target: tuple[Tensor, Tensor]
    patches: Tensor
    """The source as the ViT gets it, uint8 [N, L, 588]."""
    captions: Tensor
    instructions: Tensor
    questions: Tensor
    answers: Tensor

    @property
    def tokens(self) -> int:
        return self.patches.shape[1]


def prepare(
    vae: Vae,
    examples: Sequence[Examples],
    device: torch.device,
    batch: int,
    scale_and_shift: tuple[float, float] | None = None,
) -> tuple[list[CanvasData], float, float]:
    """Encode all pictures; returns the data and the latents' scale and shift (z = scale * (sample - shift)), measured
    where they are not given."""
    raw = []
    for e in examples:
        rows = [torch.from_numpy(a).to(device) for a in (e.source, e.target)]
        encoded = [encode_all(vae, r, e.canvas, batch) for r in rows]
        patches = torch.cat([vit_patches(render_rows(part, e.canvas), 14, 16) for part in rows[0].split(batch)])
        raw.append((e, encoded, patches))
    mean, std = raw[0][1][0]
    shift = mean.float().mean().item()
    scale = 1 / (mean.float().var() + std.float().square().mean()).sqrt().item()
    if scale_and_shift:
        scale, shift = scale_and_shift
    data = []
    for e, encoded, patches in raw:
        scaled = [((m.float() - shift).mul_(scale).bfloat16(), s * scale) for m, s in encoded]
        texts = (torch.from_numpy(a).to(device) for a in (e.captions, e.instructions, e.questions, e.answers))
        data.append(CanvasData(e.canvas, scaled[0], scaled[1], patches, *texts))
    return data, scale, shift


def random_times(count: int, device: torch.device) -> Tensor:
    """Times in [0, 1], float32 [count]: 60% logit-normal around 0.9, 25% like the sampler's timesteps, 15%
    logit-normal around a half.

    Between 0.8 and 0.97 it is decided which shape gets which colour and place. Under 0.5 the noisy picture shows it,
    and the caption changes next to nothing (`tests/benchmarks/demo/test_training.py` measures that on the shipped
    checkpoint).
    """
    u = torch.rand(count, device=device)
    shifted = TIME_SHIFT * u / (1 + (TIME_SHIFT - 1) * u)
    which, normal = torch.rand(count, device=device), torch.randn(count, device=device)
    decisive, any_time = (DECISIVE_LOGIT + DECISIVE_SPREAD * normal).sigmoid(), normal.sigmoid()
    return torch.where(which < 0.6, decisive, torch.where(which < 0.85, shifted, any_time))


def _sample(moments: tuple[Tensor, Tensor], chosen: Tensor) -> Tensor:
    mean, std = moments[0][chosen].float(), moments[1][chosen].float()
    return mean + std * torch.randn_like(mean)


def _pick(texts: Tensor, chosen: Tensor) -> Tensor:
    """One of each example's texts at random: [N, n, L] -> [B, L]."""
    return texts[chosen, torch.randint(texts.shape[1], chosen.shape, device=chosen.device)]


def _kept(count: int, share_dropped: float, device: torch.device) -> Tensor:
    return (torch.rand(count, device=device) >= share_dropped).long()


class CanvasTasks:
    """Makes the contexts of the three tasks for one canvas, with what they must predict."""

    def __init__(self, bagel: Bagel, data: CanvasData, special: dict[str, int]) -> None:
        self.bagel, self.data = bagel, data
        self.pad = special["<|endoftext|>"]
        self.embed = Embedder(bagel, special, data.canvas.height // 16, data.canvas.width // 16)
        n, device = data.tokens, bagel.device
        self.draw_shape = draw_shape(n).to(device)
        self.edit_shape = edit_shape(n).to(device)
        self.ask_shape = ask_shape(n).to(device)

    def _choose(self, batch: int) -> Tensor:
        return torch.randint(len(self.data.patches), (batch,), device=self.bagel.device)

    def _noisy(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their times, and the velocity to predict."""
        t = random_times(len(clean), clean.device)
        noise = torch.randn_like(clean)
        mixed = torch.lerp(clean, noise, t[:, None, None])
        return mixed, t, noise - clean

    def draw(self, batch: int) -> tuple[Group, Tensor]:
        chosen = self._choose(batch)
        ids = _pick(self.data.captions, chosen)
        kept = _kept(batch, DROP_CAPTION, ids.device)
        noisy, t, velocity = self._noisy(_sample(self.data.source, chosen))
        return draw_group(self.embed, self.draw_shape, ids, text_lengths(ids, self.pad) * kept, noisy, t), velocity

    def edit_and_ask(self, edits: int, asks: int) -> tuple[Group, Tensor, Group, Tensor]:
        """Both tasks look at pictures; the ViT runs once for both."""
        device = self.bagel.device
        chosen, asked = self._choose(edits), self._choose(asks)
        seen = self.embed.pictures(self.data.patches[torch.cat((chosen, asked))])

        ids = _pick(self.data.instructions, chosen)
        u = torch.rand(edits, device=device)
        text = (u >= DROP_INSTRUCTION).long()
        picture = 1 - ((u >= DROP_INSTRUCTION) & (u < DROP_INSTRUCTION + DROP_PICTURE)).long()
        noisy, t, velocity = self._noisy(_sample(self.data.target, chosen))
        source = _sample(self.data.source, chosen)
        lengths = text_lengths(ids, self.pad) * text
        edit = edit_group(self.embed, self.edit_shape, source, seen[:edits], picture, ids, lengths, noisy, t)

        which = torch.randint(self.data.questions.shape[1], asked.shape, device=device)
        question, answer = self.data.questions[asked, which], self.data.answers[asked, which]
        lengths = torch.stack(
            (torch.ones_like(asked), text_lengths(question, self.pad), text_lengths(answer, self.pad)), dim=1
        )
        und = torch.cat(
            (self.embed.between_markers(asks, seen[edits:]), self.embed.text(question), self.embed.text(answer)), dim=1
        )
        gen = und.new_empty(asks, 0, und.shape[-1])
        return edit, velocity, Group(self.ask_shape, und, gen, *self.ask_shape.place(lengths)), answer


def draw_shape(tokens: int) -> Shape:
    return Shape(Block("text", CAPTION_TOKENS), Block("latent", tokens))


def edit_shape(tokens: int) -> Shape:
    text = Block("text", INSTRUCTION_TOKENS)
    return Shape(Block("latent", tokens), Block("vit", tokens), text, Block("latent", tokens))


def ask_shape(tokens: int) -> Shape:
    return Shape(Block("vit", tokens), Block("text", QUESTION_TOKENS), Block("text", ANSWER_TOKENS))


def draw_group(embed: Embedder, shape: Shape, ids: Tensor, lengths: Tensor, noisy: Tensor, t: Tensor) -> Group:
    """[caption, noisy picture]; lengths int64 [B], 0 where the caption is left out."""
    und = torch.cat((embed.text(ids), embed.between_markers(len(ids))), dim=1)
    return Group(shape, und, embed.latents(noisy, t), *shape.place(torch.stack((lengths, torch.ones_like(lengths)), 1)))


def edit_group(
    embed: Embedder,
    shape: Shape,
    source: Tensor,
    seen: Tensor,
    picture: Tensor,
    ids: Tensor,
    lengths: Tensor,
    noisy: Tensor,
    t: Tensor,
) -> Group:
    """[input latents, input ViT tokens, instruction, noisy picture].

    source, noisy: [B, L, 64]; seen: [B, L, D] from `Embedder.pictures`; picture int64 [B]: 0 where the input picture
    is left out; lengths int64 [B]: 0 where the instruction is.
    """
    batch = len(ids)
    markers = embed.between_markers(batch)
    und = torch.cat((markers, embed.between_markers(batch, seen), embed.text(ids), markers), dim=1)
    gen = torch.cat((embed.latents(source, torch.zeros_like(t)), embed.latents(noisy, t)), dim=1)
    place = shape.place(torch.stack((picture, picture, lengths, torch.ones_like(lengths)), 1))
    return Group(shape, und, gen, *place)


class Trainer:
    """One step over all tasks and canvases; on CUDA compiled per layer and captured in a graph."""

    def __init__(self, bagel: Bagel, data: Sequence[CanvasData], special: dict[str, int], sizes: BatchSizes) -> None:
        self.bagel, self.sizes, self.pad = bagel, sizes, special["<|endoftext|>"]
        self.tasks = [CanvasTasks(bagel, d, special) for d in data]
        self.on_gpu = bagel.device.type == "cuda"
        device = bagel.device
        self.muon_lr, self.adam_lr, self.ema_weight = (torch.zeros((), device=device) for _ in range(3))
        matrices, rest = split_parameters(bagel)
        self.muon, self.adam = Muon(matrices, self.muon_lr), AdamW(rest, self.adam_lr)
        self.parameters = [p for p in bagel.parameters() if p.requires_grad]
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.losses = torch.zeros(3, device=device)
        """Of the last step: drawing, editing (mean squared error of the velocity), answering (cross-entropy)."""
        # Compiling only the two halves of a layer takes seconds; whole layers with all groups' attention take minutes.
        self.kernels = Kernels()
        if self.on_gpu:
            self.kernels = Kernels(torch.compile(project, dynamic=False), torch.compile(finish, dynamic=False))
        self.graph: torch.cuda.CUDAGraph | None = None

    def loss(self) -> Tensor:
        """Draws a batch and returns the sum of the three losses; `self.losses` gets them apart."""
        groups: list[Group] = []
        drawn, edited, answers = [], [], []
        for task, draws, edits, asks in zip(self.tasks, self.sizes.draw, self.sizes.edit, self.sizes.ask, strict=True):
            draw, to_draw = task.draw(draws)
            edit, to_edit, ask, answer = task.edit_and_ask(edits, asks)
            groups += [draw, edit, ask]
            drawn.append(to_draw)
            edited.append(to_edit)
            answers.append(answer)
        groups = groups[:3] + [merge(groups[task::3]) for task in range(3, 6)]
        hidden = run_groups(self.bagel, groups, self.kernels)
        draw_loss = self._velocity_loss(hidden[0::3], drawn)
        edit_loss = self._velocity_loss(hidden[1::3], edited)
        ask_loss = self._answer_loss(hidden[2::3], torch.cat(answers).long())
        self.losses.copy_(torch.stack((draw_loss, edit_loss, ask_loss)).detach())
        return draw_loss + edit_loss + ask_loss

    def _velocity_loss(self, hidden: Hidden, wanted: list[Tensor]) -> Tensor:
        tokens = (wanted[0].shape[1], wanted[1].shape[1])
        states = torch.cat([gen[:, -n:].flatten(0, 1) for (_, gen), n in zip(hidden, tokens, strict=True)])
        return F.mse_loss(self.bagel.velocity(states), torch.cat([w.flatten(0, 1) for w in wanted]))

    def _answer_loss(self, hidden: Hidden, answers: Tensor) -> Tensor:
        states = torch.cat([und[:, -ANSWER_TOKENS:-1] for und, _ in hidden])
        following = answers[:, 1:].masked_fill(answers[:, 1:] == self.pad, -100)
        return F.cross_entropy(self.bagel.logits(states).float().flatten(0, 1), following.flatten())

    def _step(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        backend = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if self.on_gpu else nullcontext()
        with backend:
            with torch.autocast(self.bagel.device.type, torch.bfloat16, enabled=self.on_gpu, cache_enabled=False):
                loss = self.loss()
            loss.backward()
        self.muon.step()
        self.adam.step()
        average_into(self.averaged, self.parameters, self.ema_weight)

    def warm_up(self) -> None:
        """Compile and capture; the weights do not change."""
        if not self.on_gpu:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def train(self, steps: int, seconds: float, say: Callable[[str], None] = print) -> int:
        """Run up to `steps` steps or `seconds`; the schedule follows whichever is used up faster. Returns the steps."""
        started = time.monotonic()
        progress = 0.0
        for step in range(steps):
            factor = min(cosine(int(progress * 10000), 10000, 1), (step + 1) / WARM_UP)
            self.muon_lr.fill_(MUON_LEARN_RATE * factor)
            self.adam_lr.fill_(ADAM_LEARN_RATE * factor)
            self.ema_weight.fill_(max(1 - EMA_DECAY, 1 / (step / 10 + 1)))
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
            if step % 20 == 0:
                losses = self.losses.tolist()
                progress = max(step / steps, (time.monotonic() - started) / seconds)
                assert all(x == x for x in losses), "the loss is not a number"
                if step % 500 == 0:
                    draw, edit, ask = losses
                    say(f"step {step} draw {draw:.4f} edit {edit:.4f} ask {ask:.4f} {time.monotonic() - started:.0f} s")
                if progress >= 1:
                    return step + 1
        return steps

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the exponential average of the weights into the model."""
        for parameter, average in zip(self.parameters, self.averaged, strict=True):
            parameter.copy_(average)


def split_parameters(bagel: Bagel) -> tuple[list[Matrix], list[Tensor]]:
    """The layers' matrices for Muon, stacked ones with their parts; everything else that is trained for AdamW."""
    d = bagel.config.decoder
    parts = {"qkv.weight": d.qkv_rows, "gate_up.weight": (d.intermediate_size,) * 2}
    matrices: list[Matrix] = []
    rest: list[Tensor] = []
    for name, parameter in bagel.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and ".layers." in name:
            rows = next((r for end, r in parts.items() if name.endswith(end)), (parameter.shape[0],))
            matrices.append(Matrix(parameter, rows))
        else:
            rest.append(parameter)
    return matrices, rest

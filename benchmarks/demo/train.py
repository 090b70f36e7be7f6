"""Training of the demo checkpoint's decoder, ViT and connector: every task of a mixture in every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.vae import Vae

from .data import KINDS, Examples
from .draw import Canvas, render_rows, vit_patches
from .forward import (
    Content,
    Embedder,
    Group,
    Kernels,
    Shape,
    assemble,
    finish,
    merge,
    project,
    run_groups,
    text_lengths,
)
from .mixture import TASKS, Choice, Slot, Task
from .optimizer import AdamW, Matrix, Muon, average_into, cosine
from .train_vae import encode_all

MUON_LEARN_RATE = 3e-3
ADAM_LEARN_RATE = 2e-3
EMA_DECAY = 0.999
WARM_UP = 200
"""Steps until the full learning rate."""
TIME_SHIFT = 3.0
DECISIVE_LOGIT, DECISIVE_SPREAD = 2.2, 0.8
"""Of the times at which a picture's layout is decided: around 0.9."""
IGNORED = -100
WORDINGS = 60
"""A multiple of every number of wordings, of which one is drawn for all texts of a context."""


Moments = tuple[Tensor, Tensor]
"""Mean and std of latent tokens, bf16 [N, L, 64]; scaled and shifted."""


@dataclass
class Encoded:
    """Examples of one kind and canvas on the device, their pictures encoded."""

    kind: str
    canvas: Canvas
    pictures: dict[str, Moments]
    patches: dict[str, Tensor]
    """Pictures as the ViT gets them, uint8 [N, L, 588]."""
    texts: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.texts.values())))

    @property
    def tokens(self) -> int:
        """Of a picture."""
        return (self.canvas.height // 16) * (self.canvas.width // 16)


def prepare(
    vae: Vae,
    examples: Sequence[Examples],
    tasks: Mapping[str, Task],
    device: torch.device,
    batch: int,
    scale_and_shift: tuple[float, float] | None = None,
) -> tuple[list[Encoded], float, float]:
    """Encode the pictures that the tasks need; returns the data and the latents' scale and shift (z = scale * (sample -
    shift)), measured on the first picture's where they are not given."""
    data = []
    for e in examples:
        own = [task for task in tasks.values() if task.kind == e.kind]
        drawn = {name: None for task in own for name in task.names("seen", "drawn")}
        shown = {name: None for task in own for name in task.names("seen", "looked at")}
        rows = {name: torch.from_numpy(e.pictures[name]).to(device) for name in {**drawn, **shown}}
        moments = {name: encode_all(vae, rows[name], e.canvas, batch) for name in drawn}
        patches = {name: _patches(rows[name], e.canvas, batch) for name in shown}
        texts = {name: torch.from_numpy(ids).to(device) for name, ids in e.texts.items()}
        data.append(Encoded(e.kind, e.canvas, moments, patches, texts))
    scale, shift = scale_and_shift or _scale_and_shift(next(iter(data[0].pictures.values())))
    for d in data:
        for name, (mean, std) in d.pictures.items():
            d.pictures[name] = (mean.float() - shift).mul_(scale).bfloat16(), std * scale
    return data, scale, shift


def _patches(rows: Tensor, canvas: Canvas, batch: int) -> Tensor:
    return torch.cat([vit_patches(render_rows(part, canvas), 14, 16) for part in rows.split(batch)])


def _scale_and_shift(moments: Moments) -> tuple[float, float]:
    mean, std = (m.float() for m in moments)
    return 1 / (mean.var() + std.square().mean()).sqrt().item(), mean.mean().item()


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


def _sample(moments: Moments, chosen: Tensor) -> Tensor:
    mean, std = moments[0][chosen].float(), moments[1][chosen].float()
    return mean + std * torch.randn_like(mean)


def draw_shape(tokens: int) -> Shape:
    return TASKS["draw"].shape(tokens)


def edit_shape(tokens: int) -> Shape:
    return TASKS["edit"].shape(tokens)


def draw_group(embed: Embedder, shape: Shape, ids: Tensor, lengths: Tensor, noisy: Tensor, t: Tensor) -> Group:
    """[caption, noisy picture]; lengths int64 [B], 0 where the caption is left out."""
    return assemble(embed, shape, (ids, (noisy, t)), torch.stack((lengths, torch.ones_like(lengths)), 1))


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
    there = torch.stack((picture, picture, lengths, torch.ones_like(lengths)), 1)
    return assemble(embed, shape, ((source, torch.zeros_like(t)), seen, ids, (noisy, t)), there)


@dataclass
class Taught:
    """Contexts of one task, and what is to be learnt from them.

    velocities: of each drawn picture [B, L, 64], the last gen tokens; drawn: 0 where one is left out, [B, L] each.
    labels: the token after each of the und tokens `spoken`, -100 where there is nothing to learn, [B, len(spoken)].
    """

    group: Group
    velocities: Tensor
    drawn: Tensor
    labels: Tensor
    spoken: Tensor


def merged(parts: Sequence[Taught]) -> Taught:
    """Of canvases with as many tokens, as one batch."""
    return Taught(
        merge([part.group for part in parts]),
        torch.cat([part.velocities for part in parts]),
        torch.cat([part.drawn for part in parts]),
        torch.cat([part.labels for part in parts]),
        parts[0].spoken,
    )


class Lesson:
    """One task on one canvas: chooses examples and makes contexts of them."""

    def __init__(self, name: str, task: Task, data: Encoded, batch: int, special: dict[str, int]) -> None:
        self.name, self.task, self.data, self.batch = name, task, data, batch
        self.pad, self.end, self.ask = (special[t] for t in ("<|endoftext|>", "<|im_end|>", "<|vision_start|>"))
        self.device = next(iter(data.texts.values())).device
        self.shape = task.shape(data.tokens).to(self.device)
        self.choices = [_patterns(choice, task.slots, self.device) for choice in task.choices]
        self.spoken = torch.tensor(list(self._spoken()), dtype=torch.int64, device=self.device)

    def _spoken(self) -> Iterator[int]:
        """Und tokens whose next token is to be learnt."""
        start = 0
        for slot in self.task.slots:
            tokens = sum(block.und_tokens for block in slot.blocks(self.data.tokens, KINDS[self.task.kind].rooms))
            if slot.role in ("spoken", "asking"):
                yield from range(start, start + tokens - 1)
            start += tokens

    def choose(self) -> Tensor:
        """Examples for a step: int64 [batch]."""
        return torch.randint(len(self.data), (self.batch,), device=self.device)

    def shown(self, chosen: Tensor) -> list[Tensor]:
        """What the ViT is to see of them, in the slots' order."""
        return [self.data.patches[name][chosen] for name in self.task.names("seen", "looked at")]

    def teach(self, embed: Embedder, chosen: Tensor, seen: Sequence[Tensor]) -> Taught:
        """seen: what `Embedder.pictures` made of `shown`."""
        wording = torch.randint(WORDINGS, chosen.shape, device=self.device)
        t, features = random_times(len(chosen), self.device), iter(seen)
        contents: list[Content] = []
        lengths: list[Tensor] = []
        velocities: list[Tensor] = [t.new_empty(len(chosen), 0, 64)]
        drawn: list[Tensor] = [t.new_empty(len(chosen), 0)]
        labels: list[Tensor] = [chosen.new_empty(len(chosen), 0)]
        for slot, there in zip(self.task.slots, self._there(len(chosen)).unbind(1), strict=True):
            if slot.role in ("said", "spoken", "asking"):
                texts = self.data.texts[slot.name]
                ids = F.pad(texts[chosen, wording % texts.shape[1]], (0, slot.spare), value=self.pad)
                contents.append(ids)
                lengths.append(text_lengths(ids, self.pad) * there)
                if slot.role != "said":
                    labels.append(self._labels(ids.long(), there, slot.role == "asking"))
                continue
            if slot.role != "looked at":
                clean = _sample(self.data.pictures[slot.name], chosen)
                noise = torch.randn_like(clean) if slot.role == "drawn" else clean
                contents.append((torch.lerp(clean, noise, t[:, None, None]), t * (slot.role == "drawn")))
                lengths.append(there)
                if slot.role == "drawn":
                    velocities.append(noise - clean)
                    drawn.append(there[:, None].expand(-1, clean.shape[1]))
                    continue
            contents.append(next(features))
            lengths.append(there)
        group = assemble(embed, self.shape, contents, torch.stack(lengths, 1))
        return Taught(group, torch.cat(velocities, 1), torch.cat(drawn, 1), torch.cat(labels, 1), self.spoken)

    def _there(self, batch: int) -> Tensor:
        """0 where a slot is left out of a context: int64 [batch, slots]."""
        there = torch.ones(batch, len(self.task.slots), dtype=torch.int64, device=self.device)
        for limits, patterns in self.choices:
            there = there * patterns[torch.searchsorted(limits, torch.rand(batch, device=self.device))]
        return there

    def _labels(self, ids: Tensor, there: Tensor, asking: bool) -> Tensor:
        following = ids[:, 1:]
        if asking:
            following = following.masked_fill(following == self.end, self.ask)
        return following.masked_fill((following == self.pad) | (there[:, None] == 0), IGNORED)


def _patterns(choice: Choice, slots: Sequence[Slot], device: torch.device) -> tuple[Tensor, Tensor]:
    """A choice's shares, added up, and for each which slots stay; last all do: [n] and int64 [n + 1, slots]."""
    limits = torch.tensor([share for share, _ in choice]).cumsum(0)
    rows = [[int(slot.stays(left_out)) for slot in slots] for _, left_out in choice]
    return limits.to(device), torch.tensor([*rows, [1] * len(slots)], device=device)


class Trainer:
    """One step over all tasks and canvases; on CUDA compiled per layer and captured in a graph.

    tasks: of `mixture.TASKS`, scaled as one likes; rate: factor on the learning rates.
    """

    def __init__(
        self,
        bagel: Bagel,
        data: Sequence[Encoded],
        special: dict[str, int],
        tasks: Mapping[str, Task],
        rate: float = 1.0,
    ) -> None:
        self.bagel, self.tasks, self.rate = bagel, dict(tasks), rate
        self.lessons: dict[Canvas, list[Lesson]] = {}
        for name, task in tasks.items():
            own = [d for d in data if d.kind == task.kind]
            for d, batch in zip(own, task.batch, strict=True):
                self.lessons.setdefault(d.canvas, []).append(Lesson(name, task, d, batch, special))
        self.embed = {c: Embedder(bagel, special, c.height // 16, c.width // 16) for c in self.lessons}
        self.on_gpu = bagel.device.type == "cuda"
        device = bagel.device
        self.muon_lr, self.adam_lr, self.ema_weight = (torch.zeros((), device=device) for _ in range(3))
        matrices, rest = split_parameters(bagel)
        self.muon, self.adam = Muon(matrices, self.muon_lr), AdamW(rest, self.adam_lr)
        self.parameters = [p for p in bagel.parameters() if p.requires_grad]
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.losses = torch.zeros(len(tasks), device=device)
        """Of the last step, task by task: mean squared error of the velocity, or cross-entropy of the words."""
        self.weights = torch.tensor([task.weight for task in tasks.values()], device=device)
        # Compiling only the two halves of a layer takes seconds; whole layers with all groups' attention take minutes.
        self.kernels = Kernels()
        if self.on_gpu:
            self.kernels = Kernels(torch.compile(project, dynamic=False), torch.compile(finish, dynamic=False))
        self.graph: torch.cuda.CUDAGraph | None = None

    def loss(self) -> Tensor:
        """Draws a batch and returns the weighted sum of the tasks' losses; `self.losses` gets them apart."""
        taught: dict[str, list[Taught]] = {name: [] for name in self.tasks}
        for canvas, lessons in self.lessons.items():
            for lesson, made in zip(lessons, self._taught(canvas, lessons), strict=True):
                taught[lesson.name].append(made)
        # The two small canvases have as many tokens as each other.
        parts = {name: [*made[:1], *([merged(made[1:])] if made[1:] else [])] for name, made in taught.items()}
        groups = [part.group for made in parts.values() for part in made]
        hidden = iter(run_groups(self.bagel, groups, self.kernels))
        losses = torch.stack([self._loss([(part, next(hidden)) for part in made]) for made in parts.values()])
        self.losses.copy_(losses.detach())
        return (self.weights * losses).sum()

    def _taught(self, canvas: Canvas, lessons: Sequence[Lesson]) -> Iterator[Taught]:
        """All lessons of a canvas; the ViT runs once for them."""
        chosen = [lesson.choose() for lesson in lessons]
        shown = [lesson.shown(examples) for lesson, examples in zip(lessons, chosen, strict=True)]
        flat = [patches for part in shown for patches in part]
        embed = self.embed[canvas]
        seen = iter(embed.pictures(torch.cat(flat)).split([len(patches) for patches in flat]) if flat else ())
        for lesson, examples, part in zip(lessons, chosen, shown, strict=True):
            yield lesson.teach(embed, examples, [next(seen) for _ in part])

    def _loss(self, parts: Sequence[tuple[Taught, tuple[Tensor, Tensor]]]) -> Tensor:
        """Of one task's contexts and the hidden states of their und and gen tokens."""
        loss = self.losses.new_zeros(())
        if any(taught.velocities.numel() for taught, _ in parts):
            states = torch.cat([gen[:, -taught.velocities.shape[1] :].flatten(0, 1) for taught, (_, gen) in parts])
            wanted = torch.cat([taught.velocities.flatten(0, 1) for taught, _ in parts])
            counts = torch.cat([taught.drawn.flatten() for taught, _ in parts])
            error = (self.bagel.velocity(states).float() - wanted).square().mean(-1)
            loss = loss + (error * counts).sum() / counts.sum().clamp(min=1)
        if any(taught.labels.numel() for taught, _ in parts):
            states = torch.cat([und.index_select(1, taught.spoken).flatten(0, 1) for taught, (und, _) in parts])
            labels = torch.cat([taught.labels.flatten() for taught, _ in parts])
            loss = loss + F.cross_entropy(self.bagel.logits(states).float(), labels, ignore_index=IGNORED)
        return loss

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
            self.muon_lr.fill_(MUON_LEARN_RATE * self.rate * factor)
            self.adam_lr.fill_(ADAM_LEARN_RATE * self.rate * factor)
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
                    told = " ".join(f"{name} {loss:.4f}" for name, loss in zip(self.tasks, losses, strict=True))
                    say(f"step {step} {told} {time.monotonic() - started:.0f} s")
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

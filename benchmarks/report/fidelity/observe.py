"""What one loaded model gives on the material: distributions, answers, pictures, velocities, layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .material import Material, Request
from .metrics import Pixels

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_bagel.generation.inputs import Prepared, Term
    from lowmem_bagel.generation.probe import PictureProbe
    from lowmem_bagel.pipeline import BagelPipeline
    from lowmem_bagel.sampling.denoise import Step


@dataclass(frozen=True)
class Work:
    """What is observed of every model.

    pictures: whether pictures are drawn and questions answered, which random weights need not. trajectories: of the
    first pictures, whose velocities are compared step by step. size: pixels a side of what is drawn from a prompt.
    """

    material: Material
    size: int
    num_timesteps: int
    max_new_tokens: int
    trajectories: int
    pictures: bool
    seed: int


@dataclass(frozen=True)
class Track:
    """What a source fixed for those that are compared with it: texts by their terms and ids; and for each trajectory
    the latents entering its steps, (t, x_t on the host)."""

    texts: Sequence[tuple[Sequence[Term], Sequence[int]]]
    states: Sequence[Sequence[tuple[float, Tensor]]]


@dataclass
class Seen:
    """Tensors are on the host. Velocities are float32; of each trajectory `plain` is the first step's, unguided, and
    `layers` the hidden states of its latent tokens after each layer."""

    logits: list[Tensor] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    pictures: list[Pixels] = field(default_factory=list)
    velocities: list[list[Tensor]] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)
    layers: list[list[Tensor]] = field(default_factory=list)


def observe(pipe: BagelPipeline, work: Work, track: Track | None, step_cache: str = "none") -> tuple[Seen, Track]:
    """track: what is given; None for the source, which fixes it. Hidden states are not asked for with a step cache."""
    from lowmem_bagel.generation.probe import PictureProbe, looking

    seen = Seen()
    if work.pictures:
        seen.answers = [_answer(pipe, request, work) for request in work.material.questions]
        seen.pictures = [
            _picture(pipe, request, work, i, step_cache) for i, request in enumerate(work.material.drawings)
        ]
    if track is None:
        track = Track(_texts(pipe, work, seen.answers), ())
    with looking(pipe.model):
        seen.logits = [_logits(pipe, *text) for text in track.texts]
        states: list[Sequence[tuple[float, Tensor]]] = []
        for index, request in enumerate(work.material.drawings[: work.trajectories]):
            probe = PictureProbe(pipe.model, _prepared(pipe, request, work, index))
            way = _followed(probe, track.states[index], step_cache) if track.states else _own(probe)
            states.append([(t, x) for t, x, _ in way])
            seen.velocities.append([velocity for *_, velocity in way])
            _look_at_first(probe, states[-1][0], step_cache, seen)
    return seen, Track(track.texts, states)


def _prepared(pipe: BagelPipeline, request: Request, work: Work, index: int) -> Prepared:
    return pipe.prepare(request.terms, output="image", **_settings(pipe, request, work, index))


def _settings(pipe: BagelPipeline, request: Request, work: Work, index: int) -> dict[str, Any]:
    side = {} if request.picture else dict.fromkeys(("height", "width"), min(work.size, pipe.model.folder.max_side))
    return {"seed": work.seed + index, "num_timesteps": work.num_timesteps, **side}


def _picture(pipe: BagelPipeline, request: Request, work: Work, index: int, step_cache: str) -> Pixels:
    settings = _settings(pipe, request, work, index)
    return np.asarray(pipe.run(request.terms, output="image", step_cache=step_cache, **settings).image)


def _answer(pipe: BagelPipeline, request: Request, work: Work) -> list[int]:
    return pipe.run(request.terms, output="text", max_new_tokens=work.max_new_tokens, seed=work.seed).token_ids


def _texts(pipe: BagelPipeline, work: Work, answers: list[list[int]]) -> list[tuple[Sequence[Term], Sequence[int]]]:
    """The material's texts, and the source's answers behind their questions."""
    from lowmem_bagel.generation.inputs import open_terms

    plain: list[tuple[Sequence[Term], Sequence[int]]] = [
        ((), pipe.model.tokenizer.text_block(text)) for text in work.material.texts
    ]
    asked = zip(work.material.questions, answers, strict=False)
    return plain + [(open_terms(request.terms), ids) for request, ids in asked]


def _logits(pipe: BagelPipeline, terms: Sequence[Term], ids: Sequence[int]) -> Tensor:
    from lowmem_bagel.generation.probe import text_logits

    return text_logits(pipe.model, terms, ids).cpu()


def _own(probe: PictureProbe) -> list[tuple[float, Tensor, Tensor]]:
    """The latents that the model's own steps meet, and their velocities, which are guided: (t, x_t, velocity)."""
    way: list[tuple[float, Tensor, Tensor]] = []

    def remember(step: Step) -> None:
        way.append((step.t, step.x_t.cpu().clone(), step.velocity.cpu().clone()))

    settings = probe.settings
    probe.sampler().run(probe.noise, settings.num_timesteps, settings.timestep_shift, remember, _unseen)
    return way


def _followed(
    probe: PictureProbe, states: Sequence[tuple[float, Tensor]], step_cache: str
) -> list[tuple[float, Tensor, Tensor]]:
    """The same on a source's latents, in order, as a step cache must be told them."""
    sampler = probe.sampler(step_cache)
    return [(t, x, sampler.velocity(*_there(probe, t, x)).cpu()) for t, x in states]


def _look_at_first(probe: PictureProbe, state: tuple[float, Tensor], step_cache: str, seen: Seen) -> None:
    """The plain velocity, and hidden states; both without a step cache."""
    x, _, time = _there(probe, *state)
    seen.plain.append(probe.sampler("none").plain_velocity(x, time).cpu())
    if step_cache == "none":
        seen.layers.append([hidden.cpu().clone() for hidden in probe.sampler().layers(x, time)])


def _there(probe: PictureProbe, t: float, x: Tensor) -> tuple[Tensor, float, Tensor]:
    """A state as a sampler takes it."""
    import torch

    device = probe.model.bagel.device
    return x.to(device), t, torch.tensor([t], device=device)


def _unseen(latent: Tensor) -> Any:
    raise AssertionError("nobody asks for a preview")

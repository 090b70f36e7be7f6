"""One request carried out: from the blocks of its terms to a picture or an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import Cancelled, first_line
from ..model.vision import unpatchify
from ..ops.device import empty_cache
from ..pictures.sheets import sheet
from ..runtime.loaded import LoadedModel
from ..sampling.denoise import Step
from ..sampling.frames import Frames
from ..sampling.text import Decoded, EagerNextToken, NextToken, Started, TokenChoice, decode_text
from ..sampling.text_graph import GraphNextToken, TokenStep, why_not_graph
from ..settings import PictureSettings, TextSettings
from .drawing import frames_of, guidance_of, later_blocks, picture_sampler
from .images import decoded, from_pixels
from .inputs import Block, Contexts, PictureBlock, Term, TextBlock
from .results import Result, Stats

if TYPE_CHECKING:
    from PIL import Image

THINK_BEFORE_DRAWING = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> "
    "image here"
)
THINK_BEFORE_ANSWERING = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> "
    "answer here"
)
"""Interface constants of the published model, byte for byte."""

GRAPH_PAYS_FROM = 16
"""Tokens from which capturing a CUDA graph is worth its time."""


class Token:
    """One generated token, as a callback sees it: `index` counts from 1, `total` is the limit."""

    def __init__(self, id: int, index: int, total: int) -> None:
        self.id, self.index, self.total = id, index, total


class Begun:
    """An answer of several pieces begins; where memory ran out, again: what was told of it before does not count."""


class Repeated:
    """Something of an earlier turn went through the model again, whose keys are not there any more."""


Callback = Callable[[Any], object]
"""Called after every sampling step (`Step`), every generated token (`Token`) and, of an answer of several pieces, when
it begins (`Begun`), after every piece (`Said`, `Drawn`) and while earlier turns are read again (`Repeated`). Returning
False stops the request (`Cancelled`)."""


class Execution:
    """Draws or answers with a loaded model; `terms` are only remembered with the result.

    Attributes:
        notes: what ought to be known of how the pictures were read.
    """

    def __init__(self, model: LoadedModel, terms: Sequence[Term], callback: Callback | None) -> None:
        self.model, self.terms, self.callback = model, terms, callback
        self.notes = [note for term in terms if not isinstance(term, str) for note in term.notes]

    def answer(self, blocks: list[Block], settings: TextSettings) -> Result:
        """Text after the blocks."""
        stats, generator = Stats(self.model.bagel.device), torch.Generator().manual_seed(settings.seed)
        if settings.think:
            blocks.insert(0, self._text_block(THINK_BEFORE_ANSWERING))
        with stats.phase("prefill"):
            contexts = Contexts(self.model, blocks, 0, image_branch=False, spare=settings.max_new_tokens)
            for block in blocks[:-1]:
                contexts.append(block, generator)
            started = contexts.append_and_start(blocks[-1], generator)
        with stats.phase("answer"):
            choice = TokenChoice(settings.do_sample, settings.temperature, settings.top_p)
            ids = self._decode(contexts, started, settings.max_new_tokens, choice, generator).ids
        text = self.model.tokenizer.decode_generated(ids)
        return Result(None, text, settings.seed, None, ids, stats, self._record(settings.to_json()))

    def draw(self, blocks: list[Block], settings: PictureSettings, turns: Sequence[str] = ()) -> Result:
        """A picture after the blocks, or frames; think first where the settings say so.

        Args:
            turns: of frames in turn, a text for each after the first; none where all are of the same texts.
        """
        model = self.model
        stats, generator = Stats(model.bagel.device), torch.Generator().manual_seed(settings.seed)
        guidance = guidance_of(settings)
        frames = frames_of(model.folder.config, blocks, settings)
        texts = [self._text_block(text) for text in turns]
        later = later_blocks(model.folder.config, frames, settings, texts)
        self._make_ready_for_previews()
        system = [self._text_block(THINK_BEFORE_DRAWING)] if settings.think else []
        with stats.phase("prefill"), memory_returned(model.bagel.device, blocks):
            contexts = Contexts(
                model,
                [*system, *blocks],
                frames.tokens,
                guidance.uses_image_branch,
                settings.max_think_tokens if settings.think else 0,
                later,
                guidance.text_scale > 1,
            )
            for prompt in system:
                contexts.append_system(prompt)
            for block in blocks:
                contexts.append(block, generator)
        ids: list[int] = []
        text = ""
        if settings.think:
            with stats.phase("think"):
                length, position = contexts.full.length, contexts.full.position
                choice = TokenChoice()
                ids = self._decode(contexts, contexts.start(), settings.max_think_tokens, choice, generator).ids
                contexts.full.drop_after(length, position)
                text = model.tokenizer.decode_generated(ids)
                contexts.append_thoughts(self._text_block(text))
        latents: list[Tensor] = []
        images: list[Image.Image] = []
        evaluations = computed = 0
        count = settings.frames if settings.frame_mode == "turn" else 1
        for turn in range(count):
            if turn:
                with stats.phase("prefill"), memory_returned(model.bagel.device, later):
                    contexts.append_drawn(PictureBlock(images[-1], True, model.folder.config), generator)
                    for block in texts[turn - 1 : turn]:
                        contexts.append(block, generator)
            with stats.phase("denoise"):
                latent, asked, done = self._denoised(contexts, settings, frames, generator, (turn, count))
            evaluations, computed = evaluations + asked, computed + done
            if turn == count - 1:
                del contexts  # its memory is the decoder's to use
            with stats.phase("decode"):
                images += [decoded(model, self._positions(one, frames)) for one in frames.split(latent)]
            latents.append(latent.cpu())
        side = model.folder.config.token_pixels
        used = settings.to_json() | {"height": frames.rows * side, "width": frames.columns * side}
        if settings.step_cache != "none":
            used |= {"evaluations": evaluations, "evaluations_computed": computed}
        if turns:
            used |= {"turns": list(turns)}
        first, *more = images
        return Result(first, text, settings.seed, torch.cat(latents), ids, stats, self._record(used), more=tuple(more))

    def _make_ready_for_previews(self) -> None:
        """What previews need of an autoencoder that waits in RAM is found before the contexts are there, where the plan
        has room for it: between steps, beside all the keys, it may have none, and a step would wait for the copy."""
        if self.callback is not None and "vae" in self.model.staged:
            _ = self.model.colors

    def _denoised(
        self, contexts: Contexts, settings: PictureSettings, frames: Frames, generator: torch.Generator,
        part: tuple[int, int] = (0, 1),
    ) -> tuple[Tensor, int, int]:  # fmt: skip
        """The latent that noise from the generator becomes; evaluations, and how many of them were computed.

        part: which of how many frames in turn it is.
        """
        sampler = picture_sampler(self.model, contexts, settings, frames)
        latent = sampler.run(
            frames.noise(self.model.folder.config.latent_values, generator),
            settings.num_timesteps,
            settings.timestep_shift,
            partial(self._report_step, *part),
            partial(self._preview, frames),
        )
        return latent, sampler.evaluations, sampler.computed

    def _report_step(self, turn: int, count: int, step: Step) -> None:
        """Of frames in turn, steps count on from frame to frame."""
        whole = step if count == 1 else replace(step, index=turn * step.total + step.index, total=count * step.total)
        report(self.callback, whole)

    @torch.inference_mode()
    def _preview(self, frames: Frames, latent: Tensor) -> Image.Image:
        return sheet([from_pixels(self.model.colors(self._positions(one, frames))) for one in frames.split(latent)])

    def _positions(self, latent: Tensor, frames: Frames) -> Tensor:
        """One frame's [each, latent_values] as the autoencoder has it, [z_channels, h, w]."""
        return unpatchify(latent, frames.rows, frames.columns, self.model.folder.config.latent_patch)

    def _decode(
        self,
        contexts: Contexts,
        started: Tensor,
        max_tokens: int,
        choice: TokenChoice,
        generator: torch.Generator,
        asking: Sequence[int] = (),
    ) -> Decoded:
        """Text after the contexts and the start token, whose hidden state is `started`. Beside im_end, the `asking`
        tokens end it."""
        tokenizer, bagel = self.model.tokenizer, self.model.bagel
        with self.model.using("lm_head"):
            return decode_text(
                Started(
                    lambda: choice(bagel.logits(started)[0, 0], generator),
                    lambda token: self._next_token(contexts, token, max_tokens, choice, generator),
                ),
                tokenizer.im_start,
                (tokenizer.im_end, *asking),
                max_tokens,
                lambda id, index: report(self.callback, Token(id, index, max_tokens)),
            )

    def _next_token(
        self, contexts: Contexts, token: int, max_tokens: int, choice: TokenChoice, generator: torch.Generator
    ) -> NextToken:
        """What appends `token` and goes on: a captured graph where that can be and pays, else the ordinary forward."""
        bagel, view = self.model.bagel, contexts.full
        self._capture_short_passes()
        kernels = self.model.step_kernels
        if max_tokens >= GRAPH_PAYS_FROM and kernels is not None and why_not_graph(bagel, view) is None:
            try:
                return GraphNextToken(TokenStep(bagel, view, kernels), choice, generator, token, self._refuse_graph)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._refuse_graph(error)
        return EagerNextToken(bagel, view, self.model.attention, choice, generator)

    def _capture_short_passes(self) -> None:
        """Where contexts are kept, questions repeat: those like this one are captured, if that can be."""
        model = self.model
        if model.short_passes is None or model.context_store is None or model.step_kernels is None:
            return
        try:
            model.short_passes.capture(model.step_kernels.memory)
        except RuntimeError as error:  # for lack of memory too: the answer goes on without
            model.short_passes = None
            model.note("questions by graph", f"cannot be captured: {first_line(error)}")

    def _refuse_graph(self, error: RuntimeError) -> None:
        self.model.refuse_graph(f"cannot be captured: {first_line(error)}")

    def _text_block(self, text: str) -> TextBlock:
        return TextBlock(tuple(self.model.tokenizer.text_block(text)))

    def _record(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What a saved picture remembers of its making."""
        from .. import __version__

        prompt = "\n".join(term for term in self.terms if isinstance(term, str))
        plan, reading = self.model.plan, self.model.folder.reading.to_json()
        others = {card.model.plan.device: card.model.folder.format for card in self.model.others.values()}
        mixed = any(other != self.model.folder.format for other in others.values())
        return {
            "prompt": prompt,
            **settings,
            "model": self.model.folder.path.name,
            "format": self.model.folder.format,
            **({"formats of other cards": others} if mixed else {}),
            **({"reading": reading} if reading else {}),
            "dtype": plan.dtype,
            "attention": self.model.attention.name,
            "version": __version__,
            **({"notes": self.notes} if self.notes else {}),
        }


def report(callback: Callback | None, event: object) -> None:
    """Raises Cancelled where the callback returns False."""
    if callback is not None and callback(event) is False:
        raise Cancelled("stopped by the callback")


@contextmanager
def memory_returned(device: torch.device, blocks: Sequence[Block]) -> Iterator[None]:
    """What torch keeps of freed memory goes back to the card before and after pictures are encoded: the encoders'
    activations fit badly between those of a step, and torch would hold both sizes."""
    pictured = device.type == "cuda" and any(isinstance(block, PictureBlock) for block in blocks)
    if pictured:
        empty_cache()
    yield
    if pictured:
        empty_cache()

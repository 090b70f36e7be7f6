"""One request carried out: from the blocks of its terms to a picture or an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import Cancelled, first_line
from ..model.vision import unpatchify
from ..ops.device import empty_cache
from ..runtime.loaded import LoadedModel
from ..sampling.denoise import Step
from ..sampling.text import EagerNextToken, NextToken, Started, TokenChoice, decode_text
from ..sampling.text_graph import GraphNextToken, TokenStep, why_not_graph
from ..settings import PictureSettings, TextSettings
from .drawing import guidance_of, latent_grid, picture_sampler
from .images import from_pixels
from .inputs import MARKERS, Block, Contexts, PictureBlock, Term, TextBlock
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


Callback = Callable[[Step | Token], object]
"""Called after every sampling step and every generated token; returning False stops the request (`Cancelled`)."""


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
            ids = self._decode(contexts, started, settings.max_new_tokens, choice, generator)
        text = self.model.tokenizer.decode_generated(ids)
        return Result(None, text, settings.seed, None, ids, stats, self._record(settings.to_json()))

    def draw(self, blocks: list[Block], settings: PictureSettings) -> Result:
        """A picture after the blocks; think first where the settings say so."""
        model = self.model
        stats, generator = Stats(model.bagel.device), torch.Generator().manual_seed(settings.seed)
        guidance = guidance_of(settings)
        rows, columns = latent_grid(model.folder.config, blocks, settings)
        if self.callback is not None and "vae" in model.staged:
            # What previews need of the autoencoder is found here, where the plan has room for it: between steps,
            # beside all the keys, it may have none, and a step would wait for the copy.
            _ = model.colors
        system = [self._text_block(THINK_BEFORE_DRAWING)] if settings.think else []
        with stats.phase("prefill"), _memory_returned(model.bagel.device, blocks):
            contexts = Contexts(
                model,
                [*system, *blocks],
                rows * columns + MARKERS,
                guidance.uses_image_branch,
                spare=settings.max_think_tokens if settings.think else 0,
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
                ids = self._decode(contexts, contexts.start(), settings.max_think_tokens, TokenChoice(), generator)
                contexts.full.drop_after(length, position)
                text = model.tokenizer.decode_generated(ids)
                contexts.append_thoughts(self._text_block(text))
        with stats.phase("denoise"):
            sampler = picture_sampler(model, contexts, settings, (rows, columns))
            noise = torch.randn(rows * columns, model.folder.config.latent_values, generator=generator)
            latent = sampler.run(
                noise,
                settings.num_timesteps,
                settings.timestep_shift,
                lambda step: report(self.callback, step),
                partial(self._preview, rows, columns),
            )
        evaluations, computed = sampler.evaluations, sampler.computed
        del contexts, sampler  # their memory is the decoder's to use
        with stats.phase("decode"):
            image = from_pixels(self._pixels(latent, rows, columns))
        side = model.folder.config.token_pixels
        used = settings.to_json() | {"height": rows * side, "width": columns * side}
        if settings.step_cache != "none":
            used |= {"evaluations": evaluations, "evaluations_computed": computed}
        return Result(image, text, settings.seed, latent.cpu(), ids, stats, self._record(used))

    @torch.inference_mode()
    def _preview(self, rows: int, columns: int, latent: Tensor) -> Image.Image:
        z = unpatchify(latent, rows, columns, self.model.folder.config.latent_patch)
        return from_pixels(self.model.colors(z))

    def _pixels(self, latent: Tensor, rows: int, columns: int) -> Tensor:
        vae = self.model.vae
        assert vae is not None
        z = unpatchify(latent, rows, columns, self.model.folder.config.latent_patch)
        with self.model.using("vae"):
            weight = vae.decoder.conv_in.weight
            return vae.decode(z[None].to(weight.device, weight.dtype))[0]

    def _decode(
        self,
        contexts: Contexts,
        started: Tensor,
        max_tokens: int,
        choice: TokenChoice,
        generator: torch.Generator,
    ) -> list[int]:
        """Text after the contexts and the start token, whose hidden state is `started`."""
        tokenizer, bagel = self.model.tokenizer, self.model.bagel
        with self.model.using("lm_head"):
            return decode_text(
                Started(
                    lambda: choice(bagel.logits(started)[0, 0], generator),
                    lambda token: self._next_token(contexts, token, max_tokens, choice, generator),
                ),
                tokenizer.im_start,
                tokenizer.im_end,
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
        return {
            "prompt": prompt,
            **settings,
            "model": self.model.folder.path.name,
            "format": self.model.folder.format,
            **({"reading": reading} if reading else {}),
            "dtype": plan.dtype,
            "attention": self.model.attention.name,
            "version": __version__,
            **({"notes": self.notes} if self.notes else {}),
        }


def report(callback: Callback | None, event: Step | Token) -> None:
    """Raises Cancelled where the callback returns False."""
    if callback is not None and callback(event) is False:
        raise Cancelled("stopped by the callback")


@contextmanager
def _memory_returned(device: torch.device, blocks: Sequence[Block]) -> Iterator[None]:
    """What torch keeps of freed memory goes back to the card before and after pictures are encoded: the encoders'
    activations fit badly between those of a step, and torch would hold both sizes."""
    pictured = device.type == "cuda" and any(isinstance(block, PictureBlock) for block in blocks)
    if pictured:
        empty_cache()
    yield
    if pictured:
        empty_cache()

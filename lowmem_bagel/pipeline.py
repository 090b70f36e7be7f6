"""Requests to results: the public face of the package."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor

from .errors import Cancelled, DoesNotFitError, SettingError
from .folder import ModelFolder
from .images import from_pixels
from .loader import LoadedModel, Progress, load
from .model.vision import unpatchify
from .plan import OFFLOADS, TASKS, Offload, Plan, Task
from .planner import make_plan
from .planning import LoadOptions, plan_inputs
from .request import MARKERS, Block, Contexts, PictureBlock, TextBlock, read_terms
from .results import Result, Stats
from .sampling.guidance import Guidance
from .sampling.picture import PictureSampler
from .sampling.picture import Step as SamplingStep
from .sampling.step_cache import step_caches
from .sampling.text import EagerNextToken, NextToken, TokenChoice, decode_text
from .sampling.text_graph import GraphNextToken, Step, why_not_graph
from .settings import PictureSettings, TextSettings, picture_settings, text_settings

if TYPE_CHECKING:
    from PIL import Image

    from .request import Term

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


DEMOTIONS = 6
"""Times that a request is begun again with fewer resident weights."""
DEMOTED_BYTES = 1_000_000_000
"""Freed each time."""


class Token:
    """One generated token, as a callback sees it: `index` counts from 1, `total` is the limit."""

    def __init__(self, id: int, index: int, total: int) -> None:
        self.id, self.index, self.total = id, index, total


Callback = Callable[[SamplingStep | Token], object]
"""Called after every sampling step and every generated token; returning False stops the request (`Cancelled`)."""


class BagelPipeline:
    """BAGEL, loaded and ready: draws, edits and answers. Make one with `from_pretrained`."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        attention: str = "auto",
        offload: Offload = "native",
        max_vram: str | float | None = None,
        max_ram: str | float | None = None,
        tasks: Sequence[Task] = TASKS,
        step_cache: str = "none",
        size: tuple[int, int] = (1024, 1024),
        progress: Progress | None = None,
    ) -> BagelPipeline:
        """Load a source checkpoint or a variant folder.

        Args:
            path: the folder.
            device: "auto", "cpu" or a CUDA device such as "cuda:0".
            dtype: of the arithmetic: "auto", "float32", "bfloat16" or "float16".
            backend: what runs quantised linears: "auto" or one of those able to run the folder's format.
            attention: "auto" or an attention backend's name.
            offload: what moves weights that do not stay on the device: "native", or "accelerate" to compare with it.
            max_vram: limit on device memory, such as "8GB" or a number of bytes.
            max_ram: limit on host memory, likewise.
            tasks: what the pipeline will be used for; weights that none of them needs are not loaded.
            step_cache: the `step_cache` that pictures will be drawn with, whose memory is then planned for. A request
                may always use another: should its cache find no memory left, more of the weights stream.
            size: height and width of the largest picture to come, likewise.
            progress: called with bytes loaded and bytes in all.

        Raises:
            CheckpointError, ConfigError: the folder is not a usable checkpoint.
            SettingError: an impossible device, dtype, backend, attention or step cache.
        """
        return cls.from_folder(
            ModelFolder.open(Path(path)),
            device=device,
            dtype=dtype,
            backend=backend,
            attention=attention,
            offload=offload,
            max_vram=max_vram,
            max_ram=max_ram,
            tasks=tasks,
            step_cache=step_cache,
            size=size,
            progress=progress,
        )

    @classmethod
    def from_folder(
        cls,
        folder: ModelFolder,
        *,
        offload: Offload = "native",
        progress: Progress | None = None,
        **options: Unpack[LoadOptions],
    ) -> BagelPipeline:
        """Load an opened folder; otherwise as `from_pretrained`."""
        inputs = plan_inputs(folder, **options)
        return cls(load(folder, _offloaded(make_plan(*inputs), offload), progress))

    def close(self) -> None:
        """Give all memory back. The pipeline cannot be used afterwards."""
        self.model.close()

    def generate(self, prompt: str, *, callback: Callback | None = None, **settings: Any) -> Result:
        """Draw a picture from a prompt.

        Settings: height and width (pixels), seed, num_timesteps, timestep_shift, cfg_text_scale, cfg_img_scale,
        cfg_interval, cfg_renorm_type, cfg_renorm_min, think, max_think_tokens, step_cache, step_cache_threshold.

        Raises:
            SettingError: an impossible setting or an empty prompt.
            Cancelled: the callback returned False.
        """
        return self.run([prompt], output="image", callback=callback, **settings)

    def edit(
        self,
        image: Image.Image | os.PathLike[str] | str,
        prompt: str,
        *,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Result:
        """Change a picture as the prompt says. Settings as for `generate`, with the defaults of editing.

        Raises:
            ImageError: the picture cannot be used.
            SettingError, Cancelled: as for `generate`.
        """
        return self.run([_picture(image), prompt], output="image", callback=callback, **settings)

    def ask(
        self,
        prompt: str,
        image: Image.Image | os.PathLike[str] | str | None = None,
        *,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Result:
        """Answer a question, about a picture where one is given.

        Settings: max_new_tokens, do_sample, temperature, top_p, seed, think.

        Raises:
            ImageError: the picture cannot be used.
            SettingError, Cancelled: as for `generate`.
        """
        terms = [prompt] if image is None else [_picture(image), prompt]
        return self.run(terms, output="text", callback=callback, **settings)

    def run(
        self,
        terms: Sequence[Term],
        *,
        output: Literal["image", "text"] = "image",
        callback: Callback | None = None,
        **settings: Any,
    ) -> Result:
        """Run any interleaving of texts (str) and pictures (PIL images or paths as os.PathLike).

        Args:
            output: "image" draws after the terms, with the settings of `generate`; "text" answers, with those of
                `ask`.
            callback: gets every sampling step and every generated token; see `Callback`.
        """
        if output not in ("image", "text"):
            raise SettingError(f"unknown output {output!r}; choose image or text")
        config, tokenizer = self.model.folder.config, self.model.tokenizer
        self._check_task(output, any(not isinstance(term, str) for term in terms))
        pictured = any(not isinstance(term, str) for term in terms)
        if output == "text":
            answer = text_settings(settings)
            return self._within_memory(
                lambda: self._answer(read_terms(terms, config, tokenizer, drawing=False), answer, terms, callback)
            )
        max_side = self.model.bagel.latent_side * config.token_pixels
        drawing = picture_settings(config, max_side, pictured, settings, _warn)
        return self._within_memory(
            lambda: self._draw(read_terms(terms, config, tokenizer, drawing=True), drawing, terms, callback)
        )

    @torch.inference_mode()
    def _within_memory(self, request: Callable[[], Result]) -> Result:
        """Run a request; where the device's memory runs out, stream more units and begin it again.

        A request is determined by its seed, so beginning again changes nothing but the time.

        Raises:
            DoesNotFitError: nothing is left to stream.
        """
        for _ in range(DEMOTIONS):
            try:
                return request()
            except torch.OutOfMemoryError as error:
                found = str(error).split(". ")[0]
            # Outside the handler, whose traceback would keep the failed request's tensors alive.
            freed = self.model.lower_residency(DEMOTED_BYTES)
            if not freed:
                break
            _warn(f"the device's memory ran out ({found}); streaming {freed / 1e9:.1f} GB more of the weights")
        raise DoesNotFitError(self.model.out_of_memory())

    def _check_task(self, output: str, pictured: bool) -> None:
        task = "ask" if output == "text" else "edit" if pictured else "generate"
        if task not in self.model.plan.tasks:
            loaded = ", ".join(self.model.plan.tasks)
            raise SettingError(f"this pipeline was loaded for {loaded} only; load it with tasks that include {task!r}")

    def _answer(
        self, blocks: list[Block], settings: TextSettings, terms: Sequence[Term], callback: Callback | None
    ) -> Result:
        stats, generator = Stats(self.model.bagel.device), torch.Generator().manual_seed(settings.seed)
        if settings.think:
            blocks.insert(0, self._text_block(THINK_BEFORE_ANSWERING))
        with stats.phase("prefill"):
            contexts = Contexts(self.model, blocks, 0, image_branch=False, spare=settings.max_new_tokens)
            for block in blocks:
                contexts.append(block, generator)
        with stats.phase("answer"):
            choice = TokenChoice(settings.do_sample, settings.temperature, settings.top_p)
            ids = self._decode(contexts, settings.max_new_tokens, choice, generator, callback)
        text = self.model.tokenizer.decode_generated(ids)
        return Result(None, text, settings.seed, None, ids, stats, self._record(terms, settings.to_json()))

    def _draw(
        self, blocks: list[Block], settings: PictureSettings, terms: Sequence[Term], callback: Callback | None
    ) -> Result:
        model = self.model
        stats, generator = Stats(model.bagel.device), torch.Generator().manual_seed(settings.seed)
        guidance = Guidance(
            settings.cfg_text_scale,
            settings.cfg_img_scale,
            settings.cfg_interval,
            settings.cfg_renorm_type,
            settings.cfg_renorm_min,
        )
        rows, columns = self._grid(blocks, settings)
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
                ids = self._decode(contexts, settings.max_think_tokens, TokenChoice(), generator, callback)
                contexts.full.drop_after(length, position)
                text = model.tokenizer.decode_generated(ids)
                contexts.append_plan(self._text_block(text))
        with stats.phase("denoise"):
            sampler = PictureSampler(
                model.bagel,
                model.attention,
                contexts.branches(),
                guidance,
                (model.tokenizer.vision_start, model.tokenizer.vision_end),
                contexts.scratch,
                (rows, columns),
                step_caches(settings.step_cache, settings.step_cache_threshold),
                model.plan.guidance_batch,
            )
            noise = torch.randn(rows * columns, model.folder.config.latent_values, generator=generator)
            latent = sampler.run(
                noise, settings.num_timesteps, settings.timestep_shift, lambda step: _report(callback, step)
            )
        evaluations, computed = sampler.evaluations, sampler.computed
        del contexts, sampler  # their memory is the decoder's to use
        with stats.phase("decode"):
            image = from_pixels(self._pixels(latent, rows, columns))
        side = model.folder.config.token_pixels
        used = settings.to_json() | {"height": rows * side, "width": columns * side}
        if settings.step_cache != "none":
            used |= {"evaluations": evaluations, "evaluations_computed": computed}
        return Result(image, text, settings.seed, latent.cpu(), ids, stats, self._record(terms, used))

    def _grid(self, blocks: Sequence[Block], settings: PictureSettings) -> tuple[int, int]:
        """Rows and columns of latent tokens: the size asked for, or else the last input picture's."""
        side = self.model.folder.config.token_pixels
        rows, columns = next(
            (block.latent_grid for block in reversed(blocks) if isinstance(block, PictureBlock)), (0, 0)
        )
        return (
            settings.height // side if settings.height else rows,
            settings.width // side if settings.width else columns,
        )

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
        max_tokens: int,
        choice: TokenChoice,
        generator: torch.Generator,
        callback: Callback | None,
    ) -> list[int]:
        tokenizer = self.model.tokenizer
        with self.model.using("lm_head"):
            return decode_text(
                self._next_token(contexts, max_tokens, choice, generator),
                tokenizer.im_start,
                tokenizer.im_end,
                max_tokens,
                lambda id, index: _report(callback, Token(id, index, max_tokens)),
            )

    def _next_token(
        self, contexts: Contexts, max_tokens: int, choice: TokenChoice, generator: torch.Generator
    ) -> NextToken:
        """By a captured graph where that can be and pays, else by the ordinary forward."""
        bagel, context = self.model.bagel, contexts.full
        kernels = self.model.step_kernels
        if max_tokens >= GRAPH_PAYS_FROM and kernels is not None and why_not_graph(bagel, context) is None:
            return GraphNextToken(Step(bagel, context, kernels), choice, generator)
        return EagerNextToken(bagel, context, self.model.attention, choice, generator)

    def _text_block(self, text: str) -> TextBlock:
        return TextBlock(tuple(self.model.tokenizer.text_block(text)))

    def _record(self, terms: Sequence[Term], settings: dict[str, Any]) -> dict[str, Any]:
        """What a saved picture remembers of its making."""
        from . import __version__

        prompt = "\n".join(term for term in terms if isinstance(term, str))
        plan = self.model.plan
        return {
            "prompt": prompt,
            **settings,
            "model": self.model.folder.path.name,
            "format": self.model.folder.format,
            "dtype": plan.dtype,
            "attention": self.model.attention.name,
            "version": __version__,
        }


def _offloaded(plan: Plan, offload: Offload) -> Plan:
    if offload not in OFFLOADS:
        raise SettingError(f"unknown offload {offload!r}; choose one of {', '.join(OFFLOADS)}")
    if offload == "native":
        return plan
    why = "asked for; placed as for native streaming, whose time is not predicted for it"
    return replace(plan, offload=offload, prediction=None, reasons=plan.reasons | {"offload": why})


def _picture(image: Image.Image | os.PathLike[str] | str) -> Image.Image | os.PathLike[str]:
    return Path(image) if isinstance(image, str) else image


def _report(callback: Callback | None, event: SamplingStep | Token) -> None:
    if callback is not None and callback(event) is False:
        raise Cancelled("stopped by the callback")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)


@contextmanager
def _memory_returned(device: torch.device, blocks: Sequence[Block]) -> Iterator[None]:
    """What torch keeps of freed memory goes back to the card before and after pictures are encoded: the encoders'
    activations fit badly between those of a step, and torch would hold both sizes."""
    pictured = device.type == "cuda" and any(isinstance(block, PictureBlock) for block in blocks)
    if pictured:
        torch.cuda.empty_cache()
    yield
    if pictured:
        torch.cuda.empty_cache()

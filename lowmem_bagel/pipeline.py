"""Requests to results: the public face of the package."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .checkpoint.check_tensors import check_request
from .checkpoint.folder import ModelFolder
from .errors import CheckpointError, PipelineClosedError, SettingError
from .generation.chat import Chat
from .generation.conversing import Answer, Outline
from .generation.executor import Callback, Execution
from .generation.images import decoded
from .generation.inputs import Prepared, open_terms, read_terms
from .generation.results import Result
from .pictures.callers import is_data_url
from .planner.estimate import PlanInputs, check_frames, check_rounds, plan_from, plan_inputs
from .planner.load_options import keywords_of
from .runtime.loaded import LoadedModel
from .runtime.loader import load_model
from .runtime.retrying import Carried, Retrying
from .settings import LoadOptions, TextSettings, check_prompt, is_on, of_turns, picture_settings, text_settings
from .timeline import Timeline
from .values import shown

if TYPE_CHECKING:
    from PIL import Image

    from .pictures.callers import PictureSource
    from .pictures.clips import Clip
    from .settings import PictureSettings


class BagelPipeline:
    """BAGEL, loaded and ready: draws, edits and answers. Make one with `from_pretrained`.

    It may be used from several threads: a request waits until the one before it is done.
    """

    def __init__(self, model: LoadedModel, inputs: PlanInputs | None = None) -> None:
        """With `inputs`, what the model's plan was made from, frames and answers that do not fit are refused
        beforehand."""
        self.model, self._inputs = model, inputs
        self._one_at_a_time = threading.Lock()
        self._thread: int | None = None
        """The thread whose request is being carried out."""
        self._closed = False

    @classmethod
    @keywords_of(LoadOptions)
    def from_pretrained(cls, path: str | os.PathLike[str], options: LoadOptions) -> BagelPipeline:
        """Load a source checkpoint or a variant folder.

        Args:
            path: the folder, or a file of weights in it.
            weights: which set of weights, where the folder holds several: the name of its file, or a path.
            base: the folder of the checkpoint that a fine-tune was made from, which completes what it lacks:
                configuration, tokenizer, VAE, vision tower, single tensors.
            lora: LoRA adapters as PEFT saves them, each a folder or "folder:weight", added in this order: into weights
                that are stored as floats, and beside encoded ones as a low-rank product.
            device: "auto", "cpu" or a CUDA device such as "cuda:1"; "cuda" is the first one, whichever is current.
            devices: several cards that share the work, such as "0,1"; the first is what `device` would be. The planner
                says who does what, and why; the results are those of one card, branch by branch, to the bit. With
                "0,1=FOLDER" the second card holds a variant of its own, made from the same checkpoint: a smaller one
                where the card is smaller. The results then depend on who does what.
            divide: what they share: "auto" for what pays, "guidance" or "layers" whether or not it does.
            dtype: of the arithmetic: "auto", "float32", "bfloat16" or "float16".
            backend: what runs quantised linears: "auto" or one of those able to run the folder's format.
            attention: "auto" or an attention backend's name.
            max_vram: limit on device memory, such as "8GB" or a number of bytes. PyTorch holds the process to it, and
                several pipelines on one card to the sum of theirs; one without a limit lifts it while it lives.
            max_ram: limit on host memory, likewise.
            tune: whether INT8's matmuls may be timed, for a few seconds, when a card runs them for the first time; what
                is found is kept in the user's cache folder. Results are the same to the bit.
            tasks: what the pipeline will be used for; weights that none of them needs are not loaded.
            step_cache: the `step_cache` that pictures will be drawn with, whose memory is then planned for. A request
                may always use another: should its cache find no memory left, more of the weights stream.
            speed: the same by what it is for: "exact", "balanced" or "fast".
            size: height and width of the largest picture to come, likewise.
            frames: how many of them the largest request draws, likewise.
            frame_mode: whether it draws them together or in turn.
            pictures: how many pictures the largest request is given, likewise.
            max_rounds: how many pictures an answer in texts and pictures (`converse`, `chat`) draws at most, likewise;
                None where there will be no such answers.
            max_new_tokens: how long each text of such an answer becomes, likewise.
            chat_turns: how many turns of a chat its contexts hold, likewise.
            context_store: memory that keeps what texts and pictures came to, so that those which repeat (a system
                prompt, a picture asked about twice) are not computed again: "auto" for some of what the plan leaves,
                off where that is little, or a size. The results are the same to the bit.
            progress: called with bytes loaded and bytes in all.
            others: those that `planner.load_options` lists, such as offload.

        Raises:
            CheckpointError, ConfigError: the folder is not a usable checkpoint.
            SettingError: an impossible device, dtype, backend, attention or step cache.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise CheckpointError(f"a model is a folder's path, not {type(path).__name__}")
        timeline = Timeline()
        with timeline.phase("opening"):
            folder = ModelFolder.open(Path(path), weights=options.weights, base=options.base, lora=options.lora)
        return cls._loaded(folder, options, timeline)

    @classmethod
    @keywords_of(LoadOptions)
    def from_folder(cls, folder: ModelFolder, options: LoadOptions) -> BagelPipeline:
        """Load an opened folder; otherwise as `from_pretrained`, but for weights, base and lora, which opened it."""
        if options.weights is not None or options.base is not None or options.lora:
            raise SettingError("the folder is open already; give weights, base and lora to ModelFolder.open")
        return cls._loaded(folder, options, Timeline())

    @classmethod
    def _loaded(cls, folder: ModelFolder, options: LoadOptions, timeline: Timeline) -> BagelPipeline:
        if "limits" in folder.reading.lines:
            _warn(folder.reading.lines["limits"])
        with timeline.phase("planning"):
            inputs = plan_inputs(folder, options)
            plan = plan_from(inputs, options)
        return cls(load_model(folder, plan, options.progress, timeline), inputs)

    def close(self) -> None:
        """Give all memory back, once no request runs. The pipeline cannot be used afterwards."""
        with suppress(PipelineClosedError), self._turn():
            self._closed = True
            self.model.forget_contexts()
            self.model.close()

    def generate(self, prompt: str, *, callback: Callback | None = None, **settings: Any) -> Result:
        """Draw a picture from a prompt.

        Settings: height and width (pixels), seed, num_timesteps, timestep_shift, cfg_text_scale, cfg_img_scale,
        cfg_interval, cfg_renorm_type, cfg_renorm_min, think, max_think_tokens, speed, step_cache, step_cache_threshold;
        frames, frame_mode and frame_delta for several pictures in one sequence, which are the result's `images`.

        Raises:
            SettingError: an impossible setting or an empty prompt.
            Cancelled: the callback returned False.
        """
        check_prompt(prompt)
        return self.run([prompt], output="image", callback=callback, **settings)

    def edit(
        self,
        image: PictureSource | Clip,
        prompt: str,
        *,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Result:
        """Change a picture as the prompt says. Settings as for `generate`, with the defaults of editing.

        Args:
            image: a path, a data: URL, bytes, a file object, a PIL image, an array (HxWx3 in uint8, or floats from 0 to
                1) or a tensor (so, or 3xHxW); or a `Clip` of several. What had to be assumed of it is warned of, and
                noted in the settings.

        Raises:
            ImageError: the picture cannot be used.
            SettingError, Cancelled: as for `generate`.
        """
        check_prompt(prompt)
        return self.run([_picture(image), prompt], output="image", callback=callback, **settings)

    def ask(
        self,
        prompt: str,
        image: PictureSource | Clip | None = None,
        *,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Result:
        """Answer a question, about a picture or a clip where one is given.

        Settings: max_new_tokens, do_sample, temperature, top_p, seed, think.

        Raises:
            ImageError: the picture cannot be used.
            SettingError, Cancelled: as for `generate`.
        """
        check_prompt(prompt)
        terms = [prompt] if image is None else [_picture(image), prompt]
        return self.run(terms, output="text", callback=callback, **settings)

    def run(
        self,
        terms: Iterable[str | PictureSource | Clip],
        *,
        output: Literal["image", "text"] = "image",
        callback: Callback | None = None,
        turns: Sequence[str] = (),
        **settings: Any,
    ) -> Result:
        """Run any interleaving of texts (str) and pictures.

        Args:
            terms: texts, and pictures as for `edit`; a path as os.PathLike, since a str is a text. A `Clip` stands for
                several pictures.
            output: "image" draws after the terms, with the settings of `generate`; "text" answers, with those of
                `ask`.
            turns: texts of frames in turn: each comes after the frame before and says what the next one is, so that
                there is one frame more than texts.
            callback: gets every sampling step and every generated token; see `Callback`.

        Raises:
            PipelineClosedError: the pipeline was closed, perhaps while this request waited for its turn.
        """
        if callback is not None and not callable(callback):
            raise SettingError(f"callback must be a function, not {type(callback).__name__}")
        prepared = self.prepare(terms, output=output, turns=turns, **settings)
        for note in prepared.notes:
            _warn(note)
        return self.carry_out(prepared, callback)

    def converse(
        self,
        terms: str | Iterable[str | PictureSource | Clip],
        *,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Answer:
        """Answer in texts and pictures: text until the model asks for a picture, the picture, and on.

        Each picture is drawn in the context so far and goes back into it through the encoders, so that what comes
        after it has seen it; nothing in the context is computed twice. Which words ask for a picture is said by
        `style`: see `checkpoint.answer_styles`.

        Args:
            terms: texts and pictures as of `run`, or one text.
            callback: gets every token, every sampling step, and every text and picture that is done.

        Settings: style, max_rounds; those of `ask`, for each text; those of `generate` or `edit`, for each picture.

        Raises:
            ImageError: a picture cannot be used.
            SettingError, Cancelled: as for `generate`.
        """
        return self._chat(settings, keeping=False).say(terms, callback=callback)

    def chat(self, **settings: Any) -> Chat:
        """A conversation whose every turn is as of `converse`, in the context of those before it, which is kept.

        Settings: as of `converse`, for all turns.

        Raises:
            SettingError: an impossible setting.
        """
        return self._chat(settings)

    def open_chat(self, path: str | os.PathLike[str]) -> Chat:
        """A conversation that `Chat.save` wrote, to go on with. Its contexts are made again with the next turn: to the
        same bits on the machine that it was saved on.

        Raises:
            ChatError: it is no saved chat, is damaged, or belongs to a model with other tokens.
        """
        from .generation.chat_file import read_chat

        saved = read_chat(path, self.model)
        chat = self._chat(saved.settings)
        chat.take_up(saved.turns)
        return chat

    def _chat(self, settings: dict[str, Any], keeping: bool = True) -> Chat:
        for output in ("text", "image"):
            self._check_task(output, pictured=True, think=False)
        return Chat(self.model, self._carried, self._check_rounds, _warn, settings, keeping)

    def _check_rounds(self, turn: Outline) -> None:
        """Raises DoesNotFitError for an answer that no placement of the model holds on this machine."""
        if self._inputs is not None:
            check_rounds(self.model.plan, self._inputs, turn)

    def _carried(self, request: Callable[[], Carried]) -> Carried:
        with self._turn():
            return self._carried_out(request)

    def prepare(
        self,
        terms: Iterable[str | PictureSource | Clip],
        *,
        output: Literal["image", "text"] = "image",
        turns: Sequence[str] = (),
        **settings: Any,
    ) -> Prepared:
        """Check a request whole, and open its pictures, without using the device: for those who queue requests.

        Raises:
            ImageError, SettingError, CheckpointError: as for `run`, which is this and then `carry_out`.
        """
        if not isinstance(output, str) or output not in ("image", "text"):
            raise SettingError(f"unknown output {shown(output)}; choose image or text")
        opened = open_terms(terms)
        pictured = any(not isinstance(term, str) for term in opened)
        self._check_task(output, pictured, is_on("think", settings))
        if output == "text":
            if turns:
                raise SettingError("turns are texts of frames that are drawn; leave them out for an answer")
            return Prepared(tuple(opened), text_settings(settings), ())
        changed: list[str] = []
        config = self.model.folder.config
        max_side = self.model.bagel.latent_side * config.token_pixels
        drawing = picture_settings(config, max_side, pictured, settings | of_turns(turns, settings), changed.append)
        prepared = Prepared(tuple(opened), drawing, tuple(changed), tuple(turns))
        self._check_frames(prepared, drawing)
        return prepared

    def _check_frames(self, prepared: Prepared, settings: PictureSettings) -> None:
        """Raises CheckpointError for frames in turn where the model cannot look at them, and DoesNotFitError for frames
        that no placement of the model holds on this machine."""
        if settings.frames > 1 and settings.frame_mode == "turn":
            check_request(self.model.lacking, "edit", True)
        if settings.frames == 1 or self._inputs is None:
            return
        tokens = sum(len(self.model.tokenizer.text_block(text)) for text in prepared.texts)
        check_frames(self.model.plan, self._inputs, settings, prepared.picture_sizes, tokens)

    def carry_out(self, prepared: Prepared, callback: Callback | None = None) -> Result:
        """Draw or answer what was prepared, when its turn has come.

        Raises:
            PipelineClosedError, DoesNotFitError, Cancelled: as for `run`.
        """
        execution, settings = Execution(self.model, prepared.terms, callback), prepared.settings
        with self._turn():
            blocks = partial(read_terms, prepared.terms, self.model.folder.config, self.model.tokenizer)
            if isinstance(settings, TextSettings):
                return self._carried_out(lambda: execution.answer(blocks(drawing=False), settings))
            return self._carried_out(lambda: execution.draw(blocks(drawing=True), settings, prepared.turns))

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of latents, float [N, z_channels, H / 8, W / 8], scaled as the sampler has them: of those that a
        result's `latent` holds, the result's pictures to the bit.

        Raises:
            SettingError: they are not this model's, or it was loaded without an autoencoder.
        """
        self._check_task("image", False, False)
        channels = self.model.folder.config.vae.z_channels
        if latents.dim() != 4 or latents.shape[1] != channels or not latents.numel():
            raise SettingError(f"latents of this model are [N, {channels}, H/8, W/8], not {list(latents.shape)}")
        with self._turn():
            return self._carried_out(lambda: [decoded(self.model, one) for one in latents])

    def lower_residency(self, nbytes: int) -> int:
        """Give back at least so much of the first card's memory, if that can be, when no request runs: kept contexts
        first, then units, which stream from then on. Returns the bytes that are free."""
        with self._turn():
            kept = self.model.forget_contexts()
            return kept + (self.model.lower_residency(nbytes - kept) if kept < nbytes else 0)

    def raise_residency(self, nbytes: int) -> int:
        """The opposite: units that stream from RAM stay on the first card again, as far as so many more bytes of it go.
        Returns the bytes that were taken."""
        with self._turn():
            return self.model.raise_residency(nbytes)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """What is done with the model, one after the other: all of it shares the model's memory and its device."""
        if self._thread == threading.get_ident():
            raise SettingError("a callback cannot use the pipeline that calls it; use it when the request is done")
        with self._one_at_a_time:
            if self._closed:
                raise PipelineClosedError("this pipeline was closed and its memory given back; load it again")
            self._thread = threading.get_ident()
            try:
                with self.model.on_device():
                    yield
            finally:
                self._thread = None

    def _carried_out(self, request: Callable[[], Carried]) -> Carried:
        return Retrying(self.model, _warn, self._lose)(request)

    def _lose(self) -> None:
        """Of the model too little is left to go on with."""
        self._closed = True
        self.model.close()

    def _check_task(self, output: str, pictured: bool, think: bool) -> None:
        task = "ask" if output == "text" else "edit" if pictured else "generate"
        check_request(self.model.lacking, task, pictured, think)
        if task not in self.model.plan.tasks:
            loaded = ", ".join(self.model.plan.tasks)
            raise SettingError(f"this pipeline was loaded for {loaded} only; load it with tasks that include {task!r}")


def _picture(image: PictureSource | Clip) -> PictureSource | Clip:
    """A str names a file here, unless it is a data: URL."""
    return Path(image) if isinstance(image, str) and not is_data_url(image) else image


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)

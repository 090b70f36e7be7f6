"""What routes and page talk to: takes requests in, says how far they are and how the model stands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..checkpoint.answer_styles import AUTO, BASE, STYLES, style_name
from ..errors import Cancelled, ChatError, DoesNotFitError, SettingError, UnavailableError, first_line
from ..pictures.callers import is_data_url
from ..planner.estimate import (
    answer_workload,
    conversation_workload,
    drawing_workload,
    plan_from,
    plan_inputs,
    predicted_seconds,
)
from ..planner.workload import Conversation
from ..settings import LoadOptions, TextSettings
from .jobs import Job
from .kept_chats import KeptChats
from .options import ServeOptions
from .queue import FairQueue, closed
from .worker import Worker

if TYPE_CHECKING:
    from ..checkpoint.folder import ModelFolder
    from ..generation.chat import Chat
    from ..generation.executor import Callback
    from ..generation.inputs import Prepared
    from ..pictures.callers import PictureSource
    from ..pipeline import BagelPipeline
    from ..planner.estimate import PlanInputs
    from ..planner.plan import Plan

Output = Literal["image", "text"]
MAX_PROMPT = 20_000
"""Characters of all texts of a request: 5000 tokens or so, and upstream was trained with far fewer."""
MAX_PICTURES = 8
"""Input pictures of a request."""
MAX_CHAT_PIXELS = 1 << 27
"""Of all pictures of a chat: 400 MB."""
KEPT_BYTES = 4 << 30
"""Of keys that chats keep between turns, beside those of the one that is answered."""
BYTES_A_TOKEN = 4
LOADING_SECONDS = 5.0
"""After which it is worth asking again whether the model is loaded."""


class Loaded(NamedTuple):
    """A pipeline and what its requests' seconds are predicted from."""

    pipeline: BagelPipeline
    inputs: PlanInputs

    @property
    def folder(self) -> ModelFolder:
        return self.pipeline.model.folder

    @property
    def plan(self) -> Plan:
        return self.pipeline.model.plan

    def seconds(self, prepared: Prepared) -> float:
        """What the plan says that a request takes."""
        settings, config = prepared.settings, self.folder.config
        tokens = sum(len(text.encode()) for text in prepared.texts) // BYTES_A_TOKEN + 8
        workload = (
            answer_workload(config, settings, prepared.picture_sizes, tokens)
            if isinstance(settings, TextSettings)
            else drawing_workload(config, settings, prepared.picture_sizes, tokens)
        )
        return sum(predicted_seconds(self.plan, self.inputs, workload).values())


class Outlook(NamedTuple):
    """A job's place: how many are done before it, and seconds until it is done itself."""

    ahead: int
    seconds: float


@dataclass
class Service:
    """A model behind a queue.

    Args:
        path: the model's folder or file.
        loading: how it is loaded.
        options: of the server.
        threads: of the processor, for arithmetic; None for PyTorch's choice.

    Attributes:
        name: of the model, as clients know it.
        loaded: the model, once it is; None before.
        failure: why there will be none.
        bytes_loaded: done and in all.
        when_loaded, when_failed: called when loading has ended so.
        ended: each is called with every job that was carried out.
    """

    path: Path
    loading: LoadOptions
    options: ServeOptions
    threads: int | None = None
    loaded: Loaded | None = None
    failure: BaseException | None = None
    bytes_loaded: tuple[int, int] = (0, 0)
    when_loaded: Callable[[], None] = lambda: None
    when_failed: Callable[[], None] = lambda: None
    ended: list[Callable[[Job], None]] = field(default_factory=list)
    closing: bool = False

    def __post_init__(self) -> None:
        self.name = self.path.name or "bagel"
        self.queue = FairQueue(self.options.queue)
        self._kept_chats = KeptChats(KEPT_BYTES)
        self._opening = threading.Lock()
        self._inputs: PlanInputs | None = None
        self.worker = Worker(
            self._load, self._is_loaded, self._has_failed, self._has_ended, self.queue, self.options.time_limit
        )

    def start(self) -> None:
        """Begin to load; requests are taken in when that is done."""
        self.worker.start()

    def submit(
        self,
        terms: Iterable[str | PictureSource],
        output: Output,
        settings: Mapping[str, Any],
        client: str,
        previews: bool = False,
    ) -> Job:
        """Check a request and let it wait for its turn. Pictures are decoded here: not for an event loop.

        Args:
            terms: texts, and pictures as bytes, data: URLs or PIL images: a path would reach the server's files.
            settings: of `BagelPipeline.generate`, `edit` or `ask`.
            client: who asks; clients take turns.

        Raises:
            BusyError: the model is loading, the queue is full, or the server is closing.
            UserError: the request is impossible.
        """
        loaded = self.ready()
        self.queue.check_room(self.worker.seconds_left())
        from ..generation.inputs import to_wait  # which needs torch: it is there when a model is, and not before

        terms = list(terms)
        check_bounds(terms)
        prepared = loaded.pipeline.prepare(terms, output=output, **settings)
        prepared = replace(prepared, terms=to_wait(prepared.terms, loaded.folder.config))
        job = Job(prepared, client, loaded.seconds(prepared), previews)
        self.queue.put(job, self.worker.seconds_left())
        return job

    def chat(self, settings: Mapping[str, Any]) -> Chat:
        """A chat with these settings, for `say`. Raises what `ready` and `BagelPipeline.chat` do."""
        return self.ready().pipeline.chat(**settings)

    def open_chat(self, path: Path) -> Chat:
        """A chat that was saved. Raises what `ready` and `BagelPipeline.open_chat` do; ChatError for a large one."""
        with self._opening:  # one may take most of two gigabytes
            chat = self.ready().pipeline.open_chat(path)
            if chat.pixels > MAX_CHAT_PIXELS:
                raise ChatError(f"the pictures of this chat have {chat.pixels:,} pixels; {MAX_CHAT_PIXELS:,} are taken")
        return chat

    def say(
        self,
        chat: Chat,
        terms: Iterable[str | PictureSource],
        settings: Mapping[str, Any],
        client: str,
        previews: bool = False,
    ) -> Job:
        """Check a turn of a chat, which waits for no other turn, and let it wait for its own; otherwise as `submit`."""
        loaded = self.ready()
        self.queue.check_room(self.worker.seconds_left())
        from ..generation.inputs import to_wait

        terms = list(terms)
        check_bounds(terms)
        if chat.pixels > MAX_CHAT_PIXELS:
            raise SettingError("this chat holds as many pictures as a chat may here; begin another one")
        prepared = chat.prepare(terms, **settings)
        prepared = replace(prepared, terms=to_wait(prepared.terms, loaded.folder.config))
        seconds = sum(predicted_seconds(loaded.plan, loaded.inputs, conversation_workload(prepared.outline)).values())

        def work(job: Job, _: BagelPipeline, callback: Callback) -> Mapping[str, Any]:
            self._kept_chats.make_room(chat)
            return {"answer": chat.carry_out(prepared, callback), "text": ""}

        job = Job(prepared, client, seconds, previews, work)
        self.queue.put(job, self.worker.seconds_left())
        return job

    def ready(self) -> Loaded:
        """The model. Raises UnavailableError where it is not there."""
        if self.failure is not None or self.closing:
            raise closed()
        if self.loaded is None:
            done, total = self.bytes_loaded
            share = f" ({done / total:.0%})" if total else ""
            raise UnavailableError(f"the model is loading{share}; ask again in some seconds", LOADING_SECONDS)
        return self.loaded

    def outlook(self, job: Job) -> Outlook | None:
        """Where a job stands in the queue; None where it is over."""
        progress = job.progress
        if progress.over:
            return None
        own = self.worker.pace.factor * job.predicted
        if progress.state == "running":
            return Outlook(0, own if progress.seconds_left is None else progress.seconds_left)
        before: list[Job] = []
        for waiting in self.queue.order():
            if waiting is job:
                break
            before.append(waiting)
        running = self.worker.running is not None
        seconds = self.worker.seconds_left() + self.worker.pace.factor * sum(other.predicted for other in before)
        return Outlook(len(before) + running, seconds + own)

    def cancel(self, job: Job, why: BaseException | None = None) -> None:
        """End a job: at once where it waits, at its next step where it runs. Nothing happens where it is over."""
        why = why or Cancelled("cancelled by the client")
        job.stop(why)
        if self.queue.remove(job):
            job.fail(why)
            self._has_ended(job)

    def close(self, finish: bool = True, timeout: float | None = None) -> None:
        """Take nothing more in; refuse who waits; finish what runs, or stop it; give the memory back."""
        self.closing = True
        for job in self.queue.close():
            job.fail(closed())
            self._has_ended(job)
        if not finish:
            self.stop_running()
        if self.worker.ident is not None:
            self.worker.join(timeout)

    def stop_running(self) -> None:
        """End what runs at its next step."""
        running = self.worker.running
        if running is not None:
            running.stop(closed())

    def open_folder(self) -> ModelFolder:
        """What is loaded."""
        from ..checkpoint.folder import ModelFolder

        options = self.loading
        return ModelFolder.open(self.path, weights=options.weights, base=options.base, lora=options.lora)

    def _load(self) -> BagelPipeline:
        import torch

        from ..pipeline import BagelPipeline
        from ..runtime.loader import load_model

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        options = replace(self.loading, progress=self._bytes)
        folder = self.open_folder()
        self._inputs, plan = planned(folder, options)
        return BagelPipeline(load_model(folder, plan, options.progress), self._inputs)

    def _bytes(self, done: int, total: int) -> None:
        if self.closing:
            raise Cancelled("the server is shutting down")
        self.bytes_loaded = (done, total)
        if self.loading.progress is not None:
            self.loading.progress(done, total)

    def _is_loaded(self, pipeline: BagelPipeline) -> None:
        assert self._inputs is not None
        self.loaded = Loaded(pipeline, self._inputs)
        self.when_loaded()

    def _has_failed(self, error: BaseException) -> None:
        self.failure = error
        self.queue.close()
        self.when_failed()

    def _has_ended(self, job: Job) -> None:
        for told in self.ended:
            told(job)


def planned(folder: ModelFolder, options: LoadOptions) -> tuple[PlanInputs, Plan]:
    """With room for a chat's turn where the model is of a family that draws in its answers, if that can be."""
    inputs = plan_inputs(folder, options)
    style = style_name(AUTO, folder.names)
    if options.max_rounds is None and style != BASE and {"edit", "ask"} <= {*inputs.request.tasks}:
        talk = Conversation(STYLES[style].rounds, options.max_new_tokens, options.chat_turns)
        with_talk = inputs._replace(request=replace(inputs.request, conversation=talk))
        try:
            return with_talk, plan_from(with_talk, options)
        except DoesNotFitError as error:
            plan = plan_from(inputs, options)
            return inputs, replace(plan, reasons={**plan.reasons, "chats": f"not planned for: {first_line(error)}"})
    return inputs, plan_from(inputs, options)


def check_bounds(terms: list[Any]) -> None:
    """Refuse what no honest request holds, before anything is decoded.

    Raises:
        SettingError: too much text, or too many pictures.
    """
    texts = [term for term in terms if isinstance(term, str) and not is_data_url(term)]
    written = sum(map(len, texts))
    if written > MAX_PROMPT:
        raise SettingError(f"the prompt has {written:,} characters; this server takes {MAX_PROMPT:,}")
    if len(terms) - len(texts) > MAX_PICTURES:
        raise SettingError(f"{len(terms) - len(texts)} pictures; this server takes {MAX_PICTURES} a request")

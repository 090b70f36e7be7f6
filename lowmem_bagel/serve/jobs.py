"""One request on its way: what it is, how far it is, and who wants to know."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image

    from ..generation.chat import PreparedTurn
    from ..generation.conversing import Answer, Piece
    from ..generation.executor import Callback
    from ..generation.inputs import Prepared
    from ..generation.results import Result
    from ..pipeline import BagelPipeline

State = Literal["waiting", "running", "done", "failed"]


@dataclass(frozen=True)
class Progress:
    """How far a job is. Each is whole in itself: who reads slowly misses some, and never the last.

    Attributes:
        version: grows with every change.
        step, steps: finished steps of the picture, and all of them; 0 before the first.
        seconds_left: until the picture or the answer is there, by what was predicted and what was seen since.
        text: the answer so far, or the plan; of a chat's turn the text that is being written.
        pieces: texts and pictures of a chat's turn that are done.
        preview: the picture as it forms, small; None where none was made yet.
        result, answer: where `state` is done; the latter of a chat's turn.
        error: where it is failed; `Cancelled` where somebody asked for that.
    """

    version: int = 0
    state: State = "waiting"
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    text: str = ""
    preview: Image.Image | None = None
    pieces: Sequence[Piece] = ()
    result: Result | None = None
    answer: Answer | None = None
    error: BaseException | None = None

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed")


def _by_pipeline(job: Job, pipeline: BagelPipeline, callback: Callback) -> Mapping[str, Any]:
    result = pipeline.carry_out(job.request, callback)
    return {"result": result, "text": result.text}


@dataclass(eq=False)
class Job:
    """A prepared request of a client, and its progress, which any thread or event loop may wait for.

    Attributes:
        client: whose turn it takes in the queue.
        predicted: seconds that it will take by the plan.
        previews: whether its pictures are shown as they form.
        work: carries it out; returns what is to be said of it then.
        created, started, ended: by `time.monotonic`.
    """

    prepared: Prepared | PreparedTurn
    client: str
    predicted: float
    previews: bool = False
    work: Callable[[Job, BagelPipeline, Callback], Mapping[str, Any]] = _by_pipeline
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None
    progress: Progress = field(default_factory=Progress)
    _stop: BaseException | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = field(default_factory=list)

    @property
    def request(self) -> Prepared:
        """What was prepared, where it is no chat's turn."""
        from ..generation.inputs import Prepared

        assert isinstance(self.prepared, Prepared)
        return self.prepared

    def update(self, **changes: Any) -> None:
        """Replace the progress and wake who waits for it. What is over does not change any more."""
        with self._changed:
            if self.progress.over:
                return
            self.progress = replace(self.progress, version=self.progress.version + 1, **changes)
            if self.progress.over:
                self.ended = time.monotonic()
            self._changed.notify_all()
            woken, self._waiting = self._waiting, []
        for loop, future in woken:
            wake(loop, future)

    def fail(self, error: BaseException) -> None:
        """End it with an error, without the traceback, which would keep the failed request's tensors alive."""
        self.update(state="failed", seconds_left=None, preview=None, error=error.with_traceback(None))

    def stop(self, why: BaseException) -> None:
        """Ask for its end, which comes at its next step or token; the first reason counts."""
        self._stop = self._stop or why

    @property
    def stopped(self) -> BaseException | None:
        """Why it is to end, if it is."""
        return self._stop

    def wait(self, seen: int = -1, timeout: float | None = None) -> Progress:
        """The progress, once it is newer than version `seen` or over, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.progress.version > seen or self.progress.over, timeout)
            return self.progress

    async def changed(self, seen: int = -1) -> Progress:
        """The progress, once it is newer than version `seen` or over; takes no thread while it waits."""
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self.progress.version > seen or self.progress.over:
                    return self.progress
                future: asyncio.Future[None] = loop.create_future()
                self._waiting.append((loop, future))
            try:
                await future
            finally:
                with self._changed:
                    self._waiting = [entry for entry in self._waiting if entry[1] is not future]


def wake(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    """Resolve a future of another thread's loop; one whose loop has ended waits for nothing any more."""

    def resolve() -> None:
        if not future.done():
            future.set_result(None)

    if not loop.is_closed():
        loop.call_soon_threadsafe(resolve)

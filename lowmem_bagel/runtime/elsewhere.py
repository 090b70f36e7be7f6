"""A card beside the first: who launches on it, the way there and back, and branches that it evaluates.

Launches return at once, so the thread of the request makes them on every card, one after the other: two threads of one
process hand Python's lock to and fro at each of them. What keeps its thread waiting is launched by the card's own, so
that neither card waits for the other's host work. Whatever crosses is queued by the thread of the request in any case,
so that it lies where that thread wants it among its own work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import first_line
from ..model.bagel import Bagel
from ..model.decoder import LayerSource
from ..model.kv_cache import Excerpt, KVCache, SequenceView
from ..ops.attention.base import AttentionBackend, Mask
from ..ops.device import on
from ..ops.exchange import Bridge, Mark, OutOfMemoryOn, memory_of, route_between
from ..sampling.evaluating import Evaluator
from ..sampling.frames import Frames
from ..sampling.pass_graphs import PassGraphs
from ..sampling.step_caches.base import BranchCache, Predicted

T = TypeVar("T")


class Launch(Protocol):
    """Has work done that launches on a card; its result may raise OutOfMemoryOn and CardFailed beside its own."""

    def __call__(self, work: Callable[[], T], /) -> Future[T]: ...


CARD_FAILURES = ("CUDA", "CUBLAS", "CUDNN", "cuDNN")
"""What stands in the text of an error that a card, and not a fault of ours, is the cause of."""


class CardFailed(Exception):
    """A card cannot be used any more; the text says why."""

    def __init__(self, card: int, why: str) -> None:
        super().__init__(why)
        self.card = card


def card_out_of_memory(error: torch.OutOfMemoryError) -> int:
    """The number of the card whose memory ran out."""
    return error.card if isinstance(error, OutOfMemoryOn) else 0


@contextmanager
def on_card(card: int, device: torch.device) -> Iterator[None]:
    """The calling thread works on a card inside. What goes wrong there is told to be the card's.

    Raises:
        OutOfMemoryOn, CardFailed: that went wrong.
    """
    try:
        with on(device), memory_of(card):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not any(word in str(error) for word in CARD_FAILURES):
            raise
        raise CardFailed(card, first_line(error)) from error


class CardThread:
    """A card's own thread, and the way to its memory and back.

    Args:
        card: its number, counted from the first one, which is 0 and on the device `first`.
        note: told by which way, and why.
    """

    def __init__(self, card: int, device: torch.device, first: torch.device, note: Callable[[str, str], None]) -> None:
        self.card, self.device = card, device
        route, why = route_between(first, device)
        note("exchange", why)
        self._unlocked = partial(note, "exchange through the host")
        self.there = Bridge(first, device, route, self._unlocked)
        self.back = Bridge(device, first, route, self._unlocked)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"lowmem-bagel-card-{card}")

    def bridge_from(self, device: torch.device) -> Bridge:
        """To the card from another one than the first."""
        return Bridge(device, self.device, route_between(device, self.device)[0], self._unlocked)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have it done by the card's thread. Its result may raise OutOfMemoryOn and CardFailed beside its own."""
        return self._worker.submit(self._run, work)

    def at_once(self, work: Callable[[], T]) -> Future[T]:
        """As `submit`, done by the calling thread before it returns."""
        done: Future[T] = Future()
        try:
            done.set_result(self._run(work))
        except Exception as error:  # whoever asks for the result is told, as of a thread's
            done.set_exception(error)
        return done

    # Inference mode is each thread's own.
    @torch.inference_mode()
    def _run(self, work: Callable[[], T]) -> T:
        with self.entered():
            return work()

    def entered(self) -> AbstractContextManager[None]:
        """As `on_card`, for the calling thread."""
        return on_card(self.card, self.device)

    def close(self) -> None:
        """End it, once it is done."""
        self._worker.shutdown()


class BranchesThere:
    """Branches of one picture on another card; see `sampling.denoise.Elsewhere`.

    Their keys and values are copied there once, when it is made.

    Args:
        launch: has what it is given launched there, by whom the card's plan says.
        bagel, backend: what is loaded there.
        views, markers: as of `Evaluator`, on the first card; likewise `scratch`, a range of the cache there.
        graphs: as of `Evaluator`.
    """

    def __init__(
        self,
        card: CardThread,
        launch: Launch,
        bagel: Bagel,
        backend: AttentionBackend,
        views: Mapping[int, SequenceView],
        markers: Tensor,
        scratch: range,
        frames: Frames,
        make_cache: Callable[[], BranchCache],
        predicts: Predicted,
        graphs: PassGraphs | None = None,
    ) -> None:
        self.branches: Sequence[int] = tuple(views)
        self._card, self._launch = card, launch
        excerpt = Excerpt.of([*views.values()], scratch)
        kv_cache, framing, self._x = launch(
            lambda: (
                KVCache(bagel.config.decoder, excerpt.tokens, bagel.dtype, card.device),
                torch.empty(markers.shape, dtype=markers.dtype, device=card.device),
                torch.empty(frames.latents, bagel.config.latent_values, device=card.device),
            )
        ).result()
        first = next(iter(views.values())).kv_cache
        for ours, theirs in ((markers, framing), *excerpt.pieces(first, kv_cache)):
            card.there.carry(ours, theirs)
        there = {branch: excerpt.view(view, kv_cache) for branch, view in views.items()}
        self._evaluator = launch(
            partial(
                self._prepared,
                Mark(card.device),
                lambda: Evaluator(
                    bagel,
                    backend,
                    there,
                    framing.to(bagel.residual_dtype),
                    excerpt.scratch,
                    frames,
                    make_cache,
                    predicts,
                    batch=False,
                    graphs=graphs,
                ),
            )
        ).result()

    @property
    def evaluations(self) -> int:
        return self._evaluator.evaluations

    @property
    def computed(self) -> int:
        return self._evaluator.computed

    def begin(self, x: Tensor, t: float) -> None:
        # What was there has been read: its velocities were asked for.
        self._card.there.carry(x, self._x)
        self._begun = self._launch(partial(self._evaluate, Mark(self._card.device), t))

    def velocities(self) -> Mapping[int, Tensor]:
        found, done = self._begun.result()
        done.wait(self._card.device)
        return {branch: self._card.back.carry(velocity) for branch, velocity in found.items()}

    def _prepared(self, arrived: Mark, make: Callable[[], Evaluator]) -> Evaluator:
        arrived.wait(self._card.device)
        return make()

    def _evaluate(self, arrived: Mark, t: float) -> tuple[dict[int, Tensor], Mark]:
        arrived.wait(self._card.device)
        time = torch.full((1,), t, device=self._card.device)
        return self._evaluator.velocities(self._x, time, self.branches), Mark(self._card.device)


class LayersThere:
    """Layers of a decoder on another card; see `model.decoder.Stretch`.

    The thread of the request launches on every card, one after the other: a layer waits for the one before it anyway.

    Args:
        bagel: what is loaded there.
        there: from the card that has the layers before, if that is not the first one.
    """

    ahead = True

    def __init__(self, card: CardThread, bagel: Bagel, layers: range, there: Bridge | None) -> None:
        self.layers, self.device, self.entered = layers, card.device, card.entered
        self._decoder = bagel.decoder
        self.there, self.back = (there or card.there).carry, card.back.carry

    @property
    def source(self) -> LayerSource:
        return self._decoder.source


class ByDevice(AttentionBackend):
    """Each device's own backend, for a model whose layers lie on several."""

    def __init__(self, first: AttentionBackend, others: Mapping[torch.device, AttentionBackend]) -> None:
        self.name, self._first, self._others = first.name, first, others

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        return self._others.get(q.device, self._first)(q, k, v, mask)

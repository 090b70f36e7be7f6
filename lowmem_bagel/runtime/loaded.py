"""What a plan became: a model on its devices, which requests are carried out with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..checkpoint.check_tensors import Lack
from ..checkpoint.folder import ModelFolder
from ..checkpoint.tokenizer import BagelTokenizer
from ..errors import first_line
from ..model.bagel import Bagel
from ..model.decoder import ResidentLayers
from ..model.flat_buffer import named_tensors
from ..model.kv_cache import SequenceView
from ..model.preview import LatentColors
from ..model.vae import Vae
from ..ops.attention.base import AttentionBackend
from ..ops.device import empty_cache, on, synchronize
from ..planner.plan import Plan
from ..sampling.frames import Frames
from ..sampling.pass_graphs import PassGraphs
from ..sampling.short_pass import ShortPasses
from ..sampling.step_caches.base import BranchCache, Predicted
from ..sampling.text_graph import StepKernels
from ..timeline import Timeline
from .context_store import ContextStore
from .elsewhere import BranchesThere, CardThread
from .memory_promise import PROMISES, Promise
from .residency import UnitBuffers
from .staging import StagedPart

T = TypeVar("T")


class Keeper(Protocol):
    """Keeps contexts between requests."""

    def forget(self) -> int:
        """Let go of them; returns their bytes."""


@dataclass
class LoadedModel:
    """Everything a pipeline runs on. `vae` is None where the plan's tasks need no pictures out."""

    folder: ModelFolder
    plan: Plan
    bagel: Bagel
    vae: Vae | None
    tokenizer: BagelTokenizer
    attention: AttentionBackend
    residency: UnitBuffers
    staged: Mapping[str, StagedPart]
    promise: Promise
    lacking: Mapping[str, Lack]
    """Parts that the folder lacks, and that are not there: no request may need them."""
    step_kernels: StepKernels | None
    """What text decoding by graph runs on; None where it cannot, and the plan's reasons say why."""
    context_store: ContextStore | None = None
    """What is kept of earlier requests, where the plan has room for it."""
    timeline: Timeline = field(default_factory=Timeline)
    """Where the seconds of loading went."""
    short_passes: ShortPasses | None = None
    """What short texts before an answer go through the layers by, on a card."""
    keepers: WeakSet[Keeper] = field(default_factory=WeakSet)
    """What keeps contexts between requests: chats."""
    others: dict[int, Secondary] = field(default_factory=dict)
    """The other cards that take part, by their number in the plan."""

    @property
    def device(self) -> torch.device:
        """With its number, where it is a card."""
        return torch.device(self.plan.device)

    def on_device(self) -> AbstractContextManager[object]:
        """Whatever works on the model does it inside."""
        return on(self.device)

    def launch_by_its_thread(self, why: str) -> None:
        """From now on what is evaluated on this card, which is beside the first, is launched by the card's thread."""
        self.plan = replace(self.plan, launcher="thread")
        self.note("launches", f"by a thread of its own: {why}")

    def note(self, about: str, why: str) -> None:
        """One more of the plan's reasons."""
        self.plan = replace(self.plan, reasons={**self.plan.reasons, about: why})

    def refuse_graph(self, why: str) -> None:
        """From now on text is decoded without a graph."""
        self.step_kernels = None
        self.note("text decoding by graph", why)

    def pass_graphs(self) -> PassGraphs | None:
        """What replays the passes of one drawing here; None where the plan has none replayed, or weights stream by
        now."""
        decoder = self.bagel.decoder
        if not self.plan.graph_tokens or decoder.elsewhere or not isinstance(decoder.source, ResidentLayers):
            return None
        return PassGraphs(self.plan.graph_tokens, self._refuse_pass_graphs)

    def _refuse_pass_graphs(self, error: RuntimeError) -> None:
        self.plan = replace(self.plan, graph_tokens=0)
        self.note("pictures by graph", f"cannot be captured: {first_line(error)}")

    @contextmanager
    def using(self, *parts: str) -> Iterator[None]:
        """The named parts ("vit", "vae", "lm_head") are on the device inside."""
        assert not self.lacking.keys() & {*parts}, "such a request is refused"
        with ExitStack() as stack:
            for part in parts:
                if part in self.staged:
                    stack.enter_context(self.staged[part].on_device())
            yield

    @cached_property
    def colors(self) -> LatentColors:
        """What latents look like, nearly; fitted with the autoencoder on the device when it is first asked for."""
        assert self.vae is not None
        with self.using("vae"):
            return LatentColors(self.vae)

    def forget_contexts(self) -> int:
        """Keep no contexts on the device any more; returns the bytes that are free there now, 0 for none."""
        kept = sum(keeper.forget() for keeper in self.keepers)
        if kept:
            empty_cache()
        room = self.plan.context_store
        if self.context_store is None or room is None or room.place != "device":
            return kept
        self.context_store = None
        self._forget_passes()
        self.plan = replace(self.plan, context_store=None)
        self.note("context store", "off: the device's memory ran out")
        empty_cache()
        return kept + room.nbytes

    def bytes_in_pieces(self) -> int:
        """That torch holds of the card and no tensor does: while an allocation's failure is handled, what lay between
        tensors, since all else was given back before."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def return_pieces(self) -> None:
        """Give the cards what torch holds of them and no tensor does."""
        empty_cache()

    def on_card(self, card: int) -> LoadedModel:
        """What a card holds, by its number in the plan; 0 is this one."""
        return self if card == 0 else self.others[card].model

    def lower_residency(self, nbytes: int, card: int = 0) -> int:
        """Stream more units until at least `nbytes` of a card's memory are free; returns what was freed, 0 for none."""
        if card:
            return self.others[card].lower_residency(nbytes)
        if self.device.type != "cuda":
            return 0
        self._forget_passes()
        return self.residency.demote(nbytes)

    def raise_residency(self, nbytes: int) -> int:
        """Keep units on the first card that stream from RAM, as far as `nbytes` go; returns what was taken."""
        if self.device.type != "cuda":
            return 0
        self._forget_passes()
        return self.residency.promote(nbytes)

    @property
    def weight_bytes(self) -> int:
        """Of the device's memory, what weights and the slots that they pass through hold."""
        modules = (self.bagel, *([] if self.vae is None else [self.vae]))
        tensors = (tensor for module in modules for _, tensor in named_tensors(module))
        storages = (tensor.untyped_storage() for tensor in tensors if tensor.device == self.device)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _forget_passes(self) -> None:
        if self.short_passes is not None:
            self.short_passes.forget()

    def out_of_memory(self) -> str:
        """What to say when memory ran out and nothing is left to stream: what was free, the plan, what to try."""
        free, total = torch.cuda.mem_get_info(self.device)
        limit = f", limited to {self.plan.max_vram / 1e9:.1f} GB" if self.plan.max_vram else ""
        return (
            f"out of GPU memory: {free / 1e9:.1f} of {total / 1e9:.1f} GB free{limit}, "
            f"{len(self.residency.streamed)} of {len(self.residency.streamed) + len(self.residency.resident)} units "
            "streamed already; ask for a smaller picture, a larger max_vram or a smaller variant (int8, nf4)"
        )

    def give_up(self, card: int, why: str) -> None:
        """Do without another card from now on, which has failed."""
        failed = self.others.pop(card)
        self.note(failed.model.plan.device, f"not used any more: {why}")
        self._close(failed)

    def close(self) -> None:
        """Let go of all weights, streams first, of the other cards before this one's."""
        self.bagel.decoder.elsewhere = ()
        while self.others:
            self._close(self.others.popitem()[1])
        synchronize(self.device)  # a request that was broken off may still copy from what is let go
        self.context_store = self.short_passes = None
        self.residency.close()
        self.staged = {}
        for module in (self.bagel, self.vae):
            if module is not None:
                module.to("meta")
        self.bagel.decoder.layers = nn.ModuleList()  # the scratch that linears share is not theirs to move
        empty_cache()
        PROMISES.end(self.promise)

    def _close(self, other: Secondary) -> None:
        try:
            other.close()
        except RuntimeError as error:  # what is broken cannot give its memory back either, and must not keep ours
            self.note(f"closing {other.model.plan.device}", first_line(error))


@dataclass
class Secondary:
    """A card beside the first: what is loaded there, and the thread that works on it."""

    model: LoadedModel
    thread: CardThread

    def branches(
        self, views: Mapping[int, SequenceView], markers: Tensor, scratch: range, frames: Frames,
        make_cache: Callable[[], BranchCache], predicts: Predicted,
    ) -> BranchesThere:  # fmt: skip
        """Have branches of a picture evaluated there from now on; arguments as of `Evaluator`, on the first card."""
        bagel, backend, graphs = self.model.bagel, self.model.attention, self.model.pass_graphs()
        given = views, markers, scratch, frames, make_cache, predicts
        return BranchesThere(self.thread, self.launch, bagel, backend, *given, graphs)

    def launch(self, work: Callable[[], T], /) -> Future[T]:
        """Have work launched there, by whom the plan says."""
        return self.thread.at_once(work) if self.model.plan.launcher == "request" else self.thread.submit(work)

    def lower_residency(self, nbytes: int) -> int:
        """As `LoadedModel.lower_residency`. Weights that stream keep whoever launches waiting."""
        freed = self.thread.submit(partial(self.model.lower_residency, nbytes)).result()
        if self.model.residency.streamed:
            self.model.launch_by_its_thread("weights that stream are waited for")
        return freed

    def close(self) -> None:
        """Give all its memory back, once its thread is done."""
        self.thread.close()
        with self.model.on_device():
            self.model.close()

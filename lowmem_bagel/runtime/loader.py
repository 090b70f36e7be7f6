"""Carries out a plan: checks every tensor's name and shape, builds on the meta device, fills in the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..checkpoint.check_tensors import check_tensors
from ..checkpoint.folder import ModelFolder
from ..checkpoint.same_model import open_same
from ..checkpoint.tensors import EMBEDDING, FUSED, LATENT_POSITIONS, VIT_POSITIONS, Expert
from ..checkpoint.tokenizer import BagelTokenizer
from ..errors import CheckpointError, DeviceError, DoesNotFitError, first_line
from ..formats.base import Site
from ..formats.check_parts import check_parts
from ..formats.linears import stored_linears
from ..formats.registry import format_spec
from ..model.bagel import Bagel
from ..model.decoder import Layer, Stretch
from ..model.flat_buffer import Layout, set_tensor, stack
from ..model.names import expert_vectors, latent_tensors, norm_tensor, stacked_modules, vision_tensors
from ..model.vae import Vae
from ..ops.attention.base import AttentionBackend
from ..ops.attention.full import torch_attention
from ..ops.attention.select import Selection, select_backend, select_for_part
from ..ops.device import empty_cache, indexed, on
from ..ops.dtypes import wide
from ..ops.linear import Linear
from ..ops.rope import Rotate, qk_norm_rope
from ..planner.plan import Plan, Unit
from ..sampling.short_pass import ShortPasses
from ..sampling.text_graph import StepKernels
from ..timeline import Timeline
from .context_store import ContextStore
from .elsewhere import ByDevice, CardFailed, CardThread, LayersThere, on_card
from .loaded import LoadedModel, Secondary
from .memory_promise import PROMISES, Promise
from .reading import Progress, Readers
from .residency import Held, UnitBuffers, named
from .staging import StagedPart
from .step_kernels import graph_kernels
from .streaming.disk import Kept, Segment, segments_of

Sources = Mapping[str, Sequence[str]]
"""Tensor path in a module -> stored names that it stacks."""


def load_model(
    folder: ModelFolder, plan: Plan, progress: Progress | None = None, timeline: Timeline | None = None
) -> LoadedModel:
    """Load a folder as planned, on every card of the plan. A plan for "cuda" is carried out on the first card.
    `timeline` is gone on with.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshapen.
        SettingError: the plan forces a backend that cannot run here.
        DoesNotFitError, DeviceError: the memory of another card than the first ran out meanwhile, or the card failed.
    """
    shares = _shared(progress, 1 + len(plan.others))
    loaded = _load(folder, plan, shares[0], timeline or Timeline())
    try:
        with loaded.timeline.phase("other cards"):
            for card, other in enumerate(plan.others, start=1):
                loaded.others[card] = _load_beside(loaded, card, other, shares[card])
        if plan.divided:
            _join(loaded)
    except BaseException:
        loaded.close()
        raise
    return loaded


def _load_beside(first: LoadedModel, card: int, plan: Plan, progress: Progress | None) -> Secondary:
    """What another card holds, of the number `card`."""
    try:
        with on_card(card, indexed(plan.device)):
            folder = open_same(first.folder, plan.variant)[0] if plan.variant else first.folder
            model = _load(folder, plan, progress, Timeline(), first.tokenizer)
            return Secondary(model, CardThread(card, model.device, first.device, model.note))
    except torch.OutOfMemoryError as error:
        said = f"the memory of {plan.device} ran out while the model was loaded ({first_line(error)})"
        raise DoesNotFitError(f"{said}; free some of it, or load the model without that card") from error
    except CardFailed as failure:
        said = f"{plan.device} failed while the model was loaded: {failure}"
        raise DeviceError(f"{said}; load it without that card") from failure


def _join(loaded: LoadedModel) -> None:
    """One decoder of the layers that the cards have."""
    stretches: list[Stretch] = []
    relay = named(loaded.plan.relay)
    for other in loaded.others.values():
        plan, last = other.model.plan, stretches[-1].device if stretches else None
        assert plan.layers is not None
        # From one of the other cards to the next it is another way than from the first one.
        between = None if last is None else other.thread.bridge_from(last)
        stretch: Stretch = LayersThere(other.thread, other.model.bagel, range(*plan.layers), between)
        stretches.append(stretch if relay is None else relay(stretch, loaded.device))
    loaded.bagel.decoder.elsewhere = stretches
    backends = {other.model.device: other.model.attention for other in loaded.others.values()}
    loaded.attention = ByDevice(loaded.attention, backends)


def _shared(progress: Progress | None, count: int) -> Sequence[Progress | None]:
    """What tells of each of so many loads that follow each other, and together of all."""
    if progress is None:
        return [None] * count
    return [partial(_told, progress, before, count) for before in range(count)]


def _told(progress: Progress, before: int, count: int, done: int, total: int) -> None:
    progress(before * total + done, count * total)


def _load(
    folder: ModelFolder, plan: Plan, progress: Progress | None, timeline: Timeline,
    tokenizer: BagelTokenizer | None = None,
) -> LoadedModel:  # fmt: skip
    """What one card holds. A tokenizer that is given need not be read."""
    device = indexed(plan.device)
    promise = PROMISES.begin(device, plan.max_vram)
    try:
        with on(device):
            return _Loading(folder, replace(plan, device=str(device)), progress, timeline).run(promise, tokenizer)
    except BaseException:
        PROMISES.end(promise)
        raise


class _Loading:
    """One load: what its steps share."""

    def __init__(self, folder: ModelFolder, plan: Plan, progress: Progress | None, timeline: Timeline) -> None:
        self.folder, self.config, self.timeline = folder, folder.config, timeline
        self.device = torch.device(plan.device)
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        self.reasons = dict(plan.reasons)
        with timeline.phase("checks"):
            self.lacking = check_tensors(folder, format_spec(folder.format).layout(folder).stored, plan.tasks)
            check_parts(folder)
        self.site = Site(folder, self.device, self.dtype, plan.linears, self.reasons, tune=plan.tune)
        with timeline.phase("trials"):
            self.linears = stored_linears(self.site)
        self.plan, self.progress = plan, progress
        self._decoded: set[str] = set()

    def run(self, promise: Promise, tokenizer: BagelTokenizer | None) -> LoadedModel:
        plan, phase = self.plan, self.timeline.phase
        with phase("tokenizer"):
            tokenizer = tokenizer or self._tokenizer()
        with phase("trials"):
            selection = self._attention()
            rotate = self._rotate()
        with phase("building"), torch.device("meta"):
            bagel = self._build(rotate)
            vae = self._build_vae() if "gen" in plan.experts and "vae" not in plan.left_out else None
        with phase("weights"):
            residency, staged = self._fill(bagel, vae)
        for model in (bagel, vae):
            if model is not None:
                model.eval().requires_grad_(False)
        with phase("trials"):
            kernels = self._step_kernels(bagel)
        if self.device.type == "cuda":
            empty_cache()  # what trials, decoding and adapters took is not for a request's keys to lie in
        store = self._context_store(residency)
        short_passes = self._short_passes(bagel)
        graph_tokens = self._graph_tokens(bagel)
        plan = replace(plan, graph_tokens=graph_tokens, reasons=self.reasons | {"linears": self.linears.name})
        return LoadedModel(
            self.folder,
            plan,
            bagel,
            vae,
            tokenizer,
            selection.backend,
            residency,
            staged,
            promise,
            self.lacking,
            kernels,
            store,
            self.timeline,
            short_passes,
        )

    def _tokenizer(self) -> BagelTokenizer:
        tokenizer = BagelTokenizer(self.folder.tokenizer, self.folder.special_ids)
        if tokenizer.size > self.config.decoder.vocab_size:
            raise CheckpointError(
                f"{self.folder.path}: the tokenizer has {tokenizer.size} tokens and the model "
                f"{self.config.decoder.vocab_size}; take the tokenizer that belongs to these weights"
            )
        return tokenizer

    def _attention(self) -> Selection:
        decoder = self.config.decoder
        selection = select_backend(
            self.plan.attention,
            device=self.device,
            dtype=self.dtype,
            num_heads=decoder.num_heads,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            lossy=format_spec(self.folder.format).inexact,
        )
        self.reasons.update({f"attention {name}": why for name, why in selection.refused})
        return selection

    def _step_kernels(self, bagel: Bagel) -> StepKernels | None:
        if "lm_head" in self.plan.left_out:
            return None
        if self.plan.divided:
            self.reasons["text decoding by graph"] = "layers are on several cards"
            return None
        why = _graph_blocker(bagel)
        kernels: StepKernels | None = None
        if why is None:
            kernels, why = graph_kernels(self.device, self.site.sizes)
        if why is not None:
            self.reasons["text decoding by graph"] = why
        return kernels

    def _graph_tokens(self, bagel: Bagel) -> int:
        why = _graph_blocker(bagel)
        if self.plan.graph_tokens and why is not None:
            self.reasons["pictures by graph"] = f"no: {why}"
            return 0
        return self.plan.graph_tokens

    def _short_passes(self, bagel: Bagel) -> ShortPasses | None:
        """None where a graph would hold a weight of its own, which no plan counts."""
        if self.device.type != "cuda" or "lm_head" in self.plan.left_out or self.plan.divided:
            return None
        if self.site.dequantizes:
            self.reasons["questions by graph"] = "weights are dequantised for every product"
            return None
        return ShortPasses(bagel)

    def _fill(self, bagel: Bagel, vae: Vae | None) -> tuple[UnitBuffers, dict[str, StagedPart]]:
        """Allocate all that holds weights, and read them: what is large first, since no thread takes part of another's
        work."""
        held, staged = self._unit_buffers(bagel), {}
        total = sum(stored.entry.nbytes for stored in self.folder.stored.values())
        with Readers(self.device, total, self.progress) as readers:
            self.readers = readers
            plain = [readers.submit(partial(self._fill_tensor, *one)) for one in self._plain(bagel)]
            parts = [
                (name, module, readers.submit(partial(self._filled_part, name, module, sources, held)))
                for name, module, sources in self._parts(bagel, vae)
                if name not in self.lacking and name not in self.plan.left_out  # it stays without memory
            ]
            units = {unit: readers.submit(work) for unit, work in self._units(held)}
            for unit, made in units.items():
                layer, expert = unit
                held.add(unit, readers.result(made))
                self.linears.prepare(held.layers[layer][expert])
            held.start()
            for one in plain:
                readers.result(one)
            for name, module, filled in parts:
                layout, buffer = readers.result(filled)
                if name in self.plan.residency.staged:
                    staged[name] = StagedPart(module, layout, buffer, self.device)
                else:
                    layout.bind(module, buffer)
        self.timeline.read_bytes = readers.read_bytes
        return held, staged

    def _parts(self, bagel: Bagel, vae: Vae | None) -> Iterator[tuple[str, nn.Module, Sources]]:
        yield "lm_head", bagel.lm_head, self.linears.sources(["language_model.lm_head"])
        yield "vit", bagel.vision, vision_tensors(self.config)
        if vae is not None:
            yield "vae", vae, {path: (path,) for path, _ in vae.named_parameters()}

    def _context_store(self, residency: UnitBuffers) -> ContextStore | None:
        room = self.plan.context_store
        if room is None:
            return None
        if room.place == "device":
            return ContextStore(self._device_buffer(room.nbytes))
        if room.place == "pinned":
            return ContextStore(residency.host_buffer(room.nbytes)[0])
        return ContextStore(torch.empty(room.nbytes, dtype=torch.uint8))

    def _build(self, rotate: Rotate) -> Bagel:
        def factory(layer: int, expert: Expert, name: str, in_features: int, out_features: int) -> Linear:
            modules = stacked_modules(decoder, layer, expert, name)
            return self.linears.build(modules, in_features, out_features, bias=name == "qkv")

        decoder, vit = self.config.decoder, self.config.vit
        has_gen = "gen" in self.plan.experts
        return Bagel(
            self.config,
            factory,
            self.linears.build(["language_model.lm_head"], decoder.hidden_size, decoder.vocab_size, bias=False),
            self.dtype,
            getattr(torch, self.plan.residual_dtype),
            latent_positions=self._table_rows(LATENT_POSITIONS) if has_gen else 0,
            vit_positions=0 if "vit" in self.lacking else self._table_rows(VIT_POSITIONS),
            experts=self.plan.experts,
            rotate=rotate,
            vision_attention=torch_attention
            if "vit" in self.plan.left_out
            else self._part_attention("vit", wide(self.dtype), vit.num_heads, vit.head_dim),
        )

    def _build_vae(self) -> Vae:
        dtype = getattr(torch, self.plan.vae_dtype)
        channels = self.config.vae.ch * self.config.vae.ch_mult[-1]
        return Vae(self.config.vae, self._part_attention("vae", dtype, 1, channels)).to(dtype)

    def _part_attention(self, part: str, dtype: torch.dtype, heads: int, head_dim: int) -> AttentionBackend:
        with torch.device("cpu"):  # the model around is built on the meta device
            chosen = select_for_part(
                self.plan.attention, device=self.device, dtype=dtype, num_heads=heads, head_dim=head_dim
            )
        refused = "; ".join(f"{name}: {why}" for name, why in chosen.refused)
        self.reasons[f"{part} attention"] = chosen.backend.name + (f" ({refused})" if refused else "")
        return chosen.backend

    def _rotate(self) -> Rotate:
        """QK norm and rope in one kernel where it runs."""
        if self.dtype == torch.float16:
            return self.site.around.rotate
        from ..kernels.trials import why_not

        reason = why_not("rope", self.device, self.site.sizes)
        if reason is not None:
            self.reasons["rope kernel"] = reason
            on_card = self.dtype == torch.bfloat16 and self.device.type == "cuda"
            return self.site.around.rotate if on_card else qk_norm_rope
        from ..kernels.rope import qk_norm_rope as fused

        return fused

    def _unit_buffers(self, bagel: Bagel) -> UnitBuffers:
        wanted, layers = self.plan.residency, cast("Sequence[Layer]", bagel.decoder.layers)
        return UnitBuffers(
            bagel.decoder,
            layers,
            self.device,
            wanted.source,
            wanted.slots,
            self.reasons.__setitem__,
            self.plan.offload,
            wanted.slowest,
        )

    def _units(self, held: UnitBuffers) -> Iterator[tuple[Unit, Callable[[], Held]]]:
        """Every unit, and what makes it."""
        for layer, experts in [*enumerate(held.layers)][slice(*(self.plan.layers or (None,)))]:
            for expert in experts:
                unit, sources = (layer, expert), self._layer_sources(layer, expert)
                fill = partial(self._fill_buffer, sources)
                on_disk = partial(self._segments, sources)
                yield unit, partial(held.made, unit, self.plan.residency.place(unit), fill, on_disk)

    def _fill_buffer(self, sources: Sources, layout: Layout, buffer: Tensor) -> None:
        layout.fill(buffer, sources, self._read, self._copy)

    def _segments(self, sources: Sources, layout: Layout) -> Sequence[Segment | Kept] | None:
        """Where a unit lies on disk; None where it is not stored as it is used."""
        return segments_of(layout, sources, self.folder.stored.get, self._read)

    def _device_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _plain(self, bagel: Bagel) -> Iterator[tuple[nn.Module, str, Sequence[str], torch.device]]:
        """The small tensors that stay, and the embedding where the plan wants it."""
        if "embedding" not in self.plan.left_out:
            embedding_device = torch.device("cpu") if "embedding" in self.plan.residency.staged else self.device
            yield bagel, "embed_tokens", (EMBEDDING,), embedding_device
        for expert in self.plan.experts:
            yield bagel, f"decoder.norm.{expert}", norm_tensor(expert), self.device
        if "gen" in self.plan.experts:
            for path, names in latent_tensors(self.config).items():
                yield bagel, path, names, self.device

    def _filled_part(self, name: str, module: nn.Module, sources: Sources, held: UnitBuffers) -> tuple[Layout, Tensor]:
        layout = Layout.of(module)
        waits = name in self.plan.residency.staged
        buffer = held.host_buffer(layout.nbytes)[0] if waits else self._device_buffer(layout.nbytes)
        self._fill_buffer(sources, layout, buffer)
        return layout, buffer

    def _fill_tensor(self, module: nn.Module, path: str, names: Sequence[str], device: torch.device) -> None:
        meta = module.get_parameter(path)
        value = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        stack(value, names, self._read, self._copy)
        set_tensor(module, path, value)

    def _layer_sources(self, layer: int, expert: Expert) -> dict[str, Sequence[str]]:
        decoder = self.config.decoder
        sources: dict[str, Sequence[str]] = dict(expert_vectors(decoder, layer, expert))
        for fused in FUSED:
            modules = stacked_modules(decoder, layer, expert, fused)
            sources |= {f"{fused}.{path}": names for path, names in self.linears.sources(modules).items()}
        return sources

    def _table_rows(self, name: str) -> int:
        rows = self.folder.entry(name).shape[0]
        if math.isqrt(rows) ** 2 != rows or not rows:
            raise CheckpointError(f"{self.folder.path}: tensor {name} has {rows} rows; a position table is a square")
        return rows

    def _read(self, name: str) -> Tensor:
        """A tensor as it is used but for its dtype; one that is stored so is a view of its file."""
        decoded = self.linears.read(name)
        if decoded is None:
            return self.folder.tensor(name)
        self._decoded.add(name)
        return decoded

    def _copy(self, target: Tensor, name: str, value: Tensor) -> None:
        self.readers.copy(target, value, None if name in self._decoded else self.folder.stored.get(name))


def _graph_blocker(bagel: Bagel) -> str | None:
    """Why a CUDA graph cannot capture the model's linears; None where it can."""
    linears = (module for module in bagel.modules() if isinstance(module, Linear))
    return next((linear.graph_blocker for linear in linears if linear.graph_blocker), None)

"""One configuration measured: a row's seconds and memory, with a picture of its own, on whatever device is there.

`bench engine` and `bench report` both measure by `measure`.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lowmem_bagel.hardware.features import VARIABLE, switched_off

from .rows import Row

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from lowmem_bagel.checkpoint.folder import ModelFolder
    from lowmem_bagel.generation.results import Result
    from lowmem_bagel.pipeline import BagelPipeline
    from lowmem_bagel.planner.plan import Launcher
    from lowmem_bagel.runtime.loaded import LoadedModel
    from lowmem_bagel.sampling.denoise import Preview, Step

    Request = Callable[[Callable[[Any], None]], Result]
    """Makes a request, and calls back at every step and token."""

PROMPT = "a photo of a red fox in the snow"
INSTRUCTION = "make the fox blue"
QUESTION = "what is in the picture?"
WARM_UP = {"num_timesteps": 3, "cfg_interval": (0.8, 1.0)}
"""One guided step and one that is not: whatever is compiled or tuned for either is then."""
BRANCHES = {"generate": 2, "edit": 3}


@dataclass
class Conditions:
    """What the rows share. References are by what is drawn, and whether branches run as one batch."""

    shape: str
    device: str
    size: int
    num_timesteps: int
    max_new_tokens: int
    repeat: int
    row_seconds: float
    copy_gbps: float | None
    latents: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    denoise_seconds: dict[tuple[Any, ...], float] = field(default_factory=dict)

    def side(self, row: Row) -> int:
        """Height and width of a row's pictures in pixels."""
        return row.size or self.size


class Watch:
    """Looks on while a row is measured, and adds what it saw. This one sees nothing."""

    def opened(self, folder: ModelFolder, load: Callable[[], BagelPipeline]) -> None:
        """Before the folder is loaded, by `load`, to be measured."""

    def run(self, pipe: BagelPipeline, request: Request) -> Result:
        """Make one measured request, which a callback may follow."""
        return request(nothing)

    def seen(self, pipe: BagelPipeline, done: Sequence[Result]) -> dict[str, Any]:
        """Of all measured requests, while the model is still loaded."""
        return {}


def nothing(event: object) -> None:
    """Follows a request that nobody follows."""


def load_settings(row: Row, conditions: Conditions) -> dict[str, Any]:
    """A row's options of loading, as `BagelPipeline.from_folder` takes them."""
    where = {"devices": row.devices, "divide": row.divide} if row.devices else {"device": conditions.device}
    return where | {
        "backend": row.backend, "dtype": row.dtype, "attention": row.attention,
        "tasks": (row.task,), "offload": row.offload, "step_cache": row.step_cache, "tune": bool(row.tune),
        "max_vram": int(row.limit_gb * 1e9) or None, "size": (conditions.side(row),) * 2,
        "frames": row.frames, "frame_mode": row.frame_mode,
    }  # fmt: skip


def measure(row: Row, conditions: Conditions, compared: bool, watch: Watch = Watch()) -> dict[str, Any]:
    """One row's figures; `compared`: other rows' pictures are to be compared with this one's, in any batch."""
    with switched_off_too(row.without):
        return _measured(row, conditions, compared, watch)


def _measured(row: Row, conditions: Conditions, compared: bool, watch: Watch) -> dict[str, Any]:
    import torch

    from lowmem_bagel.pipeline import BagelPipeline

    torch.manual_seed(0)
    options = load_settings(row, conditions)
    folder = folder_of(row, conditions)
    watch.opened(folder, lambda: BagelPipeline.from_folder(folder, **options))
    start = time.perf_counter()
    pipe = BagelPipeline.from_folder(folder, **options)
    loaded = time.perf_counter() - start
    try:
        if row.launcher:
            for other in pipe.model.others.values():
                other.model.plan = replace(other.model.plan, launcher=cast("Launcher", row.launcher))
        request = _request(pipe, row, conditions, start + conditions.row_seconds)
        request(WARM_UP if row.task != "ask" else {"max_new_tokens": row.timesteps or 20})
        full = {"num_timesteps": row.timesteps or conditions.num_timesteps} if row.task != "ask" else {}

        def measured() -> Result:
            return watch.run(pipe, lambda follow: request(full, follow))

        done = [measured()]
        while (
            len(done) < conditions.repeat
            and time.perf_counter() - start < conditions.row_seconds - done[-1].stats.seconds
        ):
            done.append(measured())
        found = _summary(done) | {"load_seconds": loaded} | _placement(pipe) | watch.seen(pipe, done)
        if row.previews and row.task != "ask":
            found |= _with_previews(pipe, row, request, full, done)
        if row.task != "ask":
            found |= _picture_figures(pipe, row, conditions, done, lambda: request(full), compared)
        return found
    finally:
        pipe.close()


@contextmanager
def switched_off_too(features: str) -> Iterator[None]:
    """These, with commas between, are switched off inside beside what is so anyway."""
    before = os.environ.get(VARIABLE)
    if features:
        os.environ[VARIABLE] = ",".join([*switched_off(), features])
    try:
        yield
    finally:
        if features:
            os.environ.pop(VARIABLE)
            os.environ.update({} if before is None else {VARIABLE: before})


def folder_of(row: Row, conditions: Conditions) -> ModelFolder:
    """A row's model with its adapter: a folder that is there, or random weights.

    Raises:
        UserError: neither, or random weights of this format cannot be made.
    """
    from lowmem_bagel.checkpoint.folder import ModelFolder

    from .synthetic import synthetic_folder, write_adapter

    if Path(row.format).is_dir():
        folder = ModelFolder.open(row.format)
    else:
        folder = synthetic_folder(row.format, conditions.shape, conditions.device)
    if not row.lora:
        return folder
    with tempfile.TemporaryDirectory() as place:  # its open file outlives it
        return folder.adapted([str(write_adapter(folder.config, row.lora, Path(place)))])


def _request(pipe: BagelPipeline, row: Row, conditions: Conditions, deadline: float) -> Callable[..., Result]:
    """Runs the row's task with some settings changed; breaks it off at the deadline. A callback may come second."""
    side = conditions.side(row)
    shown = picture(side) if row.task != "generate" else None

    def run(changed: dict[str, Any], on_event: Callable[[Any], None] = nothing) -> Result:
        def in_time(event: object) -> bool:
            on_event(event)
            return time.perf_counter() < deadline

        if row.task == "ask":
            length = {"max_new_tokens": row.timesteps or conditions.max_new_tokens} | changed
            return pipe.ask(QUESTION, shown, callback=in_time, **length)
        settings = {"seed": 0, "step_cache": row.step_cache, "step_cache_threshold": row.threshold}
        settings |= {"frames": row.frames, "frame_mode": row.frame_mode} | changed
        if shown is not None:
            return pipe.edit(shown, INSTRUCTION, callback=in_time, **settings)
        return pipe.generate(PROMPT, height=side, width=side, callback=in_time, **settings)

    return run


def _with_previews(
    pipe: BagelPipeline, row: Row, request: Callable[..., Result], full: dict[str, Any], done: list[Result]
) -> dict[str, Any]:
    """As many runs as are done, with a preview every so many steps: seconds beside the others', and of a preview."""
    alone: list[float] = []
    coming: list[Preview] = []

    def show(step: Step) -> None:
        if coming and coming[0].ready:
            start = time.perf_counter()
            coming.pop().image()
            alone.append(time.perf_counter() - start)
        if not coming and step.index % row.previews == 0:
            coming.append(step.preview())

    pipe.model.__dict__.pop("colors", None)
    start = time.perf_counter()
    _ = pipe.model.colors
    fitting = time.perf_counter() - start
    shown = [request(full, show) for _ in done]
    without, seconds = [min(r.stats.phases["denoise"].seconds for r in runs) for runs in (done, shown)]
    assert shown[-1].latent is not None and done[-1].latent is not None
    return {
        "preview_seconds": statistics.median(alone),
        "previews": len(alone) / len(done),
        "preview_fit_seconds": fitting,
        "previewed_runs": [r.stats.to_json() for r in shown],
        "previews_share": seconds / without - 1,
        "equals_without_previews": shown[-1].latent.equal(done[-1].latent),
    }


def picture(size: int) -> Image.Image:
    """A picture with structure at every scale, so that nothing in it is degenerate."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    values = np.zeros((size, size, 3))
    side = 2
    while side <= size:
        noise = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
        values += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), dtype=float) / side
        side *= 2
    values = (values - values.min()) / (values.max() - values.min())
    return Image.fromarray((values * 255).astype(np.uint8))


def _summary(results: list[Result]) -> dict[str, Any]:
    """Median and spread of seconds, peak memory, and the phases of every run."""
    seconds = [r.stats.seconds for r in results]
    peaks = [r.stats.peak_bytes for r in results if r.stats.peak_bytes is not None]
    found: dict[str, Any] = {
        "seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "peak_bytes": max(peaks, default=None),
        "runs": [r.stats.to_json() for r in results],
    }
    if results[0].image is None:
        rates = [(len(r.token_ids) - 1) / r.stats.phases["answer"].seconds for r in results]
        found |= {"tokens_per_second": statistics.median(rates), "tokens": len(results[0].token_ids)}
    return found


def _placement(pipe: BagelPipeline) -> dict[str, Any]:
    """Where everything is, what was predicted of it, and what the card holds now."""
    import torch

    plan, residency = pipe.model.plan, pipe.model.residency
    found: dict[str, Any] = {
        "linears": plan.reasons.get("linears"),
        "attention": pipe.model.attention.name,
        "offload": plan.offload,
        "guidance_batch": plan.guidance_batch,
        "streamed_units": len(residency.streamed),
        "streamed_bytes": residency.streamed_bytes,
        "planned_streamed": len(plan.residency.streamed),
        "source": residency.place,
        "slots": plan.residency.slots,
        "staged": plan.residency.staged,
        "predicted": None if plan.prediction is None else vars(plan.prediction),
        "reasons": dict(plan.reasons),
    }
    if pipe.model.others:
        found["others"] = [_beside(other.model) for other in pipe.model.others.values()]
    if pipe.model.bagel.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["device_used_bytes"] = total - free
    return found


def _beside(model: LoadedModel) -> dict[str, Any]:
    """The same of another card that takes part."""
    import torch

    plan, on_card = model.plan, model.device.type == "cuda"
    return {
        "device": plan.device,
        "launcher": plan.launcher,
        "linears": plan.reasons.get("linears"),
        "exchange": plan.reasons["exchange"],
        "streamed_units": len(model.residency.streamed),
        "streamed_bytes": model.residency.streamed_bytes,
        "predicted": None if plan.prediction is None else vars(plan.prediction),
        "reserved_bytes": torch.cuda.max_memory_reserved(model.device) if on_card else None,
    }


def _picture_figures(
    pipe: BagelPipeline,
    row: Row,
    conditions: Conditions,
    done: list[Result],
    again: Callable[[], Result],
    compared: bool,
) -> dict[str, Any]:
    """The picture beside its reference, and the time beside what is possible."""
    from lowmem_bagel.ops.errors import relative_l2

    plan, key = pipe.model.plan, row.drawing
    latent, phases = done[-1].latent, done[-1].stats.phases
    assert latent is not None
    denoise = min(result.stats.phases["denoise"].seconds for result in done)
    found: dict[str, Any] = {"finite": bool(latent.isfinite().all()), "denoise_seconds": denoise}
    for name in ("evaluations", "evaluations_computed"):
        if name in done[-1].settings:
            found[name] = done[-1].settings[name]
    guided, steps = _guided(row, row.timesteps or conditions.num_timesteps)
    forwards = guided * BRANCHES[row.task] + steps - guided
    passes = (guided if plan.guidance_batch else guided * BRANCHES[row.task]) + steps - guided
    if row.timesteps:
        all_guided, all_steps = _guided(row, conditions.num_timesteps)
        wanted = all_guided * BRANCHES[row.task] + all_steps - all_guided
        rest = sum(phase.seconds for name, phase in phases.items() if name != "denoise")
        found["extrapolated_seconds"] = rest + denoise * wanted / forwards
        found["extrapolated"] = f"from {forwards} forwards measured to the {wanted} of a whole picture"
    if row.is_reference:
        conditions.denoise_seconds[key] = denoise
        conditions.latents[*key, plan.guidance_batch] = latent
        if compared:
            pipe.model.plan = replace(plan, guidance_batch=not plan.guidance_batch)
            other = again().latent
            assert other is not None
            conditions.latents[*key, not plan.guidance_batch] = other
    elif row.compared and (*key, plan.guidance_batch) in conditions.latents:
        wanted_latent = conditions.latents[*key, plan.guidance_batch]
        found["equals_reference"] = latent.equal(wanted_latent)
        found["relative_l2_to_reference"] = relative_l2(latent, wanted_latent)
    turns = row.frames if row.frame_mode == "turn" else 1
    if found_bytes := pipe.model.residency.streamed_bytes:
        bounds = {"resident_denoise_seconds": conditions.denoise_seconds.get(key)}
        if conditions.copy_gbps:
            bounds["transfer_seconds"] = turns * passes * found_bytes / conditions.copy_gbps / 1e9
        known = [bound for bound in bounds.values() if bound]
        found |= bounds | {"times_the_bound": denoise / max(known) if known and not row.timesteps else None}
    return found


def _guided(row: Row, timesteps: int) -> tuple[int, int]:
    """Guided steps and all steps of a picture with the task's defaults."""
    from lowmem_bagel.planner.workload import guided_steps
    from lowmem_bagel.settings import PictureSettings, defaults_of, options_of

    defaults = defaults_of(options_of(PictureSettings, editing=row.task == "edit"))
    return guided_steps(timesteps, defaults["timestep_shift"], defaults["cfg_interval"]), timesteps - 1


def free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        used = [card for card in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(card)]
        torch.cuda.empty_cache()
        for card in {torch.cuda.current_device(), *used}:
            torch.cuda.reset_peak_memory_stats(card)

"""From an opened folder and a caller's settings to a plan for this machine: the planner's end that sees hardware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..checkpoint.check_tensors import USES, check_request
from ..checkpoint.folder import ModelFolder
from ..checkpoint.same_model import open_same
from ..diagnostics.features import check_switched_off
from ..diagnostics.probe import probe
from ..errors import CheckpointError, DoesNotFitError, SettingError
from ..formats.registry import check_backend
from ..hardware import host
from ..hardware.profile import HardwareProfile, as_switched
from ..settings import TASKS, LoadOptions, PictureSettings, Task, TextSettings
from ..units import parse_bytes
from .calibration import MEASURED
from .cards import PlanInputs
from .context_room import read_wish
from .devices import asked_devices, device_names
from .facts import ModelFacts
from .load_options import with_added
from .memory import Workload
from .plan import Plan
from .several import make_plans, seconds_of_several
from .solve import Limits, Need, Overrides, Placed, Request, breakdown, placed, placed_as
from .workload import Conversation, answered, guided_steps, most_frames, seen_grid

if TYPE_CHECKING:
    from ..checkpoint.config import BagelConfig
    from ..settings import AnswerSettings

__all__ = ["PlanInputs"]


def plan_for(folder: ModelFolder, options: LoadOptions) -> Plan:
    """The plan for a folder on this machine. Settings other than "auto" win and are checked.

    Raises:
        SettingError: a setting is unknown or impossible here.
        DoesNotFitError: no placement fits; the message says what would.
    """
    return plan_from(plan_inputs(folder, options), options)


def plan_from(inputs: PlanInputs, options: LoadOptions) -> Plan:
    """The plan from what `plan_inputs` found, changed by the options that come from outside the planner."""
    facts, made = inputs.facts, make_plans(inputs)
    reasons = {**facts.reading, **made.reasons}
    left = [task for task in options.tasks if task not in inputs.request.tasks]
    if left:
        reasons["tasks"] = f"{' and '.join(left)} cannot be done: {next(iter(facts.lacking.values())).line}"
    return with_added(replace(made, tune=options.tune, reasons=reasons), options)


def plan_inputs(folder: ModelFolder, options: LoadOptions) -> PlanInputs:
    """What a folder is planned from on this machine, which is probed.

    Raises:
        SettingError: a setting is unknown or malformed.
    """
    facts = ModelFacts.of_folder(folder)
    limits, request = asked_of(facts, options)
    check_switched_off()
    asked = asked_devices(options)
    names = [device.name for device in asked]
    profiles = {name: as_switched(this_machine(name)) for name in dict.fromkeys(names)}
    inputs = PlanInputs(facts, profiles[names[0]], limits, request)
    return with_variants(
        on_devices(inputs, names, [profiles[n] for n in names]),
        [device.variant for device in asked],
        lambda path: facts_beside(folder, path),
    )


def facts_beside(folder: ModelFolder, path: str) -> tuple[ModelFacts, str]:
    """Facts of the folder that another card holds in place of the first one's, and how it is known to be that model.

    Raises:
        CheckpointError: it is unusable, or another model.
    """
    other, known = open_same(folder, path)
    return ModelFacts.of_folder(other), known


def with_variants(
    inputs: PlanInputs, variants: Sequence[str], facts_of: Callable[[str], tuple[ModelFacts, str]]
) -> PlanInputs:
    """The same with what each card holds in place of the first one's, if that is said; see `facts_beside`.

    Raises:
        CheckpointError: as of `facts_of`, or the folder lacks an expert that the first one has.
    """

    def holding(card: PlanInputs, variant: str) -> PlanInputs:
        if not variant:
            return card
        facts, known = facts_of(variant)
        missing = inputs.facts.experts - facts.experts
        if missing:
            raise CheckpointError(f"{variant}: lacks the {' and '.join(sorted(missing))} expert; convert both experts")
        backend = card.limits.overrides.backend if facts.format == inputs.facts.format else "auto"
        limits = replace(card.limits, overrides=replace(card.limits.overrides, backend=backend))
        return card._replace(facts=facts, limits=limits, variant=variant, same=known)

    return inputs._replace(others=tuple(map(holding, inputs.others, variants[1:])))


def on_devices(inputs: PlanInputs, names: Sequence[str], machines: Sequence[HardwareProfile]) -> PlanInputs:
    """The same for devices of these names, which are these machines'; the first of them is the first card."""

    def on(name: str, machine: HardwareProfile) -> PlanInputs:
        limits = replace(inputs.limits, overrides=replace(inputs.limits.overrides, device=name))
        return inputs._replace(profile=machine, limits=limits)

    first, *others = map(on, names, machines)
    return first._replace(others=tuple(others))


class Alone(NamedTuple):
    """What a folder takes of the first device where all of its memory is free, in bytes: at most, context included, and
    beside weights."""

    peak: int
    working: int


def alone(folder: ModelFolder, options: LoadOptions) -> Alone:
    """What a folder would take, were all memory of its devices free.

    Raises:
        SettingError, DoesNotFitError: as of `plan_for`.
    """

    def freed(inputs: PlanInputs) -> PlanInputs:
        return inputs._replace(profile=replace(inputs.profile, vram_free=inputs.profile.vram_total))

    inputs = plan_inputs(folder, options)
    inputs = freed(inputs)._replace(others=tuple(map(freed, inputs.others)))
    plan = plan_from(inputs, options)
    if plan.prediction is None:
        return Alone(0, 0)
    phases = [] if plan.others else breakdown(plan, inputs.facts, inputs.profile, inputs.limits, inputs.request)
    return Alone(plan.prediction.peak_bytes, max((phase.arena + phase.activations for phase in phases), default=0))


def within(inputs: PlanInputs, allowed: float) -> PlanInputs:
    """The same where a plan may take no more of the first card than so many bytes, the process's context aside. What
    planning keeps free for itself need not be among them."""
    share = MEASURED.reserve_share / (1 - MEASURED.reserve_share)
    reserve = min(MEASURED.reserve_bytes, (allowed + MEASURED.context_bytes) * share)
    free = max(0, min(inputs.profile.vram_free, allowed + reserve))
    return inputs._replace(profile=replace(inputs.profile, vram_free=int(free)))


def asked_of(facts: ModelFacts, options: LoadOptions) -> tuple[Limits, Request]:
    """What the options say to the planner.

    Raises:
        SettingError: a size is none, or the model or its format cannot do what is asked.
    """
    check_backend(facts.spec, options.backend)
    limits = Limits(
        parse_bytes(options.max_vram, "max_vram"),
        parse_bytes(options.max_ram, "max_ram"),
        Overrides(device_names(options)[0], options.dtype, options.attention, options.backend, options.divide),
        read_wish(options.context_store),
    )
    request = request_for(facts, checked_tasks(facts, options.tasks), *options.size, options.step_cache)
    return limits, replace(
        request, frames=options.frames, frame_mode=options.frame_mode, input_pictures=options.pictures,
        conversation=_conversation(request.tasks, options),
    )  # fmt: skip


def _conversation(tasks: Sequence[Task], options: LoadOptions) -> Conversation | None:
    if options.max_rounds is None:
        return None
    missing = [task for task in ("edit", "ask") if task not in tasks]
    if missing:
        raise SettingError(f"answers in texts and pictures need the tasks edit and ask, and here is no {missing[0]}")
    return Conversation(options.max_rounds, options.max_new_tokens, options.chat_turns)


def checked_tasks(facts: ModelFacts, tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The tasks, if the model can do them; of all that there are, those that it can.

    Raises:
        SettingError: it was converted to answer alone.
        CheckpointError: it lacks a part that one of the tasks needs.
    """
    possible = tuple(task for task in tasks if not any(task in USES[part] for part in facts.lacking))
    whole = all(lack.whole for lack in facts.lacking.values())
    if whole and possible and set(tasks) == set(TASKS):
        tasks = possible
    for task in tasks:
        check_request(facts.lacking, task)
    if "gen" not in facts.experts and set(tasks) != {"ask"}:
        raise SettingError(
            f"{facts.name} cannot draw: it holds the und expert alone; ask it (tasks ('ask',)), or convert both experts"
        )
    return tuple(tasks)


def request_for(
    facts: ModelFacts, tasks: tuple[Task, ...], height: int = 1024, width: int = 1024, step_cache: str = "none"
) -> Request:
    """The request to plan for: sizes no larger than the model's position table covers."""
    config = facts.config
    longest = min(config.vae_resize.max_side, facts.latent_side * config.token_pixels or config.vae_resize.max_side)
    return Request(tasks=tasks, height=min(height, longest), width=min(width, longest), step_cache=step_cache)


def drawing_workload(
    config: BagelConfig, settings: PictureSettings, pictures: Sequence[tuple[int, int]], text_tokens: int
) -> Workload:
    """What a picture asks for: of its own size, timesteps, guidance and step cache, not of the largest planned for.

    `pictures` are width and height of those that are given, the last of them the one that is edited.
    """
    width, height = config.vae_resize.resized(*pictures[-1]) if pictures else (0, 0)
    request = Request(
        tasks=("edit" if pictures else "generate",),
        height=settings.height or height,
        width=settings.width or width,
        text_scale=settings.cfg_text_scale,
        image_scale=settings.cfg_img_scale,
        timesteps=settings.num_timesteps,
        shift=settings.timestep_shift,
        think=settings.think,
        text_tokens=text_tokens,
        new_tokens=settings.max_think_tokens,
        step_cache=settings.step_cache,
        frames=settings.frames,
        frame_mode=settings.frame_mode,
        input_pictures=len(pictures),
    )
    (workload,) = request.workloads(config)
    guided = 0
    if workload.guided_branches > 1:
        guided = guided_steps(settings.num_timesteps, settings.timestep_shift, settings.cfg_interval)
    workload = replace(workload, guided_steps=workload.step_cache.computed(guided))
    return _looking_at(workload, config, pictures)


def answer_workload(
    config: BagelConfig, settings: TextSettings, pictures: Sequence[tuple[int, int]], text_tokens: int
) -> Workload:
    """What an answer of the greatest length asks for; `pictures` are width and height of those asked about."""
    request = Request(tasks=("ask",), input_pictures=0, text_tokens=text_tokens, new_tokens=settings.max_new_tokens)
    (workload,) = request.workloads(config)
    return _looking_at(workload, config, pictures)


class Turn(Protocol):
    """An answer in texts and pictures as it is asked for: `generation.conversing.Outline`."""

    @property
    def config(self) -> BagelConfig: ...

    @property
    def settings(self) -> AnswerSettings: ...

    @property
    def rounds(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def pictures(self) -> Sequence[tuple[int, int]]: ...

    @property
    def text_tokens(self) -> int: ...

    @property
    def before(self) -> int: ...


def conversation_workload(turn: Turn, rounds: int | None = None) -> Workload:
    """What an answer in texts and pictures of the greatest length asks for, or would with so many pictures."""
    drawn, (width, height) = turn.settings.picture, turn.size
    drawing = drawing_workload(turn.config, replace(drawn, width=width, height=height), turn.pictures, turn.text_tokens)
    guided = drawn.cfg_text_scale > 1
    # The first picture may be one that is drawn: guidance by pictures does not wait for one that is given.
    branches = 1 + guided + (guided and drawn.cfg_img_scale > 1)
    alike = replace(drawing, guided_branches=branches, prefilled=turn.before)
    most = turn.settings.text.max_new_tokens
    return answered(alike, turn.config, turn.rounds if rounds is None else rounds, most)


def _looking_at(workload: Workload, config: BagelConfig, pictures: Sequence[tuple[int, int]]) -> Workload:
    """With the grids of the pictures that are given; those of frames in turn stay after them."""
    if not pictures:
        return workload
    given = [seen_grid(config, *picture) for picture in pictures]
    each = [*(tokens for _, tokens in given), *workload.seen_tokens[workload.given :]]
    grids = [*(grid for grid, _ in given), *workload.input_grids[workload.given :]]
    return replace(workload, input_grids=grids, vit_tokens=max(each), vit_each=each)


def check_frames(
    plan: Plan, inputs: PlanInputs, settings: PictureSettings, pictures: Sequence[tuple[int, int]], text_tokens: int
) -> None:
    """Refuse frames that no placement holds on the machine that the plan was made for; what one card does is known
    where several share the work, and not what they could do at last.

    Raises:
        DoesNotFitError: it says how many would fit.
    """

    def of(count: int) -> Workload:
        return drawing_workload(inputs.facts.config, replace(settings, frames=count), pictures, text_tokens)

    frames = settings.frames
    need, most = _what_fits(plan, inputs, frames, of)
    if need is None:
        return
    fit = f"{most} would fit" if most else "not even one fits; ask for a smaller size"
    raise DoesNotFitError(f"{frames} frames of {_size(of(1), inputs)} do not fit: {need.line}; {fit}")


def check_rounds(plan: Plan, inputs: PlanInputs, turn: Turn) -> None:
    """Refuse an answer in texts and pictures that no placement holds, as `check_frames` does frames.

    Raises:
        DoesNotFitError: it says how many pictures would fit.
    """
    rounds = turn.rounds
    need, most = _what_fits(plan, inputs, rounds + 1, lambda count: conversation_workload(turn, count - 1))
    if need is None:
        return
    asked, context = conversation_workload(turn), conversation_workload(turn, 0)
    what = "an answer" if not rounds else f"an answer of {rounds} pictures of {_size(asked, inputs)}"
    fit = f"max_rounds {most - 1} would fit"
    if not most:
        fit = "nor does a text alone: undo a turn, give fewer or smaller pictures, or allow fewer tokens"
    raise DoesNotFitError(f"{what} does not fit after {context.context_tokens} tokens of context: {need.line}; {fit}")


def _what_fits(plan: Plan, inputs: PlanInputs, wanted: int, of: Callable[[int], Workload]) -> tuple[Need | None, int]:
    """None, where as many as are wanted fit; else why not, and how many do."""
    if plan.others:
        return None, wanted
    limits = replace(inputs.limits, overrides=replace(inputs.limits.overrides, dtype=plan.dtype))

    def found(count: int) -> Placed | Need:
        return placed(inputs.facts, inputs.profile, limits, inputs.request, workloads=[of(count)])

    need = found(wanted)
    if isinstance(need, Placed):
        return None, wanted
    return need, most_frames(lambda count: isinstance(found(count), Placed), wanted)


def _size(workload: Workload, inputs: PlanInputs) -> str:
    rows, columns = workload.grid
    side = inputs.facts.config.token_pixels
    return f"{columns * side}x{rows * side}"


def predicted_seconds(plan: Plan, inputs: PlanInputs, workload: Workload) -> dict[str, float]:
    """Seconds of each phase ("prefill", "text", "denoise", "decode") of one request under a plan made from `inputs`.

    On a processor for the threads that PyTorch uses here, which may be fewer than there are cores.
    """
    if plan.others:
        return seconds_of_several(plan, inputs, workload)
    profile = inputs.profile
    if plan.device == "cpu":
        import torch

        profile = replace(profile, cores=min(profile.cores, torch.get_num_threads()))
    return placed_as(plan, inputs.facts, profile, inputs.limits, inputs.request).seconds(workload)


def this_machine(device: str) -> HardwareProfile:
    """This machine for a device: probed, but for what loading a model tries anyway.

    Raises:
        SettingError: a card is asked for that is not there.
    """
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return probe(measure=False, card=_card(device), for_advice=False)
    try:
        memory, (name, features) = host.memory(), host.processor()
        kind, cores = host.current_platform(), host.cores()
    except (OSError, ValueError):
        return probe(measure=False)  # which says what failed
    return HardwareProfile(
        platform=kind,
        ram_total=memory.total,
        ram_available=memory.available,
        cpu_name=name,
        cpu_features=features,
        cores=cores,
        native_bf16=bool(host.BF16_FEATURES.intersection(features)),
    )


def _card(device: str) -> int:
    """The number of the card that is asked for; the first where none is named."""
    import torch

    kind, _, index = device.partition(":")
    if kind != "cuda" or not index:
        return 0
    if not index.isdecimal():
        raise SettingError(f"unknown device {device!r}; use auto, cpu or cuda:0")
    if int(index) >= torch.cuda.device_count():
        raise SettingError(f"there is no {device}; {torch.cuda.device_count()} CUDA devices are usable")
    return int(index)

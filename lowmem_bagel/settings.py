"""What can be asked for: every option that a user has, declared once, and checked by what is declared.

An option is one field here. The keywords of `from_pretrained`, the settings of a request, the flags of the commands
with their help and what a server says of itself are made from the fields: adding an option is adding a field. An option
of loading that only changes the plan may also come from outside: see `planner.load_options`.
"""

from __future__ import annotations

import functools
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from .checkpoint.answer_styles import AUTO, style_names
from .errors import SettingError
from .option import Kind as Kind
from .option import Option as Option
from .sampling.step_caches.registry import step_caches
from .sampling.step_caches.speeds import DEFAULT_STEPS, EXACT, SPEEDS, chosen_cache
from .values import shown

if TYPE_CHECKING:
    from .checkpoint.config import BagelConfig

Task = Literal["generate", "edit", "ask"]
TASKS: tuple[Task, ...] = get_args(Task)
RenormType = Literal["global", "channel", "text_channel"]
FrameMode = Literal["together", "turn"]
MAX_FRAMES = 1000
MAX_ROUNDS = 100
MAX_NEW_TOKENS, MAX_TURNS = 32768, 1000
DTYPES = ("float32", "bfloat16", "float16")
DIVISIONS = ("auto", "guidance", "layers")
"""What several devices share: whatever pays, branches of guidance, or layers."""
MAX_SEED = 2**64 - 1

KINDS: Mapping[Any, Kind] = {
    bool: "flag",
    int: "whole",
    int | None: "whole",
    float: "number",
    tuple[float, float]: "pair",
    tuple[int, int]: "sides",
    str: "text",
    RenormType: "text",
    FrameMode: "text",
    Sequence[str]: "texts",
    Sequence[Task]: "names",
    str | float | None: "bytes",
    str | os.PathLike[str] | None: "path",
}
"""By a field's type."""


def option(
    default: Any,
    help: str,
    *,
    edit: Any = None,
    made: Callable[[], Any] | None = None,
    secret: bool = False,
    **about: Any,
) -> Any:
    """A dataclass field that is an option.

    Args:
        edit: the default of editing, where it is another.
        made: makes the value where none is given and `default` is None.
        secret: kept out of what the options print of themselves.
        about: what else an `Option` has. `choices` may be a function, so that nothing is looked up before it is asked.
    """
    metadata = {"default": default, "help": help, "edit": default if edit is None else edit, **about}
    given: dict[str, Any] = {"default_factory": made} if made else {"default": default}
    return field(**given, metadata=metadata, repr=not secret)


def options_of(declared: type, editing: bool = False) -> tuple[Option, ...]:
    """The options that are fields of a dataclass, with the defaults of drawing or of editing."""
    hints = _types_of(declared)
    return tuple(_option(f.name, KINDS[hints[f.name]], editing, **f.metadata) for f in fields(declared) if f.metadata)


@functools.cache
def _types_of(declared: type) -> dict[str, Any]:
    """By a field's name; looking them up takes most of the time of checking a request's settings."""
    return get_type_hints(declared)


def defaults_of(known: Iterable[Option]) -> dict[str, Any]:
    """The defaults that are known without a model or a machine, by name."""
    return {about.name: about.default for about in known if about.default is not None}


def _option(
    name: str, kind: Kind, editing: bool, *, default: Any, edit: Any, choices: Any = (), **about: Any
) -> Option:
    known: Iterable[str] = choices() if callable(choices) else choices
    return Option(name=name, kind=kind, default=edit if editing else default, choices=tuple(known), **about)


def step_cache_names() -> tuple[str, ...]:
    return tuple(step_caches())


def _speed_option() -> Any:
    means = "; ".join(f"{speed.name}: {speed.help}" for speed in SPEEDS.values())
    return option(EXACT.name, f"A step cache by what it is for. {means}", choices=tuple(SPEEDS))


def _seed() -> int:
    return secrets.randbelow(2**31)


def _seed_option() -> Any:
    return option(None, "Seed; default: a random one, which is reported", made=_seed, low=0, high=MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a folder is loaded. Checked when made, but for what only the folder or the machine can tell."""

    weights: str | os.PathLike[str] | None = option(  # noqa: RUF009
        None, "Which weights of a folder that holds several: their file"
    )
    base: str | os.PathLike[str] | None = option(  # noqa: RUF009
        None, "Checkpoint folder that completes what the folder lacks"
    )
    lora: Sequence[str] = option((), "LoRA adapter to add, as FOLDER or FOLDER:WEIGHT; again for one more")
    device: str = option("auto", "auto, cpu, or a CUDA device such as cuda:0")
    devices: str = option(
        "",
        "Several cards that share the work, such as 0,1; the first does what cannot be shared. 0,1=FOLDER: the second "
        "holds a variant of its own, of the same checkpoint",
    )
    divide: str = option("auto", "What several devices share, whether or not it pays", choices=DIVISIONS)
    dtype: str = option("auto", "Arithmetic", choices=("auto", *DTYPES))
    backend: str = option("auto", "What runs quantised linears, such as native, bitsandbytes or quanto")
    attention: str = option("auto", "Attention backend")
    max_vram: str | float | None = option(None, "Limit on GPU memory, such as 8GB")
    max_ram: str | float | None = option(None, "Limit on host memory, such as 16GB")
    tune: bool = option(True, "Time INT8's matmuls for some seconds when a card first runs them")
    tasks: Sequence[Task] = option(
        TASKS, "What it will be used for; what none needs is not loaded, and seconds are of the first",
        choices=TASKS, flag="--task", told_by_request=True,
    )  # fmt: skip
    step_cache: str = option("none", "Pictures are drawn with it", choices=step_cache_names, told_by_request=True)
    speed: str = option(
        EXACT.name, "Pictures are drawn as fast as that: a step cache by what it is for",
        choices=tuple(SPEEDS), told_by_request=True,
    )  # fmt: skip
    size: tuple[int, int] = option(
        (1024, 1024), "Largest picture, as WIDTHxHEIGHT or one side in pixels",
        low=1, high=1 << 16, told_by_request=True,
    )  # fmt: skip
    frames: int = option(
        1, "Frames of the largest request", low=1, high=MAX_FRAMES, told_by_request=True
    )  # fmt: skip
    frame_mode: FrameMode = option(  # noqa: RUF009
        "together", "Frames are drawn in one go, or one after the other", choices=get_args(FrameMode),
        told_by_request=True,
    )  # fmt: skip
    pictures: int = option(1, "Input pictures of the largest request", low=0, high=MAX_FRAMES, told_by_request=True)
    max_rounds: int | None = option(
        None, "Pictures that an answer in texts and pictures draws at most; default: none such is planned for",
        low=0, high=MAX_ROUNDS, told_by_request=True,
    )  # fmt: skip
    max_new_tokens: int = option(
        512, "Most tokens of each text of such an answer", low=1, high=MAX_NEW_TOKENS, told_by_request=True
    )
    chat_turns: int = option(
        1, "Turns of a chat of such answers that its contexts hold", low=1, high=MAX_TURNS, told_by_request=True
    )
    context_store: str | float | None = option(
        None, "Memory that keeps contexts which repeat, such as 2GB; auto takes some of what the plan leaves",
        told_by_request=True,
    )  # fmt: skip
    progress: Callable[[int, int], None] | None = None
    """Called with bytes loaded and bytes in all."""
    added: Mapping[str, Any] = field(default_factory=dict)
    """Values of the options in `planner.load_options`, by name."""

    def __post_init__(self) -> None:
        for known in options_of(LoadOptions):
            value = getattr(self, known.name)
            if known.kind != "whole" or value is not None or known.default is not None:  # which is no number
                object.__setattr__(self, known.name, known.checked(value))
        # Of the first task: seconds are of that one, and what caches keep differs by next to nothing.
        meant = chosen_cache(self.speed, self.step_cache, DEFAULT_STEPS, self.tasks[0] == "edit")
        object.__setattr__(self, "step_cache", meant)
        if self.progress is not None and not callable(self.progress):
            raise SettingError(f"progress must be a function, not {shown(self.progress)}")


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Settings of a sampled picture, or of frames. height and width are in pixels, None for the last input picture's
    size."""

    height: int | None = option(None, "Pixels, a multiple of 16", low=1, high=2**31)
    width: int | None = option(None, "Pixels, a multiple of 16", low=1, high=2**31)
    seed: int = _seed_option()
    num_timesteps: int = option(50, "Timesteps, at least 2", low=2, high=10_000)
    timestep_shift: float = option(
        3.0, "How many of the steps go to the composition: more, if larger", low=1e-3, high=1e3
    )
    cfg_text_scale: float = option(4.0, "Guidance by the text; 1 turns guidance off", low=0.0, high=1e3)
    cfg_img_scale: float = option(1.0, "Guidance by the picture", edit=2.0, low=0.0, high=1e3)
    cfg_interval: tuple[float, float] = option(
        (0.4, 1.0), "Timesteps guided: from, to", edit=(0.0, 1.0), low=0.0, high=1.0
    )
    cfg_renorm_type: RenormType = option(  # noqa: RUF009
        "global", "What guidance is renormalised over",
        edit="text_channel", choices=get_args(RenormType), aliases={"local": "channel"},
    )  # fmt: skip
    cfg_renorm_min: float = option(0.0, "Smallest renormalisation factor", low=0.0, high=1.0)
    think: bool = option(False, "Write a plan first")
    max_think_tokens: int = option(1000, "Most tokens of the plan", low=1, high=32768)
    frames: int = option(1, "Pictures to draw as frames of one sequence", low=1, high=MAX_FRAMES)
    frame_mode: FrameMode = option(  # noqa: RUF009
        "together", "Frames are drawn in one go, or each with those before it in its context",
        choices=get_args(FrameMode),
    )  # fmt: skip
    frame_delta: int = option(1, "Rope positions from frame to frame of those drawn together", low=1, high=1000)
    speed: str = _speed_option()
    step_cache: str = option("none", "Predict some steps instead of computing them", choices=step_cache_names)
    step_cache_settings: Mapping[str, float] = field(default_factory=dict)
    """What the step caches are told, by the names that they declare."""

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values.update(values.pop("step_cache_settings"))
        return values


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Settings of a generated answer; max_new_tokens counts the first token, im_start."""

    seed: int = _seed_option()
    max_new_tokens: int = option(512, "Most tokens of the answer", low=1, high=MAX_NEW_TOKENS)
    do_sample: bool = option(False, "Draw tokens, not the likeliest")
    temperature: float = option(0.3, "Of sampling: larger is more varied", low=0.0, high=100.0)
    top_p: float = option(1.0, "Of sampling: the likeliest tokens that make up this share", low=1e-6, high=1.0)
    think: bool = option(False, "Reason first")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Settings of an answer in texts and pictures: its own, and those of its texts and of its pictures."""

    style: str = option(
        AUTO, "How the model asks for a picture: by its family, which auto tells by the checkpoint's name",
        choices=style_names,
    )  # fmt: skip
    max_rounds: int | None = option(
        None, "Most pictures of the answer; default: what the style says, mostly 3", low=0, high=MAX_ROUNDS
    )
    text: TextSettings
    picture: PictureSettings

    def to_json(self) -> dict[str, Any]:
        own = {"style": self.style, "max_rounds": self.max_rounds}
        values = self.picture.to_json() | self.text.to_json() | own
        return {name: value for name, value in values.items() if name not in NOT_OF_ANSWERS}


NOT_OF_ANSWERS = ("frames", "frame_mode", "frame_delta", "max_think_tokens")
"""Settings of a picture that one in an answer cannot have."""


def answer_options(editing: bool = False) -> tuple[Option, ...]:
    """All options of an answer in texts and pictures; `editing`: there is a picture before it."""
    known = (*options_of(AnswerSettings), *options_of(TextSettings), *picture_options(editing))
    return tuple({about.name: about for about in reversed(known) if about.name not in NOT_OF_ANSWERS}.values())[::-1]


def answer_settings(
    config: BagelConfig, max_side: int, has_picture: bool, given: Mapping[str, Any], warn: Callable[[str], None]
) -> AnswerSettings:
    """Defaults filled in and every value checked; arguments as of `picture_settings`.

    Raises:
        SettingError: an unknown name or an impossible value.
    """
    values = _values(answer_options(has_picture), given)
    own, texts = ({about.name for about in options_of(kind)} for kind in (AnswerSettings, TextSettings))
    text = text_settings({name: value for name, value in values.items() if name in texts})
    picture = {name: value for name, value in values.items() if name not in own | (texts - {"seed"})}
    drawn = picture_settings(config, max_side, has_picture, picture | {"seed": text.seed}, warn)
    return AnswerSettings(text=text, picture=drawn, **{name: values[name] for name in own & values.keys()})


def picture_options(editing: bool = False) -> tuple[Option, ...]:
    """All options of a drawing or of an edit: the fields, and the numbers that step caches declare."""
    return options_of(PictureSettings, editing) + _cache_options()


def _cache_options() -> tuple[Option, ...]:
    declared = (own for cache in step_caches().values() for own in cache.settings)
    return tuple(
        Option(name=own.name, kind="number", help=own.help, default=own.default, low=own.low, high=own.high)
        for own in declared
    )


def check_prompt(text: object) -> None:
    """Refuse a text that says nothing or is no text.

    Raises:
        SettingError: it is no str, it is blank, or it holds bytes of the command line that are not UTF-8.
    """
    if not isinstance(text, str):
        raise SettingError(f"the prompt must be a text, not {shown(text)}")
    if not text.strip():
        raise SettingError("the prompt is empty; say what you want")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise SettingError("the prompt is not valid UTF-8 text; check the terminal's encoding")


def picture_settings(
    config: BagelConfig, max_side: int, has_picture: bool, given: Mapping[str, Any], warn: Callable[[str], None]
) -> PictureSettings:
    """Defaults filled in and every value checked.

    Args:
        max_side: the longest side in pixels that the model's position table covers.
        given: the caller's settings; None means the default.
        warn: told of every value that was changed.

    Raises:
        SettingError: an unknown name or an impossible value.
    """
    values = _values(picture_options(has_picture), given)
    largest = min(config.vae_resize.max_side, max_side)
    for name in ("height", "width"):
        if name in values:
            values[name] = _side(name, values[name], config.token_pixels, max_side, warn)
        elif not has_picture:
            values[name] = largest
    own = [about.name for about in _cache_options()]
    of_caches = {name: values.pop(name) for name in own}
    values["step_cache"] = chosen_cache(values["speed"], values["step_cache"], values["num_timesteps"] - 1, has_picture)
    return PictureSettings(**values, step_cache_settings=of_caches)


def of_turns(turns: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of frames that come each after a text of its own: as many as there are texts, and the first.

    Raises:
        SettingError: a text says nothing, or what is given says another number or way.
    """
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise SettingError(f"turns must be a list of texts, not {shown(turns)}")
    if not turns:
        return {}
    for text in turns:
        check_prompt(text)
    told = {"frames": len(turns) + 1, "frame_mode": "turn"}
    wrong = next((name for name in told if given.get(name) not in (None, told[name])), None)
    if wrong is not None:
        raise SettingError(f"{wrong} must be {told[wrong]} with {len(turns)} turns; leave it out")
    return told


def is_on(name: str, given: Mapping[str, Any]) -> bool:
    """A flag among the settings of a request, where it must be known before the others; off where it is not given.

    Raises:
        SettingError: it is neither true nor false.
    """
    value = given.get(name)
    return value is not None and bool(Option(name=name, kind="flag", help="").checked(value))


def text_settings(given: Mapping[str, Any]) -> TextSettings:
    """Defaults filled in and every value checked.

    Raises:
        SettingError: an unknown name or an impossible value.
    """
    settings = TextSettings(**_values(options_of(TextSettings), given))
    if settings.do_sample and settings.temperature == 0:
        raise SettingError("temperature 0 with sampling divides by zero; turn sampling off for the likeliest answer")
    return settings


def _values(known: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name: what is given, checked, and the defaults that are known here."""
    names = {about.name for about in known}
    unknown = sorted(set(given) - names)
    if unknown:
        raise SettingError(f"unknown setting {unknown[0]!r}; known are {', '.join(sorted(names))}")
    said = [about for about in known if given.get(about.name) is not None]
    return defaults_of(known) | {about.name: about.checked(given[about.name]) for about in said}


def _side(name: str, side: int, step: int, max_side: int, warn: Callable[[str], None]) -> int:
    if side > max_side:
        raise SettingError(f"{name} {side} is over the model's {max_side} pixels; ask for {max_side} or less")
    rounded = max(step, math.floor(side / step + 0.5) * step)
    rounded = min(rounded, max_side)
    if rounded != side:
        warn(f"{name} {side} is not a multiple of {step}; using {rounded}")
    return rounded

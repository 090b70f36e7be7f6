"""What can be asked for, checked: every setting of a request, its default and its limits."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from .errors import SettingError
from .sampling.step_caches.registry import step_cache, step_caches

if TYPE_CHECKING:
    from .checkpoint.config import BagelConfig
    from .sampling.guidance import RenormType

RENORM_ALIASES = {"local": "channel"}
RENORM_TYPES = ("global", "channel", "text_channel")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class PictureSettings:
    """Settings of a sampled picture. height and width are in pixels, None for the last input picture's size."""

    height: int | None
    width: int | None
    seed: int
    num_timesteps: int
    timestep_shift: float
    cfg_text_scale: float
    cfg_img_scale: float
    cfg_interval: tuple[float, float]
    cfg_renorm_type: RenormType
    cfg_renorm_min: float
    think: bool
    max_think_tokens: int
    step_cache: str
    step_cache_settings: Mapping[str, float]
    """What the step caches are told, by the names that they declare."""

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values.update(values.pop("step_cache_settings"))
        return values


@dataclass(frozen=True)
class TextSettings:
    """Settings of a generated answer; max_new_tokens counts the first token, im_start."""

    seed: int
    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    think: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


GENERATE_DEFAULTS: dict[str, Any] = {
    "num_timesteps": 50,
    "timestep_shift": 3.0,
    "cfg_text_scale": 4.0,
    "cfg_img_scale": 1.0,
    "cfg_interval": (0.4, 1.0),
    "cfg_renorm_type": "global",
    "cfg_renorm_min": 0.0,
    "think": False,
    "max_think_tokens": 1000,
    "step_cache": "none",
}
EDIT_DEFAULTS: dict[str, Any] = GENERATE_DEFAULTS | {
    "cfg_img_scale": 2.0,
    "cfg_interval": (0.0, 1.0),
    "cfg_renorm_type": "text_channel",
}


def check_prompt(text: str) -> None:
    """Refuse a text that says nothing or is no text.

    Raises:
        SettingError: it is blank, or holds bytes of the command line that are not UTF-8.
    """
    if not text.strip():
        raise SettingError("the prompt is empty; say what you want")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise SettingError("the prompt is not valid UTF-8 text; check the terminal's encoding")


def picture_settings(
    config: BagelConfig, max_side: int, has_picture: bool, given: dict[str, Any], warn: Callable[[str], None]
) -> PictureSettings:
    """Defaults filled in and every value checked.

    Args:
        max_side: the longest side in pixels that the model's position table covers.
        given: the caller's settings; None means the default.
        warn: told of every value that was changed.

    Raises:
        SettingError: an unknown name or an impossible value.
    """
    values = dict(EDIT_DEFAULTS if has_picture else GENERATE_DEFAULTS)
    default_side = None if has_picture else min(config.vae_resize.max_side, max_side)
    values |= {"height": default_side, "width": default_side, "seed": None}
    of_caches = [setting for cache in step_caches().values() for setting in cache.settings]
    values |= {setting.name: setting.default for setting in of_caches}
    values = _merged(values, given)
    step = config.token_pixels
    for name in ("height", "width"):
        values[name] = _side(name, values[name], step, max_side, warn)
    interval = values["cfg_interval"]
    if not isinstance(interval, Sequence) or len(interval) != 2:
        raise SettingError(f"cfg_interval must be two numbers (from, to), not {interval!r}")
    low, high = (_number("cfg_interval", v, 0.0, 1.0) for v in interval)
    if low > high:
        raise SettingError(f"cfg_interval is reversed: give ({high:g}, {low:g})")
    renorm = values["cfg_renorm_type"]
    renorm = RENORM_ALIASES.get(renorm, renorm)
    if renorm not in RENORM_TYPES:
        raise SettingError(f"unknown cfg_renorm_type {renorm!r}; choose one of {', '.join(RENORM_TYPES)}")
    return PictureSettings(
        height=values["height"],
        width=values["width"],
        seed=_seed(values["seed"]),
        num_timesteps=_whole("num_timesteps", values["num_timesteps"], 2, 10_000),
        timestep_shift=_number("timestep_shift", values["timestep_shift"], 1e-3, 1e3),
        cfg_text_scale=_number("cfg_text_scale", values["cfg_text_scale"], 0.0, 1e3),
        cfg_img_scale=_number("cfg_img_scale", values["cfg_img_scale"], 0.0, 1e3),
        cfg_interval=(low, high),
        cfg_renorm_type=cast("RenormType", renorm),
        cfg_renorm_min=_number("cfg_renorm_min", values["cfg_renorm_min"], 0.0, 1.0),
        think=bool(values["think"]),
        max_think_tokens=_whole("max_think_tokens", values["max_think_tokens"], 1, 32768),
        step_cache=step_cache(values["step_cache"]).name,
        step_cache_settings={s.name: _number(s.name, values[s.name], s.low, s.high) for s in of_caches},
    )


def text_settings(given: dict[str, Any]) -> TextSettings:
    """Defaults filled in and every value checked.

    Raises:
        SettingError: an unknown name or an impossible value.
    """
    values = _merged(
        {
            "seed": None,
            "max_new_tokens": 512,
            "do_sample": False,
            "temperature": 0.3,
            "top_p": 1.0,
            "think": False,
        },
        given,
    )
    if values["do_sample"] and values["temperature"] == 0:
        raise SettingError("temperature 0 with sampling divides by zero; turn sampling off for the likeliest answer")
    return TextSettings(
        seed=_seed(values["seed"]),
        max_new_tokens=_whole("max_new_tokens", values["max_new_tokens"], 1, 32768),
        do_sample=bool(values["do_sample"]),
        temperature=_number("temperature", values["temperature"], 0.0, 100.0),
        top_p=_number("top_p", values["top_p"], 1e-6, 1.0),
        think=bool(values["think"]),
    )


def _merged(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise SettingError(f"unknown setting {unknown[0]!r}; known are {', '.join(sorted(defaults))}")
    return defaults | {name: value for name, value in given.items() if value is not None}


def _seed(seed: object) -> int:
    if seed is None:
        return secrets.randbelow(2**31)
    return _whole("seed", seed, 0, MAX_SEED)


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SettingError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    return value


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise SettingError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
    return float(value)


def _side(name: str, value: object, step: int, max_side: int, warn: Callable[[str], None]) -> int | None:
    if value is None:
        return None
    side = _whole(name, value, 1, 2**31)
    if side > max_side:
        raise SettingError(f"{name} {side} is over the model's {max_side} pixels; ask for {max_side} or less")
    rounded = max(step, math.floor(side / step + 0.5) * step)
    rounded = min(rounded, max_side)
    if rounded != side:
        warn(f"{name} {side} is not a multiple of {step}; using {rounded}")
    return rounded

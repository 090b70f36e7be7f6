"""From options to widgets and back: which an option has, and what their values mean. No Gradio."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import SettingError
from ...settings import Option
from .texts import Language, option_help, option_label, say

Widget = Literal["slider", "number", "whole", "check", "choice", "text"]
COMMON = ("seed", "num_timesteps", "cfg_text_scale", "max_new_tokens", "think", "max_rounds")
"""Options that are always in sight, in this order; all others come in the order of their declaration, folded away."""
EXACT = 2**53
"""Whole numbers up to which a browser keeps every digit."""
STEPS = 100
"""Positions of a slider."""


@dataclass(frozen=True)
class Field:
    """One widget: what kind it is, and which part of the option's value it holds ("from" and "to" of a pair)."""

    option: Option
    widget: Widget
    value: Any
    part: str = ""

    def label(self, language: Language) -> str:
        name = option_label(self.option.name, language)
        return f"{name}: {say(self.part, language)}" if self.part else name

    def info(self, language: Language) -> str:
        """What the option means, and its limits."""
        about = self.option
        said = option_help(about.name, about.help, language)
        bounded = self.widget in ("number", "whole") and math.isfinite(about.high - about.low)
        return f"{said} ({say('limits', language, low=about.low, high=about.high)})" if bounded else said


def is_common(option: Option) -> bool:
    return option.name in COMMON


def in_order(options: Iterable[Option]) -> list[Option]:
    """The common ones first."""
    return sorted(options, key=lambda option: COMMON.index(option.name) if is_common(option) else len(COMMON))


def fields_of(option: Option) -> tuple[Field, ...]:
    """The widgets of an option, holding its default."""
    shown = shown_of(option, option.default)
    return tuple(Field(option, _widget(option), value, part) for value, part in zip(shown, _parts(option), strict=True))


def shown_of(option: Option, value: Any) -> tuple[Any, ...]:
    """What an option's widgets show for a value of it; None and "" are what stands for no value."""
    if option.kind == "pair":
        return (None, None) if value is None else (value[0], value[1])
    if _widget(option) == "text":
        return ("" if value is None else str(value),)
    return (value,)


def value_of(option: Option, shown: Sequence[Any]) -> Any:
    """An option's value from its widgets'; None where it is left to itself. What is impossible, its check refuses."""
    if option.kind == "pair":
        return None if None in shown else tuple(shown)
    value = shown[0]
    if option.kind in ("whole", "number") and isinstance(value, str):
        return _written(value, whole=option.kind == "whole")
    return value


def settings_of(options: Sequence[Option], shown: Sequence[Any]) -> dict[str, Any]:
    """What all widgets of some options show, one after the other, as the settings of a request."""
    left = iter(shown)
    return {option.name: value_of(option, [next(left) for _ in _parts(option)]) for option in options}


def shown_settings(options: Sequence[Option], settings: Mapping[str, Any]) -> list[Any]:
    """What all widgets of some options show for settings, and for those that are not among them their defaults.

    Raises:
        SettingError: a setting is impossible, as in a picture that was tampered with.
    """
    values: list[Any] = []
    for option in options:
        value = settings.get(option.name)
        values.extend(shown_of(option, option.default if value is None else option.checked(value)))
    return values


def checked_prompt(text: object, most: int) -> str:
    """The prompt that a picture carries.

    Raises:
        SettingError: it is none.
    """
    if not isinstance(text, str) or len(text) > most:
        raise SettingError("the picture's prompt is damaged; draw it again")
    return text


def _written(text: str, whole: bool) -> Any:
    """A number as it was typed, None where nothing was; what is none stays as it is, to be refused by name."""
    text = text.strip()
    try:
        return None if not text else int(text) if whole else float(text)
    except ValueError:
        return text


def _parts(option: Option) -> tuple[str, ...]:
    return ("from", "to") if option.kind == "pair" else ("",)


def _widget(option: Option) -> Widget:
    if option.kind == "flag":
        return "check"
    if option.choices:
        return "choice"
    if option.kind == "pair":
        return "slider" if option.high - option.low <= 1 else "number"
    if option.default is None or (option.kind == "whole" and option.high > EXACT):
        return "text"  # an empty field of numbers would be a 0 in the browser
    if option.kind == "number" and option.high - option.low <= 1:
        return "slider"
    return "whole" if option.kind == "whole" else "number" if option.kind == "number" else "text"

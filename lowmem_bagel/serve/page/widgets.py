"""Gradio's components as the page uses them: made from fields, and told their texts in another language later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...settings import Option
from .controls import STEPS, Field, fields_of, in_order, is_common, settings_of, shown_settings
from .imported import gradio as gr
from .texts import Language, say

Told = Callable[[Language], Mapping[str, Any]]
"""What a component is told of its texts, by its properties."""
LIVE: dict[str, Any] = {
    "show_progress": "hidden",
    "show_progress_on": [],
    "concurrency_limit": None,
    "api_visibility": "private",
}
"""Of every event: our queue is the one that counts, and we show the progress. Gradio would tell how far an event is to
every component that any event before changed, hidden or not: on this page that was three quarters of its work."""
START: Language = "en"
"""Until the browser has said what it wants."""


@dataclass
class Translated:
    """The page's components that hold texts, what those are in each language, and what they were made with."""

    told: list[tuple[Any, Told, Mapping[str, Any]]] = field(default_factory=list)

    def add(self, make: Callable[..., Any], told: Told, **about: Any) -> Any:
        """A component with its texts."""
        made = told(START)
        component = make(**made, **about)
        self.told.append((component, told, made))
        return component

    def add_keys(self, make: Callable[..., Any], keys: Mapping[str, str], **about: Any) -> Any:
        """A component whose properties are texts, by their keys."""
        return self.add(make, lambda language: {name: say(key, language) for name, key in keys.items()}, **about)

    @property
    def components(self) -> list[Any]:
        return [component for component, _, _ in self.told]

    def updates(self, language: Language) -> list[Any]:
        """Of each component, in their order."""
        return [gr.update(**told(language)) for _, told, _ in self.told]

    def first_updates(self, language: Language) -> list[Any]:
        """The same for a page that was just loaded, which has what they were made with: a browser takes long over
        updates, even those that change nothing."""
        return [gr.update(**_changes(made, told(language))) for _, told, made in self.told]


@dataclass
class Panel:
    """The widgets of some options, and what acts on them.

    Attributes:
        components: of all options in their order, one after the other.
        by_name: the first widget of each option.
        ratio, dropped: of pictures' settings: their ratio, and where a picture of ours is dropped.
    """

    options: Sequence[Option]
    reset: Any = None
    random: Any = None
    last: Any = None
    ratio: Any = None
    dropped: Any = None
    components: list[Any] = field(default_factory=list)
    by_name: dict[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> list[Any]:
        """What `updates` speaks of."""
        return [*self.components, *([] if self.ratio is None else [self.ratio])]

    def settings(self, shown: Sequence[Any]) -> dict[str, Any]:
        return settings_of(self.options, shown)

    def updates(self, settings: Mapping[str, Any]) -> dict[Any, Any]:
        """What the widgets show for settings; the defaults for {}.

        Raises:
            SettingError: a setting is impossible.
        """
        values = shown_settings(self.options, settings)
        updates = {component: gr.update(value=value) for component, value in zip(self.components, values, strict=True)}
        return updates if self.ratio is None else updates | {self.ratio: gr.update(value="")}

    def _add(self, texts: Translated, options: Iterable[Option], prefix: str) -> None:
        for option in options:
            made = [_widget(texts, about, prefix) for about in fields_of(option)]
            self.by_name[option.name] = made[0]
            self.components.extend(made)

    def build(self, texts: Translated, prefix: str, ratios: Told | None) -> Panel:
        """Make everything here; `ratios` tells the component of the ratio its choices, where there is one."""
        with gr.Row(equal_height=False, elem_classes="lb-fields"):
            if ratios is not None:
                self.ratio = texts.add(
                    gr.Dropdown, ratios, value="", filterable=False, min_width=180, elem_id=f"{prefix}-ratio"
                )
            self._add(texts, filter(is_common, self.options), prefix)
        with gr.Row(elem_classes="lb-buttons"):
            self.random = small_button(texts, "random_seed", prefix)
            self.last = small_button(texts, "last_seed", prefix)
            self.reset = small_button(texts, "reset", prefix)
        with texts.add_keys(gr.Accordion, {"label": "more"}, open=False, elem_id=f"{prefix}-more"):
            if ratios is not None:
                self.dropped = texts.add_keys(
                    gr.File, {"label": "dropped"}, file_types=["image"], height=150, elem_id=f"{prefix}-dropped"
                )
            with gr.Row(equal_height=False, elem_classes="lb-fields"):
                self._add(texts, (option for option in self.options if not is_common(option)), prefix)
        return self


def panel(texts: Translated, options: Iterable[Option], prefix: str, ratios: Told | None = None) -> Panel:
    """Widgets for options: the common ones in sight, the others folded away."""
    return Panel(in_order(options)).build(texts, prefix, ratios)


def small_button(texts: Translated, key: str, prefix: str, **about: Any) -> Any:
    name = f"{prefix}-{key.replace('_', '-')}"
    return texts.add_keys(gr.Button, {"value": key}, size="sm", min_width=90, elem_id=name, **about)


def _widget(texts: Translated, about: Field, prefix: str) -> Any:
    option = about.option
    shared: dict[str, Any] = {
        "value": about.value,
        "elem_id": "-".join(filter(None, (prefix, option.name, about.part))),
        "min_width": 180,
    }

    def told(language: Language) -> dict[str, Any]:
        said = {"label": about.label(language), "info": about.info(language)}
        empty = about.widget == "text" and option.default is None
        return said | ({"placeholder": say("by_itself", language)} if empty else {})

    if about.widget == "check":
        return texts.add(gr.Checkbox, told, **shared)
    if about.widget == "choice":
        return texts.add(gr.Dropdown, told, choices=list(option.choices), filterable=False, **shared)
    if about.widget == "slider":
        step = (option.high - option.low) / STEPS
        return texts.add(gr.Slider, told, minimum=option.low, maximum=option.high, step=step, **shared)
    if about.widget == "text":
        return texts.add(gr.Textbox, told, max_lines=1, **shared)
    whole = about.widget == "whole"
    return texts.add(gr.Number, told, precision=0 if whole else None, step=1 if whole else 0.1, **shared)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in after.items() if value != before[name]}


def picture_path(value: Any) -> Path | None:
    """Where an uploaded picture lies, from what a component holds before Gradio opens it; `guard` let the place in."""
    return Path(value["path"]) if isinstance(value, Mapping) and isinstance(value.get("path"), str) else None

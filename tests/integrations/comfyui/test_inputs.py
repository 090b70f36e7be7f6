"""Options as widgets: each kind there and back."""

from __future__ import annotations

from typing import Any

import pytest
from support.comfy import Comfy

from lowmem_bagel.integrations.comfyui import inputs
from lowmem_bagel.planner.load_options import load_options
from lowmem_bagel.settings import KINDS, LoadOptions, picture_options


def defaults(options: Any) -> dict[str, Any]:
    """What a node's untouched widgets give."""
    return {widget.id: widget.default for widget in inputs.widgets(options)}


def test_untouched_widgets_are_the_defaults(comfy: Comfy) -> None:
    known = load_options(planning=True)
    given = inputs.given(known, defaults(known))
    assert (
        LoadOptions(**{name: value for name, value in given.items() if hasattr(LoadOptions, name) or name == "lora"})
        == LoadOptions()
    )
    for editing in (False, True):
        settings = picture_options(editing)
        said = inputs.given(settings, defaults(settings))
        assert said.pop("seed") == 0
        assert said == {about.name: about.default for about in settings if about.default is not None}


def test_every_kind_has_a_widget() -> None:
    assert set(inputs.MADE) == set(inputs.READ) == set(KINDS.values())


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"size_height": 512, "size_width": 768}, {"size": (512, 768)}),
        ({"lora": " first:0.5\n\nsecond "}, {"lora": ("first:0.5", "second")}),
        ({"tasks": "generate, ask"}, {"tasks": ("generate", "ask")}),
        ({"max_vram": " 8GB "}, {"max_vram": "8GB"}),
        ({"max_vram": "", "base": " ", "tasks": "", "lora": ""}, {}),
        ({"size_height": 512}, {}),
        ({"tune": False}, {"tune": False}),
    ],
)
def test_what_widgets_say(values: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert inputs.given(load_options(planning=True), values) == wanted


def test_0_leaves_to_the_model_what_has_no_default_but_the_seed() -> None:
    values = {"height": 0, "width": 512, "seed": 0, "cfg_img_scale": 0.0}
    assert inputs.given(picture_options(), values) == {"width": 512, "seed": 0, "cfg_img_scale": 0.0}


def test_whats_not_shown_is_folded_away(comfy: Comfy) -> None:
    made = {widget.id: widget.as_dict() for widget in inputs.widgets(picture_options(), frozenset({"seed"}))}
    assert "advanced" not in made["seed"] and made["cfg_text_scale"]["advanced"] is True
    assert made["cfg_interval_from"]["min"] == 0 and made["cfg_interval_to"]["max"] == 1

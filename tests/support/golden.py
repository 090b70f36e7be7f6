"""The cases recorded from the original implementation."""

from __future__ import annotations

import json

from support.paths import GOLDEN

CASES = json.loads((GOLDEN / "cases" / "cases.json").read_text())
FP32_TOLERANCE = 1e-5


def request_of(name: str) -> tuple[list, dict]:
    """Terms and settings of a reference case, upstream's option names translated."""
    case = CASES["cases"][name]
    terms = [t["text"] if "text" in t else GOLDEN / "cases" / t["image"] for t in case["inputs"]]
    options = dict(case["options"])
    settings = {"seed": case["seed"], "think": options.pop("think", False)}
    limit = options.pop("max_think_token_n", None)
    if options.pop("understanding_output", False):
        return terms, settings | {"output": "text", "max_new_tokens": limit}
    if "image_shapes" in options:
        settings["height"], settings["width"] = options.pop("image_shapes")
    if options.pop("enable_taylorseer", False):
        settings["step_cache"] = "taylorseer"
    return terms, settings | options | {"output": "image", "max_think_tokens": limit}

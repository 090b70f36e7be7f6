"""In which order options have been widgets.

ComfyUI's front end saves a node's values by their places, so a widget keeps its own: names are only added, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...option import Option

LOADING = (
    "weights", "base", "lora", "device", "devices", "divide", "dtype", "backend", "attention", "max_vram", "max_ram",
    "tune", "tasks", "step_cache", "speed", "size", "frames", "frame_mode", "pictures", "context_store", "offload",
    "max_rounds", "max_new_tokens", "chat_turns",
)  # fmt: skip
ANSWERING = ("seed", "max_new_tokens", "do_sample", "temperature", "top_p", "think")
SAMPLING = (
    "num_timesteps", "timestep_shift", "cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_type",
    "cfg_renorm_min", "max_think_tokens", "step_cache", "step_cache_threshold",
)  # fmt: skip


def in_their_places(options: Iterable[Option], published: tuple[str, ...]) -> tuple[Option, ...]:
    """In the published order; what is newer, or another package's, comes after it."""
    places = {name: place for place, name in enumerate(published)}
    return tuple(sorted(options, key=lambda about: places.get(about.name, len(places))))

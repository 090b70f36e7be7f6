"""Sampler settings as one socket, from the declarations of `PictureSettings` and of the step caches."""

from __future__ import annotations

from typing import Any

from ....option import Option
from ....settings import picture_options
from .. import inputs
from ..widget_order import SAMPLING, in_their_places
from .common import CATEGORY, output, settings_socket

ON_NODES = ("height", "width", "seed", "think", "frames", "frame_mode", "frame_delta", "speed")
"""Settings that the nodes which draw have themselves."""


def on_nodes(names: tuple[str, ...]) -> tuple[Option, ...]:
    """Some of these, in this order."""
    known = {about.name: about for about in picture_options()}
    return tuple(known[name] for name in names)


class DrawingSettings:
    """How pictures are sampled: timesteps, guidance, step caches. What is not connected has these values too."""

    ID, NAME, EDITING = "LowmemBagelDrawingSettings", "BAGEL Drawing Settings", False

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        own = (about for about in picture_options(cls.EDITING) if about.name not in ON_NODES)
        return in_their_places(own, SAMPLING)

    @classmethod
    def define_schema(cls) -> Any:
        from comfy_api.latest import io

        names = frozenset(about.name for about in cls.options())
        return io.Schema(
            node_id=cls.ID,
            display_name=cls.NAME,
            category=CATEGORY,
            description=DrawingSettings.__doc__ or "",
            inputs=inputs.widgets(cls.options(), names),
            outputs=[output(settings_socket(), "settings")],
        )

    @classmethod
    def execute(cls, **values: Any) -> tuple[dict[str, Any]]:
        """The settings by name."""
        return (inputs.given(cls.options(), values),)


class EditingSettings(DrawingSettings):
    """The same with the defaults of editing."""

    ID, NAME, EDITING = "LowmemBagelEditingSettings", "BAGEL Editing Settings", True

"""Nodes that make a model: load one, and convert a checkpoint to a smaller format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import SettingError
from ....extensions import registered_names, tool
from ....planner.load_options import load_options
from .. import inputs, models
from ..widget_order import LOADING, in_their_places
from .common import CATEGORY, model_socket, output

if TYPE_CHECKING:
    from ..memory import ManagedModel

SHOWN = frozenset({"max_vram", "lora"})


def source_inputs() -> list[Any]:
    """Which model: one by its name, or any folder."""
    from comfy_api.latest import io

    names = models.model_names()
    return [
        io.Combo.Input("name", options=names, default=names[0], tooltip="A folder or file below models/bagel."),
        io.String.Input("path", default="", optional=True, tooltip="Another folder or file, in place of the name."),
    ]


class Load:
    """Loads a checkpoint or a variant, planned for the memory that ComfyUI can free; options as of `lowmem-bagel`."""

    @classmethod
    def define_schema(cls) -> Any:
        from comfy_api.latest import io

        return io.Schema(
            node_id="LowmemBagelLoad",
            display_name="BAGEL Load",
            category=CATEGORY,
            description=cls.__doc__ or "",
            inputs=[*source_inputs(), *inputs.widgets(in_their_places(load_options(planning=True), LOADING), SHOWN)],
            outputs=[output(model_socket(), "model")],
        )

    @classmethod
    def execute(cls, name: str, path: str = "", **values: Any) -> tuple[ManagedModel]:
        from ..memory import ManagedModel

        given = inputs.given(load_options(planning=True), values)
        if "base" in given:
            given["base"] = models.found(given["base"], models.KIND)
        if "lora" in given:
            given["lora"] = tuple(models.found(adapter, models.ADAPTERS) for adapter in given["lora"])
        model = ManagedModel(models.model_path(name, path), given)
        model.in_use()
        return (model,)


class Convert:
    """Makes a variant below models/bagel, unless one of that name is there. What is stopped goes on next time."""

    @classmethod
    def define_schema(cls) -> Any:
        from comfy_api.latest import io

        formats = registered_names("converters")
        return io.Schema(
            node_id="LowmemBagelConvert",
            display_name="BAGEL Convert",
            category=CATEGORY,
            description=cls.__doc__ or "",
            inputs=[
                *source_inputs(),
                io.Combo.Input("to", options=list(formats), default="int8", tooltip="Format."),
                io.String.Input(
                    "out", default="", optional=True, tooltip="Its name; by itself, the source's and the format's."
                ),
                io.Boolean.Input("answers_only", default=False, optional=True, tooltip="Leave out all that draws."),
            ],
            outputs=[output(io.String, "path", "variant")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, name: str, to: str, path: str = "", out: str = "", answers_only: bool = False) -> tuple[str]:
        """The path of the variant, for `Load`."""
        from ..progress import byte_progress

        source = models.model_path(name, path)
        target = _target(out.strip() or f"{source.stem if source.is_file() else source.name}-{to}")
        if target.exists():
            return (str(target),)
        show = byte_progress()
        target.parent.mkdir(parents=True, exist_ok=True)
        tool("convert")(
            source,
            target,
            to,
            experts=("und",) if answers_only else ("und", "gen"),
            report=lambda progress: show(progress.done, progress.total),
        )
        return (str(target),)


def _target(name: str) -> Path:
    """Below models/bagel, and nowhere else.

    Raises:
        SettingError: the name leads out of it.
    """
    if Path(name).name != name or name in (".", ".."):
        raise SettingError(f"{name!r} is no name of a folder; give one without slashes")
    return models.roots()[0] / name

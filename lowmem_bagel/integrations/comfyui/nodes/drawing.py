"""Nodes that draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import inputs
from .common import (
    CATEGORY,
    interleaved,
    model_input,
    output,
    picture_inputs,
    picture_names,
    prompt_input,
    settings_socket,
)
from .settings import on_nodes

if TYPE_CHECKING:
    from torch import Tensor

    from ..memory import ManagedModel

OF_PICTURES = ("width", "height", "seed", "speed", "think")
OF_FRAMES = ("frames", "frame_mode", "frame_delta")


def drawing_schema(node: Any, before: list[Any], names: tuple[str, ...], after: list[Any] | None = None) -> Any:
    """Of a node that draws: the model, what is drawn from, settings; pictures, their latents, the text before them."""
    from comfy_api.latest import io

    options = on_nodes(names)
    settings = settings_socket().Input("settings", optional=True, tooltip="More settings; without, the defaults.")
    return io.Schema(
        node_id=f"LowmemBagel{node.__name__}",
        display_name=node.NAME,
        category=CATEGORY,
        description=node.__doc__,
        inputs=[model_input(), *before, *inputs.widgets(options, frozenset(names)), settings, *(after or [])],
        outputs=[output(io.Image, "image", "drawn"), output(io.Latent, "latent"), output(io.String, "plan")],
    )


def drawn(
    model: ManagedModel, terms: list[Any], names: tuple[str, ...], values: dict[str, Any]
) -> tuple[Tensor, dict[str, Any], str]:
    """IMAGE, LATENT, and what was written first."""
    from ..pictures import to_image, to_latent
    from ..progress import watched

    settings = (values.get("settings") or {}) | inputs.given(on_nodes(names), values)
    pipeline = model.in_use()
    result = watched(lambda watch: pipeline.run(terms, output="image", callback=watch, **settings))
    return to_image(result.images), to_latent(result, model.config), result.text


class TextToImage:
    """Draws a picture from a text. 'think' has the model write a plan first."""

    NAME = "BAGEL Text to Image"

    @classmethod
    def define_schema(cls) -> Any:
        return drawing_schema(cls, [prompt_input("What is drawn.")], OF_PICTURES)

    @classmethod
    def execute(cls, model: ManagedModel, prompt: str, **values: Any) -> tuple[Any, ...]:
        return drawn(model, [prompt], OF_PICTURES, values)


class Edit:
    """Changes pictures as a text says: each of a batch on its own, from the same seed."""

    NAME = "BAGEL Edit"

    @classmethod
    def define_schema(cls) -> Any:
        from comfy_api.latest import io

        return drawing_schema(cls, [io.Image.Input("image"), prompt_input("What is to change.")], OF_PICTURES)

    @classmethod
    def execute(cls, model: ManagedModel, image: Tensor, prompt: str, **values: Any) -> tuple[Any, ...]:
        from ..pictures import from_image, joined

        return joined([drawn(model, [picture, prompt], OF_PICTURES, values) for picture in from_image(image)])


class Frames:
    """Draws several frames of one sequence, as a batch; after pictures, if some are connected."""

    NAME = "BAGEL Frames"

    @classmethod
    def define_schema(cls) -> Any:
        from comfy_api.latest import io

        before = io.Image.Input("image", optional=True, tooltip="What comes before, in order.")
        return drawing_schema(cls, [prompt_input("What happens.")], OF_PICTURES + OF_FRAMES, [before])

    @classmethod
    def execute(cls, model: ManagedModel, prompt: str, image: Tensor | None = None, **values: Any) -> tuple[Any, ...]:
        from ..pictures import from_image

        before = [] if image is None else from_image(image)
        return drawn(model, [*before, prompt], OF_PICTURES + OF_FRAMES, values)


class Interleave:
    """Draws after any texts and pictures: the text's marks <image> are where the connected pictures stand."""

    NAME = "BAGEL Interleave"

    @classmethod
    def define_schema(cls) -> Any:
        return drawing_schema(
            cls, [prompt_input("Texts, with <image> for each picture.", "text")], OF_PICTURES, picture_inputs()
        )

    @classmethod
    def execute(cls, model: ManagedModel, text: str, **values: Any) -> tuple[Any, ...]:
        images = [values[name] for name in picture_names() if values.get(name) is not None]
        return drawn(model, interleaved(text, images), OF_PICTURES, values)

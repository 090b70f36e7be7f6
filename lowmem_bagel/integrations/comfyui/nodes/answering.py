"""Nodes that answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....settings import TextSettings, options_of
from .. import inputs
from ..widget_order import ANSWERING, in_their_places
from .common import CATEGORY, interleaved, model_input, output, picture_inputs, picture_names, prompt_input

if TYPE_CHECKING:
    from torch import Tensor

    from ..memory import ManagedModel

SHOWN = frozenset({"seed", "max_new_tokens", "think"})


def answering_schema(node: Any, before: list[Any], after: list[Any]) -> Any:
    """Of a node that answers, with all settings of a text."""
    from comfy_api.latest import io

    options = in_their_places(options_of(TextSettings), ANSWERING)
    return io.Schema(
        node_id=f"LowmemBagel{node.__name__}",
        display_name=node.NAME,
        category=CATEGORY,
        description=node.__doc__,
        inputs=[model_input(), *before, *inputs.widgets(options, SHOWN), *after],
        outputs=[output(io.String, "answer")],
    )


def answered(model: ManagedModel, terms: list[Any], values: dict[str, Any]) -> tuple[str]:
    from ..progress import watched

    settings = inputs.given(options_of(TextSettings), values)
    pipeline = model.in_use()
    return (watched(lambda watch: pipeline.run(terms, output="text", callback=watch, **settings)).text,)


class Ask:
    """Answers a question, about pictures if some are connected: a batch is looked at in one go."""

    NAME = "BAGEL Ask"

    @classmethod
    def define_schema(cls) -> Any:
        from comfy_api.latest import io

        return answering_schema(cls, [prompt_input("The question.")], [io.Image.Input("image", optional=True)])

    @classmethod
    def execute(cls, model: ManagedModel, prompt: str, image: Tensor | None = None, **values: Any) -> tuple[str]:
        from ..pictures import from_image

        return answered(model, [*([] if image is None else from_image(image)), prompt], values)


class InterleaveAnswer:
    """Answers after any texts and pictures: the text's marks <image> are where the connected pictures stand."""

    NAME = "BAGEL Interleave, Answer"

    @classmethod
    def define_schema(cls) -> Any:
        text = prompt_input("Texts, with <image> for each picture.", "text")
        return answering_schema(cls, [text], picture_inputs())

    @classmethod
    def execute(cls, model: ManagedModel, text: str, **values: Any) -> tuple[str]:
        images = [values[name] for name in picture_names() if values.get(name) is not None]
        return answered(model, interleaved(text, images), values)

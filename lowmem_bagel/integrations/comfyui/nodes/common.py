"""What nodes have in common: their sockets, and texts with pictures between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

CATEGORY = "BAGEL"
MARK = "<image>"
PICTURES = 8
"""Sockets for pictures of an interleaving."""


def model_socket() -> Any:
    """The type of what `Load` gives."""
    from comfy_api.latest import io

    return io.Custom("BAGEL_MODEL")


def settings_socket() -> Any:
    """The type of what the settings' nodes give."""
    from comfy_api.latest import io

    return io.Custom("BAGEL_SETTINGS")


def conversation_socket() -> Any:
    """The type of what was said so far."""
    from comfy_api.latest import io

    return io.Custom("BAGEL_CONVERSATION")


def output(kind: Any, name: str, id: str = "", **more: Any) -> Any:
    """One that is shown by its name, which older versions do of those alone that say it twice. An `id` of its own has
    what is called like an input: to them that would be the same."""
    return kind.Output(id or name, name, **more)


def nothing() -> Any:
    """In place of an output that there is not this time: ComfyUI leaves out what would be run with it."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(None)


def model_input() -> Any:
    return model_socket().Input("model", tooltip="Of the node that loads BAGEL.")


def prompt_input(tip: str, name: str = "prompt") -> Any:
    from comfy_api.latest import io

    return io.String.Input(name, multiline=True, default="", dynamic_prompts=True, tooltip=tip)


def picture_inputs() -> list[Any]:
    from comfy_api.latest import io

    tip = f"Stands where the text says {MARK}, in the order of the sockets; of a batch, each picture has its own mark."
    return [io.Image.Input(name, optional=True, tooltip=tip) for name in picture_names()]


def picture_names() -> tuple[str, ...]:
    return tuple(f"picture_{number}" for number in range(1, PICTURES + 1))


def interleaved(text: str, images: list[Tensor]) -> list[Any]:
    """Terms of a request: the texts between the marks, and the pictures in the marks' places.

    Raises:
        SettingError: there are more marks than pictures, or fewer.
    """
    from ..pictures import from_image

    pictures = [picture for image in images for picture in from_image(image)]
    first, *rest = text.split(MARK)
    if len(rest) != len(pictures):
        raise SettingError(f"the text has {len(rest)} marks {MARK} for {len(pictures)} pictures; give each its own")
    terms: list[Any] = [first]
    for picture, after in zip(pictures, rest, strict=True):
        terms += [picture, after]
    return [term for term in terms if not isinstance(term, str) or term.strip()]

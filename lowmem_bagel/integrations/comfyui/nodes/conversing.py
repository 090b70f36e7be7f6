"""The node that answers in texts and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....option import Option
from ....settings import answer_options
from .. import inputs
from .common import (
    CATEGORY,
    MARK,
    conversation_socket,
    interleaved,
    model_input,
    nothing,
    output,
    picture_inputs,
    picture_names,
    prompt_input,
    settings_socket,
)

if TYPE_CHECKING:
    from ..conversation import Conversation
    from ..memory import ManagedModel

SHOWN = ("max_rounds", "max_new_tokens", "seed", "width", "height", "think")
FOLDED = ("style", "speed", "do_sample", "temperature", "top_p")


def options() -> tuple[Option, ...]:
    """What the node has itself; the other settings of its pictures come by the socket."""
    known = {about.name: about for about in answer_options()}
    return tuple(known[name] for name in SHOWN + FOLDED)


class Converse:
    """Answers in texts and pictures: writes, draws where the model asks for a picture, looks at it and writes on. With
    a conversation connected it goes on from there, in the style of its first node."""

    @classmethod
    def define_schema(cls) -> Any:
        from comfy_api.latest import io

        tip = f"Texts, with {MARK} for each picture."
        before = conversation_socket().Input("conversation", optional=True, tooltip="What was said before.")
        settings = settings_socket().Input("settings", optional=True, tooltip="Of its pictures; without, the defaults.")
        widgets = inputs.widgets(options(), frozenset(SHOWN))
        return io.Schema(
            node_id="LowmemBagelConverse",
            display_name="BAGEL Converse",
            category=CATEGORY,
            description=cls.__doc__ or "",
            inputs=[model_input(), before, prompt_input(tip, "text"), *widgets, settings, *picture_inputs()],
            outputs=[
                output(io.String, "answer", tooltip=f"{MARK} stands where it has a picture."),
                output(io.Image, "pictures"),
                output(conversation_socket(), "conversation", "said"),
            ],
        )

    @classmethod
    def execute(
        cls, model: ManagedModel, text: str, conversation: Conversation | None = None, **values: Any
    ) -> tuple[Any, ...]:
        """The answer; its pictures, or nothing that nodes after this one could be run with; what was said."""
        from ....generation.chat import OF_CHAT
        from ....generation.conversing import Said
        from ..conversation import said, taken_up
        from ..pictures import to_image
        from ..progress import watched

        known = {about.name for about in answer_options()}
        of_pictures = {name: value for name, value in (values.get("settings") or {}).items() if name in known}
        given = of_pictures | inputs.given(options(), values)
        held = {name: given.pop(name) for name in OF_CHAT if name in given}
        terms = interleaved(text, [values[name] for name in picture_names() if values.get(name) is not None])
        chat = taken_up(model.in_use(), conversation, held)
        answer = watched(lambda watch: chat.say(terms, callback=watch, **given))
        told = "".join(piece.text if isinstance(piece, Said) else MARK for piece in answer.pieces)
        return told, to_image(answer.images) if answer.images else nothing(), said(chat)

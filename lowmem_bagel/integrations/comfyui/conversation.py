"""A conversation as what goes from node to node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import SettingError
from ...generation.chat import OF_CHAT

if TYPE_CHECKING:
    from ...generation.chat import Chat
    from ...generation.conversing import Turn
    from ...pipeline import BagelPipeline


@dataclass(frozen=True, eq=False)
class Conversation:
    """What was said so far, which no node changes, so that several can go on from one.

    Attributes:
        path: the model's.
        held: settings that hold for all of it.
        chat: where it was said: it still has the keys, until something else is said in it, or memory runs out.
    """

    path: Path
    held: Mapping[str, Any]
    turns: tuple[Turn, ...]
    chat: Chat


def said(chat: Chat) -> Conversation:
    """The conversation as it is now."""
    held = {name: chat.settings[name] for name in OF_CHAT if name in chat.settings}
    return Conversation(chat.model.folder.path, held, chat.turns, chat)


def taken_up(pipeline: BagelPipeline, before: Conversation | None, settings: Mapping[str, Any]) -> Chat:
    """A chat to say the next thing in: the one before, where nothing else was said in it and its model is still loaded,
    and else another that reads again what was said, to the same bits.

    Args:
        settings: what holds for all of a conversation, where it begins.

    Raises:
        SettingError: the conversation is another model's.
    """
    if before is None:
        return pipeline.chat(**settings)
    model = pipeline.model
    if before.path != model.folder.path:
        raise SettingError(f"the conversation is {before.path.name}'s; go on with the model that it was begun with")
    here = before.chat.model is model and len(before.chat.turns) == len(before.turns)
    if here and all(a is b for a, b in zip(before.chat.turns, before.turns, strict=True)):
        return before.chat
    chat = pipeline.chat(**before.held)
    chat.take_up(before.turns)
    return chat

"""Which chats keep their keys between turns: those that were answered last, as far as memory is meant for them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

if TYPE_CHECKING:
    from ..generation.chat import Chat


class KeptChats:
    """Used by the thread that answers, and no other: a chat's keys are its own.

    Args:
        most: bytes that chats may keep beside the one that is answered.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._answered: list[ReferenceType[Chat]] = []
        """The last one last; those that nobody has any more are gone."""

    def make_room(self, chat: Chat) -> None:
        """This one is answered now: of the others, those that were not for longest let go of their keys."""
        others = [one for one in (known() for known in self._answered) if one is not None and one is not chat]
        kept = 0
        for other in reversed(others):
            kept += other.kept_bytes
            if kept > self.most:
                kept -= other.forget()
        self._answered = [ref(one) for one in (*others, chat)]

"""A conversation that keeps its contexts from turn to turn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..checkpoint.answer_styles import style_name
from ..errors import SettingError, first_line
from ..runtime.loaded import LoadedModel
from ..settings import AnswerSettings, answer_settings
from .continued import Continued, Kept, Reached
from .conversing import Answer, Conversing, Outline, Turn, pictures_of
from .executor import Callback
from .inputs import Term, open_terms

if TYPE_CHECKING:
    from PIL import Image

    from ..pictures.callers import PictureSource
    from ..pictures.clips import Clip

OF_CHAT = ("style", "think")
"""Settings that hold for all of a conversation."""


class Carry(Protocol):
    """Does something with the model in its turn, again from the beginning where memory ran out meanwhile."""

    def __call__(self, request: Callable[[], Answer]) -> Answer: ...


class Chat:
    """A conversation: what is said in it is answered in texts and pictures, with all that came before in the contexts.

    Keys of what was said and drawn are kept from turn to turn, until memory runs out; then they are made again from
    the tokens and pictures, to the same bits. Made by `BagelPipeline.chat` and `open_chat`.

    Attributes:
        settings: given for all turns; those of a turn are added to them.
    """

    def __init__(
        self, model: LoadedModel, carry: Carry, check: Callable[[Outline], None], warn: Callable[[str], None],
        given: Mapping[str, Any], keeping: bool = True,
    ) -> None:  # fmt: skip
        """check: refuses a turn that the machine cannot hold."""
        self.model, self._carry, self._check, self._warn, self._keeping = model, carry, check, warn, keeping
        wanted = self._checked(given, pictured=False).style
        self.settings = {**given, "style": style_name(wanted, model.folder.names)}
        self._turns: list[Turn] = []
        self._reached: list[Reached] = [Reached()]
        """After each turn, as far as the keys that are kept go."""
        self._kept: Kept | None = None
        model.keepers.add(self)

    @property
    def turns(self) -> tuple[Turn, ...]:
        return tuple(self._turns)

    def say(
        self, terms: str | Iterable[str | PictureSource | Clip], *, callback: Callback | None = None, **settings: Any
    ) -> Answer:
        """Say something and have it answered.

        Args:
            terms: texts and pictures as of `BagelPipeline.run`, or one text.
            callback: gets every token, every sampling step, and every text and picture that is done.
            settings: of this turn, in place of those of the chat. Style and think hold for all of it.

        Raises:
            SettingError, ImageError: it cannot be asked so; the chat is as it was.
            DoesNotFitError: no placement of the model leaves room for it; the chat is as it was.
            Cancelled: the callback returned False; the chat is as it was.
        """
        if callback is not None and not callable(callback):
            raise SettingError(f"callback must be a function, not {type(callback).__name__}")
        fixed = next((name for name in OF_CHAT if settings.get(name) not in (None, self.settings.get(name))), None)
        if fixed is not None:
            raise SettingError(f"{fixed} holds for all of a chat; begin another one with it")
        opened = tuple(open_terms([terms] if isinstance(terms, str) else terms))
        for note in (note for term in opened if not isinstance(term, str) for note in term.notes):
            self._warn(note)
        given = self.settings | {name: value for name, value in settings.items() if value is not None}
        changed: list[str] = []
        pictured = self._last_picture(len(self._turns), opened) is not None
        checked = self._checked(given, pictured, changed.append)
        for note in changed:
            self._warn(note)
        self._check(self._conversing(opened, checked, len(self._turns)).outline(self._turns))
        return self._carry(lambda: self._answered(opened, checked, callback))

    def undo(self) -> bool:
        """Forget the last turn; False where there is none."""
        if not self._turns:
            return False
        self._turns.pop()
        del self._reached[len(self._turns) + 1 :]
        if self._kept is not None:
            self._kept = self._kept.back_to(self._reached[-1])
        return True

    def forget(self) -> int:
        """Let go of the keys, which the next turn then makes again; returns their bytes on the first device."""
        kept, self._kept = self._kept, None
        del self._reached[1:]
        return 0 if kept is None else kept.kv_cache.nbytes

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write tokens, pictures and settings, without keys, to one zip file; `BagelPipeline.open_chat` reads it.

        Raises:
            OutputError: it cannot be written.
        """
        from .chat_file import write_chat

        return write_chat(path, self.model.folder.path.name, self.settings, self._turns)

    def take_up(self, turns: Iterable[Turn]) -> None:
        """Go on from turns that were saved; their keys are made with the next one."""
        self._turns = [*turns]

    def _answered(self, terms: tuple[Term, ...], settings: AnswerSettings, callback: Callback | None) -> Answer:
        while len(self._reached) <= len(self._turns):
            number = len(self._reached) - 1
            done = self._turns[number]
            self._carry_out(self._conversing(done.terms, done.settings, number), done)
        turn = self._conversing(terms, settings, len(self._turns), callback)
        answer = self._carry_out(turn, None)
        self._turns.append(Turn(terms, settings, answer.pieces, answer.ended))
        return answer

    def _carry_out(self, turn: Conversing, script: Turn | None) -> Answer:
        before = self._reached[-1]
        try:
            contexts = turn.begin(self._taken(), script)
        except BaseException:
            self.forget()
            raise
        try:
            ended = turn.carry_out(contexts, script)
        except torch.OutOfMemoryError:
            self.forget()
            raise
        except BaseException:
            self._keep(contexts, before)
            raise
        self._reached.append(contexts.reached())
        self._keep(contexts, self._reached[-1])
        return turn.result(ended)

    def _keep(self, contexts: Continued, reached: Reached) -> None:
        if not self._keeping:
            return
        try:
            self._kept = contexts.kept().back_to(reached)
        except torch.OutOfMemoryError as error:
            self.forget()
            self.model.note("kept chat", f"its keys are made again: {first_line(error)}")

    def _taken(self) -> Kept | None:
        """The keys, which are moved, so that they are not there twice."""
        kept, self._kept = self._kept, None
        return kept

    def _conversing(
        self, terms: tuple[Term, ...], settings: AnswerSettings, number: int, callback: Callback | None = None
    ) -> Conversing:
        return Conversing(self.model, terms, settings, self._last_picture(number), callback)

    def _last_picture(self, number: int, terms: tuple[Term, ...] = ()) -> Image.Image | None:
        """Before the turn of this number, or in these terms of it."""
        found = [image for turn in self._turns[:number] for image in pictures_of(turn.terms, turn.pieces)]
        return next(reversed([*found, *pictures_of(terms)]), None)

    def _checked(
        self, given: Mapping[str, Any], pictured: bool, warn: Callable[[str], None] = lambda _: None
    ) -> AnswerSettings:
        folder = self.model.folder
        return answer_settings(folder.config, folder.max_side, pictured, given, warn)

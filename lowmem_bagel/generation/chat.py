"""A conversation that keeps its contexts from turn to turn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..checkpoint.answer_styles import AUTO, style_name
from ..errors import SettingError, first_line
from ..runtime.loaded import LoadedModel
from ..settings import AnswerSettings, answer_settings
from .continued import Continued, Kept, Reached
from .conversing import Answer, Conversing, Outline, Turn, pictures_of
from .executor import Begun, Callback, Repeated, report
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


@dataclass(frozen=True)
class PreparedTurn:
    """A turn that was checked: its terms opened, every setting filled in, the seed drawn.

    changed: settings that were changed, in words.
    """

    terms: tuple[Term, ...]
    settings: AnswerSettings
    changed: tuple[str, ...]
    outline: Outline

    @property
    def notes(self) -> tuple[str, ...]:
        """What its caller ought to know of how it was read."""
        of_pictures = (note for term in self.terms if not isinstance(term, str) for note in term.notes)
        return (*of_pictures, *self.changed)


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

    @property
    def pixels(self) -> int:
        """Of all its pictures."""
        seen = (image for turn in self._turns for image in pictures_of(turn.terms, turn.pieces))
        return sum(image.width * image.height for image in seen)

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
        prepared = self.prepare(terms, **settings)
        for note in prepared.notes:
            self._warn(note)
        return self.carry_out(prepared, callback)

    def prepare(self, terms: str | Iterable[str | PictureSource | Clip], **settings: Any) -> PreparedTurn:
        """Check a turn whole, and open its pictures, without using the device: for those who queue turns.

        Raises:
            SettingError, ImageError, DoesNotFitError: as for `say`, which is this and then `carry_out`.
        """
        held = {"think": False} | {name: self.settings[name] for name in OF_CHAT if name in self.settings}
        asked = {name: settings.get(name) for name in OF_CHAT}
        if asked["style"] == AUTO:
            asked["style"] = None
        fixed = next((name for name in OF_CHAT if asked[name] not in (None, held[name])), None)
        if fixed is not None:
            raise SettingError(f"{fixed} holds for all of a chat; begin another one with it")
        opened = tuple(open_terms([terms] if isinstance(terms, str) else terms))
        given = {name: value for name, value in settings.items() if value is not None and name not in OF_CHAT}
        changed: list[str] = []
        pictured = self._last_picture(len(self._turns), opened) is not None
        checked = self._checked(self.settings | given, pictured, changed.append)
        outline = self._conversing(opened, checked, len(self._turns)).outline(self._turns)
        self._check(outline)
        return PreparedTurn(opened, checked, tuple(changed), outline)

    def carry_out(self, prepared: PreparedTurn, callback: Callback | None = None) -> Answer:
        """Answer what was prepared, when its turn has come.

        Raises:
            PipelineClosedError, DoesNotFitError, Cancelled: as for `say`.
        """
        return self._carry(lambda: self._answered(prepared.terms, prepared.settings, callback))

    def undo(self) -> bool:
        """Forget the last turn; False where there is none."""
        if not self._turns:
            return False
        self._turns.pop()
        del self._reached[len(self._turns) + 1 :]
        if self._kept is not None:
            self._kept = self._kept.back_to(self._reached[-1])
        return True

    @property
    def kept_bytes(self) -> int:
        """Of the keys that are kept, on the first device."""
        return 0 if self._kept is None else self._kept.kv_cache.nbytes

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
            again = None if callback is None else lambda event: callback(Repeated())
            self._carry_out(self._conversing(done.terms, done.settings, number, again), done)
        report(callback, Begun())
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

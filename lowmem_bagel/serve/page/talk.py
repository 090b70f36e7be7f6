"""The chat tab: what is said in it, answers as they come in texts and pictures, and the chat kept as a file."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradio.utils import get_upload_folder

from ...errors import BusyError, LowmemBagelError
from ...settings import answer_options
from ..jobs import Job
from ..service import Service
from . import markup
from .actions import Clients, View, opened_terms
from .imported import gradio as gr
from .markup import Part, Shown
from .texts import Language, language_of, say
from .widgets import Panel, picture_path

if TYPE_CHECKING:
    from ...generation.chat import Chat
    from ...generation.conversing import Piece
    from ...generation.inputs import Term

LOG = logging.getLogger(__name__)
TAB = "chat"
MOST = 200
"""Chats of pages that are remembered."""
Updates = dict[Any, Any]


@dataclass
class Talk:
    """A page's chat, None until something was said; and its turns as they are shown."""

    chat: Chat | None = None
    turns: list[Shown] = field(default_factory=list)


@dataclass(frozen=True)
class Saying:
    """A wish to say something in a chat, which begins with it where there is none."""

    talk: Talk
    terms: Sequence[str | Path]
    settings: Mapping[str, Any]

    def submitted(self, service: Service, client: str) -> Job:
        """Raises what `Service.say` does."""
        if self.talk.chat is None:
            service.ready()
            from ...generation.chat import OF_CHAT  # which needs torch: it is there when a model is

            self.talk.chat = service.chat({name: self.settings[name] for name in OF_CHAT})
        return service.say(self.talk.chat, opened_terms(self.terms), self.settings, client, previews=True)


@dataclass
class TalkDesk:
    """The tab's components, and what happens in it.

    Attributes:
        prompt, picture: what is said next.
        log: the conversation. status: how far an answer is. saved: where a chat's file can be fetched.
        go, cancel, undo, anew, save, open: buttons.
        last_seed: a gr.State.
    """

    service: Service
    clients: Clients
    language: Any
    prompt: Any = None
    picture: Any = None
    log: Any = None
    status: Any = None
    saved: Any = None
    go: Any = None
    cancel: Any = None
    undo: Any = None
    anew: Any = None
    save: Any = None
    open: Any = None
    panel: Panel = field(default_factory=lambda: Panel(()))
    last_seed: Any = None
    _talks: dict[str, Talk] = field(default_factory=dict)

    @property
    def inputs(self) -> set[Any]:
        return {self.prompt, self.picture, self.language, *self.panel.components}

    @property
    def results(self) -> list[Any]:
        own = [self.prompt, self.picture, self.log, self.status, self.saved, self.cancel, self.last_seed]
        return [*own, *self._acting]

    @property
    def _acting(self) -> list[Any]:
        """What changes or keeps a chat, and waits while it answers."""
        return [self.go, self.undo, self.anew, self.save, self.open]

    async def run(self, values: dict[Any, Any], request: gr.Request) -> AsyncIterator[Updates]:
        """Something is said: the whole course of its answer, as updates."""
        language, client = language_of(values[self.language]), str(request.session_hash)
        talk = self._of(client)
        typed, path = str(values[self.prompt] or ""), picture_path(values[self.picture])
        if self.clients.waits(client, TAB):
            yield self._waits(language)
            return
        yield {
            self.status: markup.sending(language), self.saved: "", **self._busy(True),
        }  # fmt: skip
        saying = Saying(talk, [typed] if path is None else [path, typed], self._settings(values))
        shown = Shown()
        async for view in self.clients.follow(client, TAB, saying):
            # Each update says all that holds: the page may leave out one that another follows soon.
            updates: Updates = {self.status: markup.status(view, language), **self._busy(not view.progress.over)}
            if view.job is not None and not shown.given:
                shown.given = await asyncio.to_thread(_kept_terms, view.job.prepared.terms, language)
                updates |= {self.prompt: "", self.picture: None}
            if len(view.progress.pieces) < len(shown.answer):  # it began again, memory having run out
                shown.answer = []
            new = view.progress.pieces[len(shown.answer) :]
            shown.answer += await asyncio.to_thread(_kept_pieces, new, language)
            shown.text = view.progress.text
            if view.progress.over:
                updates |= self._ended(view, talk, shown, language)
            if view.error is not None and view.job is not None:  # the chat is as it was, and so is what was typed
                updates |= {self.prompt: typed, self.picture: None if path is None else str(path)}
            turns = talk.turns if view.progress.over else [*talk.turns, shown]
            yield updates | {self.log: markup.conversation(turns, language)}

    def stop(self, request: gr.Request) -> None:
        """A click on stop."""
        self.clients.cancel(str(request.session_hash), TAB)

    def leave(self, client: str) -> None:
        """The page was closed: its chat goes with it."""
        self._talks.pop(client, None)

    def take_back(self, language: Language, request: gr.Request) -> Updates:
        """The last turn is forgotten."""
        client = str(request.session_hash)
        talk = self._of(client)
        if self.clients.waits(client, TAB):
            return self._waits(language)
        if talk.chat is None or not talk.chat.undo():
            return {self.status: markup.note(say("nothing_said", language))}
        talk.turns.pop()
        return self._at_rest(talk, say("taken_back", language), language)

    def begin_anew(self, language: Language, request: gr.Request) -> Updates:
        client = str(request.session_hash)
        if self.clients.waits(client, TAB):
            return self._waits(language)
        return self._at_rest(self._of(client, Talk()), "", language)

    async def keep(self, language: Language, request: gr.Request) -> Updates:
        """The chat as a file that the browser can fetch."""
        talk = self._of(str(request.session_hash))
        if talk.chat is None or not talk.turns:
            return {self.status: markup.note(say("nothing_said", language))}
        try:
            path = await asyncio.to_thread(talk.chat.save, _folder() / "chat.zip")
        except (LowmemBagelError, OSError) as error:
            return {self.status: markup.problem(error, language)}
        return {self.saved: markup.file_link(path, say("chat_file", language))}

    async def open_file(self, uploaded: Any, language: Language, request: gr.Request) -> Updates:
        """Go on with a chat that was saved."""
        path, client = picture_path(uploaded), str(request.session_hash)
        assert path is not None
        if self.clients.waits(client, TAB):
            return self._waits(language)
        try:
            talk = await asyncio.to_thread(self._opened, path, language)
        except LowmemBagelError as error:
            return {self.status: markup.problem(error, language), self.open: None}
        self._of(client, talk)
        said = say("chat_opened", language, count=len(talk.turns))
        return self._at_rest(talk, said, language) | {self.open: None}

    def _opened(self, path: Path, language: Language) -> Talk:
        chat = self.service.open_chat(path)
        turns = [Shown(_kept_terms(turn.terms, language), _kept_pieces(turn.pieces, language)) for turn in chat.turns]
        return Talk(chat, turns)

    def _of(self, client: str, talk: Talk | None = None) -> Talk:
        """A page's, or this one from now on; of too many pages those that talked least recently lose theirs."""
        found = talk or self._talks.get(client) or Talk()
        self._talks.pop(client, None)
        self._talks[client] = found
        while len(self._talks) > MOST:
            del self._talks[next(iter(self._talks))]
        return found

    def _waits(self, language: Language) -> Updates:
        return {self.status: markup.problem(BusyError(say("still_answering", language), 1.0), language)}

    def _ended(self, view: View, talk: Talk, shown: Shown, language: Language) -> Updates:
        answer = view.progress.answer
        if answer is None:
            return {}
        talk.turns.append(shown)
        return {self.last_seed: str(answer.seed)}

    def _at_rest(self, talk: Talk, said: str, language: Language) -> Updates:
        status = markup.note(said) if said else ""
        return {self.log: markup.conversation(talk.turns, language), self.status: status, self.saved: ""}

    def _busy(self, busy: bool) -> Updates:
        return {self.cancel: gr.update(interactive=busy)} | {
            button: gr.update(interactive=not busy) for button in self._acting
        }

    def _settings(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """Those that were chosen: a default that depends on whether there is a picture before is left to the turn."""
        chosen = self.panel.settings([values[component] for component in self.panel.components])
        plain = {option.name: option.default for option in answer_options()}
        shown = {option.name: option.default for option in answer_options(editing=True)}
        left = [name for name in shown if shown[name] != plain[name] and chosen[name] == shown[name]]
        return {name: value for name, value in chosen.items() if name not in left}


def _folder() -> Path:
    """A new one in Gradio's cache, which forgets it after a while."""
    folder = Path(get_upload_folder()) / f"lowmem-bagel-{secrets.token_hex(16)}"
    folder.mkdir(parents=True, mode=0o700)
    return folder


def _kept_terms(terms: Sequence[Term], language: Language) -> list[Part]:
    """What was given, its pictures where the browser can fetch them."""
    from ...pictures.saving import save_picture

    def kept(term: Term) -> Part:
        if isinstance(term, str):
            return Part(term)
        return _picture(lambda folder: save_picture(term.image, folder / "given.png", {}), language)

    return [kept(term) for term in terms]


def _kept_pieces(pieces: Sequence[Piece], language: Language) -> list[Part]:
    """What was answered; a picture carries its settings."""
    from ...generation.conversing import Said  # which needs torch: it is there when there are pieces

    def kept(piece: Piece) -> Part:
        if isinstance(piece, Said):
            return Part(piece.text)
        return _picture(lambda folder: piece.save(folder / f"bagel-{piece.settings['seed']}.png"), language)

    return [kept(piece) for piece in pieces]


def _picture(save: Callable[[Path], Path], language: Language) -> Part:
    """A picture in a folder of its own; where it cannot be written (the disk is full), the chat has it all the same."""
    try:
        return Part(picture=save(_folder()))
    except (LowmemBagelError, OSError) as error:
        LOG.warning("a picture of a chat cannot be shown: %s", error)
        return Part(say("picture_unseen", language))

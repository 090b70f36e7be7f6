"""`lowmem-bagel chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checkpoint.answer_styles import STYLES, style_name
from ..errors import SettingError, UserError
from ..settings import MAX_TURNS, answer_options
from .console import (
    JsonOption,
    ModelOption,
    check_output,
    load_flags,
    load_pipeline,
    notes_shown,
    step_bar,
    typed,
)
from .options import Values, takes
from .terminal import at_terminal, next_line, note, print_json, say

if TYPE_CHECKING:
    from ..checkpoint.folder import ModelFolder
    from ..generation.chat import Chat
    from ..pictures.opening import Picture
    from ..pipeline import BagelPipeline

MAX_LINE = 1 << 20
"""Characters of one line."""
CLIP = 8
"""Pictures taken of a video or a folder."""
SIDE = 1024
PROMPT = "> "


@takes(settings=answer_options, loading=load_flags)
def chat_command(
    settings: Values,
    loading: Values,
    model: ModelOption = None,
    saved: Annotated[Path | None, typer.Option("--open", help="Saved chat to go on with.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Names of drawn pictures: chat-01.png and so on for chat.png.")
    ] = Path("chat.png"),
    turns: Annotated[
        int, typer.Option("--turns", min=1, max=MAX_TURNS, help="Turns like the first that memory is planned for.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Talk in texts and pictures, a line a turn.

    /image PATH gives a picture with the next line, /save FILE and /open FILE keep a chat, /undo takes the last turn
    back, /quit ends, /help lists them. Where stdin is no terminal, its lines are read in turn, and the first that fails
    ends it. --json prints events, one a line.
    """
    from ..settings import answer_settings

    def planned(folder: ModelFolder) -> Values:
        """What is planned for; what is impossible is refused before gigabytes are read."""
        checked = answer_settings(folder.config, folder.max_side, True, settings, lambda message: None)
        rounds = (
            STYLES[style_name(checked.style, folder.names)].rounds if checked.max_rounds is None else checked.max_rounds
        )
        return {
            "tasks": ("edit", "ask"),
            "size": (settings.get("height", SIDE), settings.get("width", SIDE)),
            "max_rounds": rounds,
            "max_new_tokens": checked.text.max_new_tokens,
            "chat_turns": turns,
            **{name: settings[name] for name in ("speed", "step_cache") if name in settings},
        }

    out = check_output(out)
    with notes_shown():
        pipe = load_pipeline(model, loading, planned, frames=True)
        chat = pipe.chat(**settings) if saved is None else pipe.open_chat(saved)
        talk = _Talk(pipe, chat, out, as_json)
        for line in _lines():
            if not _carried_out(talk, line):
                break


def _lines() -> Iterator[str]:
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    while (line := next_line(PROMPT, MAX_LINE)) is not None:
        yield line


def _carried_out(talk: _Talk, line: str) -> bool:
    """Whether the chat goes on. By hand, what fails or is interrupted is told, and the next line asked for."""
    if not at_terminal():
        return talk.take(line)
    try:
        return talk.take(line)
    except UserError as error:
        note(f"lowmem-bagel: {error}")
    except KeyboardInterrupt:
        note("stopped; the chat is as it was before")
    return True


@dataclass
class _Talk:
    """A chat, line by line. given: pictures for the next turn."""

    pipe: BagelPipeline
    chat: Chat
    out: Path
    as_json: bool
    given: list[Picture] = field(default_factory=list)
    drawn: int = 0

    def take(self, line: str) -> bool:
        """Do what a line says; False where it ends the chat."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, about = line[1:].partition(" ")
            if name == "quit":
                return False
            if name not in COMMANDS:
                raise SettingError(f"unknown command /{name[:40]}; there are {', '.join(map('/'.__add__, COMMANDS))}")
            COMMANDS[name](self, about.strip())
        elif line:
            self._say(typed(line.removeprefix("/") if line.startswith("//") else line))
        return True

    def _say(self, text: str) -> None:
        with step_bar() as show:
            answer = self.chat.say([*self.given, text], callback=lambda event: self._tell(event, show))
        self.given = []
        if self.as_json:
            self._event("end", ended=answer.ended, seed=answer.seed, seconds=round(answer.stats.seconds, 3))
        elif answer.ended != "text":
            note(f"the answer ends here: {answer.ended}")

    def _tell(self, event: Any, show: Callable[[Any], None]) -> None:
        from ..generation.executor import Begun, Repeated

        if hasattr(event, "image"):
            path = str(event.save(self._next_place()))
            if self.as_json:
                self._event("picture", path=path, settings=dict(event.settings))
            else:
                say(f"[{path}]")
        elif hasattr(event, "decoded"):
            if self.as_json:
                self._event("text", text=event.text)
            elif event.text:
                say(event.text)
        elif isinstance(event, Begun):
            if self.as_json:
                self._event("begin")
        elif not isinstance(event, Repeated):
            show(event)
            if self.as_json:
                kind = "step" if hasattr(event, "x_t") else "token"
                self._event(kind, index=event.index, total=event.total, **({"id": event.id} if kind == "token" else {}))

    def _next_place(self) -> Path:
        """The next name that is free: what an earlier chat drew stays."""
        from ..pictures.frame_files import numbered

        while True:
            self.drawn += 1
            place = numbered(self.out, self.drawn, 1)
            if not place.exists():
                return place

    def image(self, about: str) -> None:
        """A picture, a video or a folder, for the next turn."""
        from ..pictures.clips import pictures_of

        self.given += pictures_of(Path(_named(about, "image")), CLIP)
        self._done("given", f"{len(self.given)} for the next line", count=len(self.given))

    def save(self, about: str) -> None:
        """Keep the chat in a file."""
        path = str(self.chat.save(Path(_named(about, "save"))))
        self._done("saved", path, path=path)

    def open(self, about: str) -> None:
        """Go on with a chat that was saved."""
        self.chat = self.pipe.open_chat(Path(_named(about, "open")))
        self._done("opened", f"{len(self.chat.turns)} turns", turns=len(self.chat.turns))

    def undo(self, about: str) -> None:
        """Take the last turn back."""
        undone = self.chat.undo()
        turns = len(self.chat.turns)
        self._done("undone", f"{turns} turns are left" if undone else "nothing to undo", turns=turns)

    def help(self, about: str) -> None:
        """Say what a line can be."""
        for name, command in COMMANDS.items():
            note(f"/{name}: {(command.__doc__ or 'End the chat.').strip()}")
        note("/quit: End the chat.")

    def _done(self, event: str, words: str, **about: Any) -> None:
        if self.as_json:
            self._event(event, **about)
        else:
            note(f"{event}: {words}")

    def _event(self, event: str, **about: Any) -> None:
        print_json({"event": event, **about}, indent=None)


def _named(path: str, command: str) -> str:
    if not path:
        raise SettingError(f"/{command} needs a path: /{command} PATH")
    return typed(path)


COMMANDS: Mapping[str, Callable[[_Talk, str], None]] = {
    "image": _Talk.image,
    "save": _Talk.save,
    "open": _Talk.open,
    "undo": _Talk.undo,
    "help": _Talk.help,
}
"""What a line that begins with a slash can be, beside /quit."""

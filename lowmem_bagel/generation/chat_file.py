"""Saved chats: one zip file with a JSON text and PNGs, of a version, read within limits.

Tokens and pictures are in it, and no keys: `chat.json` has what was given and answered turn by turn, pictures by the
names of their files beside it.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..checkpoint.answer_styles import STYLES
from ..errors import ChatError, UserError, first_line
from ..files import MAX_JSON_BYTES, expanded, open_file, parse_json
from ..pictures.opening import Picture, open_picture
from ..runtime.loaded import LoadedModel
from ..sampling.text import Decoded
from ..settings import AnswerSettings, answer_settings, check_prompt
from .conversing import Drawn, Ended, Piece, Said, Turn
from .inputs import Term

if TYPE_CHECKING:
    from PIL import Image

VERSION = 1
NAME, FORMAT = "chat.json", "lowmem_bagel_chat"
MAX_TURNS, MAX_PARTS = 10_000, 1000
"""Turns of a chat, and terms or pieces of a turn."""
MAX_PICTURES, MAX_PICTURE_BYTES, MAX_PIXELS = 10_000, 256 << 20, 1 << 29
OTHER_TOKENS = "its tokens are none of this model's; open it with the model that it was saved with"
ENDS: tuple[Ended, ...] = ("text", "max_new_tokens", "max_rounds")


@dataclass(frozen=True)
class Saved:
    """What is in a file: settings of the chat, and its turns."""

    settings: dict[str, Any]
    turns: list[Turn]


def write_chat(path: str | os.PathLike[str], model: str, settings: Mapping[str, Any], turns: Sequence[Turn]) -> Path:
    """Write a chat, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    from ..pictures.saving import write_whole

    target = expanded(path)
    write_whole(target, lambda file: _write(file, model, settings, turns))
    return target


def _write(file: BinaryIO, model: str, settings: Mapping[str, Any], turns: Sequence[Turn]) -> None:
    # PNGs are compressed already.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        album = _Album(packed)
        told = {
            FORMAT: VERSION,
            "model": model,
            "settings": dict(settings),
            "turns": [album.turn(turn) for turn in turns],
        }
        packed.writestr(NAME, json.dumps(told, indent=1), zipfile.ZIP_DEFLATED)


@dataclass
class _Album:
    """Turns as JSON, whose pictures are written as files as they come."""

    packed: zipfile.ZipFile
    count: int = 0

    def turn(self, turn: Turn) -> dict[str, Any]:
        return {
            "settings": turn.settings.to_json(),
            "terms": [self._term(term) for term in turn.terms],
            "pieces": [self._piece(piece) for piece in turn.pieces],
            "ended": turn.ended,
        }

    def _term(self, term: Term) -> dict[str, Any]:
        if isinstance(term, str):
            return {"text": term}
        return {"picture": self._picture(term.image), "notes": list(term.notes)}

    def _piece(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Said):
            return {"text": piece.text, "ids": piece.decoded.ids, "stop": piece.decoded.stop}
        return {"picture": self._picture(piece.image), "settings": dict(piece.settings)}

    def _picture(self, image: Image.Image) -> str:
        self.count += 1
        name = f"picture-{self.count:04}.png"
        content = io.BytesIO()
        image.save(content, format="PNG")
        self.packed.writestr(name, content.getvalue())
        return name


def read_chat(path: str | os.PathLike[str], model: LoadedModel) -> Saved:
    """What `write_chat` wrote. Nothing of it is believed: every value is checked as if it were asked for now.

    Raises:
        ChatError: it is no saved chat, is damaged, or does not fit the model.
    """
    try:
        where = expanded(path)
    except (TypeError, RuntimeError) as error:
        raise ChatError(f"a saved chat is a file's path, not {type(path).__name__}") from error
    with _damage_told(where), open_file(where) as file, zipfile.ZipFile(file) as packed:
        return _Reading(where, packed, model).saved()


@contextmanager
def _damage_told(where: Path) -> Iterator[None]:
    try:
        yield
    except ChatError:
        raise
    except FileNotFoundError as error:
        raise ChatError(f"no such chat: {where}") from error
    except UserError as error:
        raise ChatError(
            f"{where}: holds what cannot be asked for ({error}); it was not saved by this program"
        ) from error
    except OSError as error:
        raise ChatError(f"{where}: cannot be read ({error.strerror or error})") from error
    # zipfile raises whatever it meets in damaged files: RuntimeError where one is encrypted, NotImplementedError ...
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, KeyError, MemoryError) as error:
        raise ChatError(f"{where}: not a saved chat, or a damaged one ({first_line(error)})") from error


@dataclass
class _Reading:
    where: Path
    packed: zipfile.ZipFile
    model: LoadedModel
    pictures: int = 0
    pixels: int = 0
    """Of all pictures that were read so far."""

    def saved(self) -> Saved:
        whole = self._object(parse_json(self._content(NAME, MAX_JSON_BYTES)))
        if whole.get(FORMAT) != VERSION:
            raise self._wrong(f"its version is {whole.get(FORMAT)!r:.40}, and {VERSION} is read here")
        settings = self._object(whole.get("settings"))
        thinking = self._settings(settings, pictured=False).text.think
        turns: list[Turn] = []
        pictured = False
        for told in self._objects(whole.get("turns"), MAX_TURNS):
            turns.append(self._turn(told, pictured))
            if turns[-1].settings.text.think != thinking or turns[-1].settings.style not in STYLES:
                raise self._wrong("a turn has another style, or thinks otherwise, than the chat")
            pictured = pictured or _has_picture(turns[-1])
        return Saved(settings, turns)

    def _turn(self, told: dict[str, Any], pictured: bool) -> Turn:
        terms = tuple(self._term(term) for term in self._objects(told.get("terms"), MAX_PARTS))
        pieces = tuple(self._piece(piece) for piece in self._objects(told.get("pieces"), MAX_PARTS))
        in_turn = all(isinstance(piece, Drawn) == number % 2 for number, piece in enumerate(pieces))
        if not terms or not len(pieces) % 2 or not in_turn:
            raise self._wrong("a turn has no terms, or its answer is not texts and pictures in turn, a text at last")
        ended = next((end for end in ENDS if end == told.get("ended")), None)
        if ended is None:
            raise self._wrong("a turn does not say how it ended")
        pictured = pictured or any(not isinstance(term, str) for term in terms)
        settings = self._settings(self._object(told.get("settings")), pictured)
        longest = max(len(piece.decoded.ids) for piece in pieces if isinstance(piece, Said))
        if longest > settings.text.max_new_tokens:
            raise self._wrong("an answer is longer than its settings allow")
        return Turn(terms, settings, pieces, ended)

    def _settings(self, told: dict[str, Any], pictured: bool) -> AnswerSettings:
        folder = self.model.folder
        return answer_settings(folder.config, folder.max_side, pictured, told, lambda _: None)

    def _term(self, told: dict[str, Any]) -> Term:
        if "text" in told:
            check_prompt(told["text"])
            return str(told["text"])
        return self._picture(told)

    def _piece(self, told: dict[str, Any]) -> Piece:
        if "ids" in told:
            ids = self._ids(told["ids"])
            stop = told.get("stop")
            tokenizer = self.model.tokenizer
            if ids[:1] != [tokenizer.im_start] or stop not in (None, tokenizer.im_end, tokenizer.vision_start):
                raise self._wrong("a text does not begin or end as texts do")
            text = tokenizer.decode_generated(ids)
            if text != told.get("text"):
                raise self._wrong(OTHER_TOKENS)
            return Said(text, Decoded(ids, stop))
        return Drawn(self._picture(told).image, self._object(told.get("settings")))

    def _ids(self, told: Any) -> list[int]:
        size = self.model.folder.config.decoder.vocab_size  # a model may say what its tokenizer has no word for
        if not isinstance(told, list) or not all(type(id) is int and 0 <= id < size for id in told):
            raise self._wrong(OTHER_TOKENS)
        return told

    def _picture(self, told: dict[str, Any]) -> Picture:
        name = told.get("picture")
        self.pictures += 1
        if not isinstance(name, str) or self.pictures > MAX_PICTURES or self.pixels > MAX_PIXELS:
            raise self._wrong("it has too many pictures, or one without a file")
        opened = open_picture(self._content(name, MAX_PICTURE_BYTES), f"{self.where.name}: {name}")
        self.pixels += opened.image.width * opened.image.height
        notes = told.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise self._wrong("what it notes of a picture is no list of texts")
        return Picture(opened.image, tuple(notes))

    def _content(self, name: str, limit: int) -> bytes:
        """Of one file inside; what unpacks to more is not unpacked further."""
        if name not in self.packed.namelist():
            raise self._wrong(f"{name[:80]!r} is missing")
        with self.packed.open(name) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise self._wrong(f"{name[:80]!r} is larger than {limit >> 20} MiB")
        return content

    def _object(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong("an object is missing")
        return value

    def _objects(self, value: Any, most: int) -> list[dict[str, Any]]:
        if not isinstance(value, list) or len(value) > most:
            raise self._wrong(f"a list is missing, or is longer than {most}")
        return [self._object(one) for one in value]

    def _wrong(self, why: str) -> ChatError:
        return ChatError(f"{self.where}: {why}")


def _has_picture(turn: Turn) -> bool:
    return any(not isinstance(term, str) for term in turn.terms) or any(isinstance(p, Drawn) for p in turn.pieces)

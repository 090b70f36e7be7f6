"""One turn of a conversation carried out: texts, and pictures where the model asks for them, in one set of contexts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from ..checkpoint.answer_styles import STYLES, AnswerStyle
from ..errors import SettingError
from ..runtime.loaded import LoadedModel
from ..sampling.text import Decoded, Forced, TokenChoice
from ..settings import MAX_SEED, AnswerSettings
from .continued import Continued, Kept, Room
from .drawing import frames_of, guidance_of
from .executor import THINK_BEFORE_ANSWERING, Callback, Execution, memory_returned, report
from .images import decoded
from .inputs import PictureBlock, Term, TextBlock, read_terms
from .results import Stats

if TYPE_CHECKING:
    from PIL import Image

    from ..checkpoint.config import BagelConfig
    from ..checkpoint.tokenizer import BagelTokenizer

Ended = Literal["text", "max_new_tokens", "max_rounds"]
"""By a text that asks for no picture; by one that was cut; by a picture that was asked for and is one too many."""
FRAMING = 2
"""Tokens of a text block beside the text."""


@dataclass(frozen=True)
class Said:
    """A text of an answer. decoded: its tokens, and what ended them."""

    text: str
    decoded: Decoded


@dataclass(frozen=True)
class Drawn:
    """A picture of an answer, with every setting that it was drawn with, its seed among them."""

    image: Image.Image
    settings: Mapping[str, Any]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it with its settings, as `Result.save` does.

        Raises:
            OutputError: another suffix, or the file cannot be written.
        """
        from ..pictures.saving import save_picture

        return save_picture(self.image, path, self.settings)


Piece: TypeAlias = Said | Drawn


@dataclass(frozen=True)
class Answer:
    """Texts and pictures in their order.

    Attributes:
        pieces: they, a text first.
        ended: by what.
        seed: that all of them were made with: each piece's own is so many more as there are pieces before it.
        settings: every setting used.
        stats: seconds and peak memory of each phase, over all pieces.
    """

    pieces: tuple[Piece, ...]
    ended: Ended
    seed: int
    settings: Mapping[str, Any]
    stats: Stats

    @property
    def texts(self) -> list[str]:
        return [piece.text for piece in self.pieces if isinstance(piece, Said)]

    @property
    def text(self) -> str:
        """All texts, one under the other."""
        return "\n".join(text for text in self.texts if text)

    @property
    def images(self) -> list[Image.Image]:
        return [piece.image for piece in self.pieces if isinstance(piece, Drawn)]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write each picture, numbered: out-01.png and so on for out.png.

        Raises:
            SettingError: there is none.
            OutputError: another suffix, or a file cannot be written.
        """
        from ..pictures.frame_files import numbered

        drawn = [piece for piece in self.pieces if isinstance(piece, Drawn)]
        if not drawn:
            raise SettingError("this answer has no picture to save")
        return [piece.save(numbered(Path(path), number, len(drawn))) for number, piece in enumerate(drawn, 1)]


@dataclass(frozen=True)
class Turn:
    """What was given, and what was answered."""

    terms: tuple[Term, ...]
    settings: AnswerSettings
    pieces: tuple[Piece, ...]
    ended: Ended


@dataclass(frozen=True)
class Outline:
    """A turn before it is carried out, as far as memory and time depend on it.

    Attributes:
        config: with what its style says.
        rounds: pictures that it draws at most, of this `size`; sizes are width and height.
        pictures: sizes of those that are given.
        text_tokens: of the texts that are.
        before: tokens of the turns before, in all contexts.
    """

    config: BagelConfig
    settings: AnswerSettings
    rounds: int
    size: tuple[int, int]
    pictures: Sequence[tuple[int, int]]
    text_tokens: int
    before: int


class Conversing(Execution):
    """Carries out one turn.

    Args:
        terms: what is given now.
        settings: of this turn; the style is one of `STYLES`.
        last: the last picture before them, which gives the size where neither the settings nor the terms do.
    """

    def __init__(
        self, model: LoadedModel, terms: Sequence[Term], settings: AnswerSettings, last: Image.Image | None,
        callback: Callback | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, terms, callback)
        self.settings, self.style = settings, STYLES[settings.style]
        self.config = self.style.shown_by(model.folder.config)
        self.blocks = read_terms(terms, self.config, model.tokenizer, drawing=True)
        before = [] if last is None else [PictureBlock(last, True, self.config)]
        self.frames = frames_of(self.config, [*before, *self.blocks], settings.picture)
        self.stats = Stats(model.bagel.device)
        self.pieces: list[Piece] = []

    def outline(self, earlier: Sequence[Turn]) -> Outline:
        """What is known of the turn before it begins.

        earlier: the turns before it.
        """
        guided = any(
            guidance_of(one.picture).uses_image_branch for one in (self.settings, *(t.settings for t in earlier))
        )
        full, alone = tokens_of(earlier, self.config, self.model.tokenizer)
        system = self._text_block(THINK_BEFORE_ANSWERING).tokens if self.settings.text.think else 0
        texts = sum(block.tokens for block in self.blocks if isinstance(block, TextBlock))
        side = self.config.token_pixels
        return Outline(
            self.config,
            self.settings,
            rounds_of(self.settings, self.style),
            (self.frames.columns * side, self.frames.rows * side),
            [term.image.size for term in self.terms if not isinstance(term, str)],
            texts + (0 if earlier else system),
            full + (alone if guided else 0) + (system if earlier else 0),
        )

    def begin(self, kept: Kept | None, script: Turn | None = None) -> Continued:
        """Contexts for the turn, after those that are kept, which are not needed any more then."""
        settings, first = self.settings, kept is None or not kept.reached.length
        system = [self._text_block(THINK_BEFORE_ANSWERING)] if first and settings.text.think else []
        drawn = (
            self._drawn()
            if script is None
            else [self._returned(p.image) for p in script.pieces if isinstance(p, Drawn)]
        )
        text = settings.text.max_new_tokens + FRAMING
        room = Room.of([*system, *self.blocks], drawn, text, self.frames.tokens if drawn else 0)
        self._make_ready_for_previews()
        with self.stats.phase("prefill"):
            contexts = Continued(self.model, kept, room, guidance_of(settings.picture).uses_image_branch)
            for block in system:
                contexts.append_system(block)
        return contexts

    def carry_out(self, contexts: Continued, script: Turn | None = None) -> Ended:
        """Read what is given and answer it; the contexts end with the answer.

        Args:
            script: what was answered before, to be taken into the contexts again as it came to be: its texts token by
                token, for only so are the keys the same to the bit, and its pictures without drawing them.
        """
        self._read(contexts)
        if script is not None:
            self._repeat(contexts, script.pieces)
            return script.ended
        rounds = rounds_of(self.settings, self.style)
        while True:
            said = self._say(contexts)
            if not self._asks(said):
                return "max_new_tokens" if said.decoded.stop is None else "text"
            if not rounds:
                return "max_rounds"
            rounds -= 1
            self._draw(contexts)

    def result(self, ended: Ended) -> Answer:
        return Answer(
            tuple(self.pieces), ended, self.settings.text.seed, self._record(self.settings.to_json()), self.stats
        )

    def _read(self, contexts: Continued) -> None:
        generator = torch.Generator().manual_seed(self.settings.text.seed)
        with self.stats.phase("prefill"), memory_returned(self.model.bagel.device, self.blocks):
            for block in self.blocks:
                contexts.append(block, generator)

    def _say(self, contexts: Continued, script: Said | None = None) -> Said:
        settings, tokenizer = self.settings.text, self.model.tokenizer
        choice = TokenChoice(settings.do_sample, settings.temperature, settings.top_p)
        if script is not None:
            stop = () if script.decoded.stop is None else (script.decoded.stop,)
            choice = Forced(left=iter([*script.decoded.ids[1:], *stop]))
        with self.stats.phase("answer"):
            before, generator = contexts.full.fork(), self._generator()
            started = contexts.start()
            asking = (tokenizer.vision_start,)
            decoded = self._decode(contexts, started, settings.max_new_tokens, choice, generator, asking)
            contexts.append_said(before, decoded)
        said = Said(tokenizer.decode_generated(decoded.ids), decoded)
        self._add(said)
        return said

    def _asks(self, said: Said) -> bool:
        stop = said.decoded.stop
        return stop == self.model.tokenizer.vision_start or self.style.asks(said.text, stop is not None)

    def _draw(self, contexts: Continued) -> None:
        picture = replace(self.settings.picture, seed=self._seed())
        generator, side = self._generator(), self.config.token_pixels
        with self.stats.phase("denoise"):
            latent, evaluations, computed = self._denoised(contexts, picture, self.frames, generator)
        with self.stats.phase("decode"):
            image = decoded(self.model, self._positions(latent, self.frames))
        used = picture.to_json() | {"height": self.frames.rows * side, "width": self.frames.columns * side}
        if picture.step_cache != "none":
            used |= {"evaluations": evaluations, "evaluations_computed": computed}
        said = self.pieces[-1]
        assert isinstance(said, Said)
        drawn = Drawn(image, self._record(used) | {"said": said.text, "style": self.settings.style})
        self._return(contexts, image, generator)
        self._add(drawn)

    def _return(self, contexts: Continued, image: Image.Image, generator: torch.Generator) -> None:
        """A picture that was drawn goes through the encoders, into the contexts."""
        block = self._returned(image)
        with self.stats.phase("prefill"), memory_returned(self.model.bagel.device, [block]):
            contexts.append(block, generator)

    def _repeat(self, contexts: Continued, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Said):
                self._say(contexts, piece)
                continue
            generator = self._generator()
            self.frames.noise(self.config.latent_values, generator)  # what follows comes after it
            self._return(contexts, piece.image, generator)
            self._add(piece)

    def _returned(self, image: Image.Image) -> PictureBlock:
        return PictureBlock(image, True, self.config)

    def _drawn(self) -> list[PictureBlock]:
        """As many pictures as there may be, of the size that is drawn, as they come back."""
        from PIL import Image

        side = self.config.token_pixels
        blank = Image.new("RGB", (self.frames.columns * side, self.frames.rows * side))
        return [self._returned(blank)] * rounds_of(self.settings, self.style)

    def _add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        report(self.callback, piece)

    def _seed(self) -> int:
        """Of the next piece."""
        return (self.settings.text.seed + len(self.pieces)) & MAX_SEED

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed())


def rounds_of(settings: AnswerSettings, style: AnswerStyle) -> int:
    """Pictures at most."""
    return style.rounds if settings.max_rounds is None else settings.max_rounds


def tokens_of(turns: Sequence[Turn], config: BagelConfig, tokenizer: BagelTokenizer) -> tuple[int, int]:
    """Of turns in the full context, without a system prompt; and of their texts after the first picture."""
    full = alone = 0
    pictured = False
    for turn in turns:
        for part in (*read_terms(turn.terms, config, tokenizer, drawing=True), *turn.pieces):
            if isinstance(part, Drawn):
                part = PictureBlock(part.image, True, config)
            tokens = len(part.decoded.ids) + 1 if isinstance(part, Said) else part.tokens
            full += tokens
            pictured = pictured or isinstance(part, PictureBlock)
            alone += tokens if pictured and not isinstance(part, PictureBlock) else 0
    return full, alone


def pictures_of(terms: Sequence[Term], pieces: Sequence[Piece] = ()) -> Iterator[Image.Image]:
    """Those that were given, then those that were drawn."""
    yield from (term.image for term in terms if not isinstance(term, str))
    yield from (piece.image for piece in pieces if isinstance(piece, Drawn))

"""Contexts that go on from those of earlier turns: keys that are there are moved to a larger cache, not computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..model.kv_cache import KVCache, Region, SequenceView
from ..runtime.loaded import LoadedModel
from ..sampling.text import Decoded, append_text
from .inputs import Block, Contexts, PictureBlock, TextBlock


@dataclass(frozen=True)
class TextsAlone:
    """The context of texts alone, which begins at the first picture: as far as it got.

    used: its own tokens, beside the `shared` ones that come before the picture. seen: how many of the texts after that
    picture it has.
    """

    shared: int
    used: int
    position: int
    seen: int


@dataclass(frozen=True)
class Reached:
    """How far a conversation's contexts are.

    first_picture: tokens and rope position before it, None where there is none yet. texts: those after it.
    """

    length: int = 0
    position: int = 0
    first_picture: tuple[int, int] | None = None
    texts: tuple[TextBlock, ...] = ()
    alone: TextsAlone | None = None


@dataclass(frozen=True)
class Kept:
    """Keys between turns: those of the texts alone end at row `main` of the cache, where the others begin."""

    kv_cache: KVCache
    main: int
    reached: Reached

    def back_to(self, reached: Reached) -> Kept:
        """As it was earlier; the keys after that are no longer looked at."""
        return replace(self, reached=reached)


@dataclass(frozen=True)
class Room:
    """Tokens that a turn may need: of blocks in the full context, of those texts among them that the context of texts
    alone holds once more, and of a picture that is drawn."""

    full: int = 0
    texts: int = 0
    picture: int = 0

    @classmethod
    def of(cls, blocks: Sequence[Block], drawn: Sequence[PictureBlock], text: int, picture: int) -> Room:
        """For the blocks that are given and an answer after them.

        Args:
            drawn: its pictures, at most, as they come back.
            text: tokens of each of its texts at most, markers included.
            picture: tokens of what is drawn at a time.
        """
        said = (len(drawn) + 1) * text
        texts = sum(block.tokens for block in blocks if isinstance(block, TextBlock))
        return cls(sum(block.tokens for block in (*blocks, *drawn)) + said, texts + said, picture)


class Continued(Contexts):
    """Contexts of one turn of a conversation, in a cache laid out for it, with the keys of the turns before.

    Args:
        kept: what they left; None at the beginning.
        room: for what is to come.
        image_branch: whether image guidance is on, which needs the texts alone.
    """

    def __init__(self, model: LoadedModel, kept: Kept | None, room: Room, image_branch: bool) -> None:
        reached = Reached() if kept is None else kept.reached
        alone = reached.alone or TextsAlone(0, 0, 0, 0)
        missing = reached.texts[alone.seen :] if image_branch else ()
        self.model, self.bagel, self.backend = model, model.bagel, model.attention
        side = alone.used + sum(block.tokens for block in missing) + (room.texts if image_branch else 0)
        main = side + room.picture
        capacity = main + reached.length + room.full
        self.kv_cache = self.bagel.kv_cache(capacity)
        self.scratch = range(side, main)
        self._apart = Region(0, 0)
        # Back to front, so that it adjoins the picture that is drawn however long the texts become.
        self._side = Region(0, side, alone.used, backwards=True)
        self._image_branch, self._later, self._store = image_branch, 0, None
        self._first_picture, self._texts, self._seen = reached.first_picture, list(reached.texts), alone.seen
        spans = [range(main, main + reached.length)] if reached.length else []
        self.full = SequenceView(self.kv_cache, Region(main, capacity, reached.length), spans, reached.position)
        self.text = self.full.fork()
        self.image: SequenceView | None = None
        if kept is not None:
            self.kv_cache.copy_rows(kept.kv_cache, range(kept.main, kept.main + reached.length), main)
            self.kv_cache.copy_rows(kept.kv_cache, range(kept.main - alone.used, kept.main), side - alone.used)
        if reached.alone is not None:
            own = range(side - alone.used, side)
            self.image = SequenceView(
                self.kv_cache, self._side, [range(main, main + alone.shared), own], alone.position
            )
        self._catch_up()

    def append(self, block: Block, generator: torch.Generator) -> None:
        if isinstance(block, PictureBlock) and self._first_picture is None:
            self._first_picture = self.full.length, self.full.position
        super().append(block, generator)
        if isinstance(block, TextBlock):
            self._count(block)

    def append_said(self, before: SequenceView, said: Decoded) -> None:
        """Take a text that was generated into the contexts: its keys are there, but for those of im_end and of a last
        token that nothing was asked after.

        before: the full context as it was before its start.
        """
        end = self.model.tokenizer.im_end
        self.full.drop_after(before.length, before.position)  # decoding by a graph appends behind the view's back
        self.full.append(said.appended, said.appended)
        append_text(self.bagel, self.full, torch.tensor([*said.ids[said.appended :], end]), self.backend)
        self.text = before
        block = TextBlock((*said.ids, end))
        if self.image is not None and self._image_branch:
            append_text(self.bagel, self.image, torch.tensor(block.ids), self.backend)
        self._count(block)

    def reached(self) -> Reached:
        """How far they are now."""
        alone = None
        if self.image is not None:
            used = self._side.used
            alone = TextsAlone(self.image.length - used, used, self.image.position, self._seen)
        return Reached(self.full.length, self.full.position, self._first_picture, tuple(self._texts), alone)

    def kept(self) -> Kept:
        """What a next turn may begin from, in no more memory than it takes."""
        reached, main = self.reached(), self._side.used
        exact = self.bagel.kv_cache(main + reached.length)
        start = self.full.region.start
        exact.copy_rows(self.kv_cache, range(self._side.stop - main, self._side.stop), 0)
        exact.copy_rows(self.kv_cache, range(start, start + reached.length), main)
        return Kept(exact, main, reached)

    def _count(self, block: TextBlock) -> None:
        if self._first_picture is not None:
            self._texts.append(block)
            self._seen += self.image is not None and self._image_branch

    def _catch_up(self) -> None:
        """Texts that image guidance was not on for, appended to what it needs now."""
        if not self._image_branch or self._first_picture is None:
            return
        if self.image is None:
            length, position = self._first_picture
            main = self.full.region.start
            self.image = SequenceView(
                self.kv_cache, self._side, [range(main, main + length)] if length else [], position
            )
        for block in self._texts[self._seen :]:
            append_text(self.bagel, self.image, torch.tensor(block.ids), self.backend)
        self._seen = len(self._texts)

"""From a request's terms to contexts: blocks of tokens, the key/value cache's layout, and their prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..checkpoint.config import BagelConfig
from ..checkpoint.tokenizer import BagelTokenizer
from ..errors import SettingError
from ..model.decoder import Part
from ..model.kv_cache import AppendAttention, Region, SequenceView
from ..model.vision import patchify
from ..pictures.callers import is_data_url
from ..pictures.clips import Clip
from ..pictures.opening import Picture, open_picture
from ..runtime.context_store import NOTHING, key_after
from ..runtime.loaded import LoadedModel
from ..sampling.denoise import Branches
from ..sampling.frames import MARKERS
from ..sampling.text import append_text
from ..settings import PictureSettings, TextSettings, check_prompt
from .images import in_range, resize, to_bytes

if TYPE_CHECKING:
    from PIL import Image

Term: TypeAlias = str | Picture
"""A text, or an opened picture."""

TOGETHER = 256
"""Tokens of an answer's last text that go through the layers together with the start token. Two passes over so few take
twice the time of one. A longer text is worth being kept, which the same bits with and without a store do not allow
for one that was computed together with what follows it."""
HASHED, HASHING = 1 << 20, 4
"""Bytes of a picture that are hashed at once, and threads that do."""


@dataclass(frozen=True)
class TextBlock:
    ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PictureBlock:
    """An input picture. `for_drawing`: it enters as a VAE block before the ViT block.

    What the encoders are shown is made when it is asked for: a picture that was seen before need not be.
    """

    picture: Image.Image
    for_drawing: bool
    config: BagelConfig

    @cached_property
    def image(self) -> Image.Image:
        """After the VAE's resize rule."""
        return resize(self.picture, self.config.vae_resize)

    @cached_property
    def vit_image(self) -> Image.Image:
        """That, after the vision tower's."""
        return resize(self.image, self.config.vit_resize)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of `image`."""
        return self.config.vae_resize.resized(*self.picture.size)

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Rows and columns of latent tokens."""
        width, height = self.size
        return height // self.config.token_pixels, width // self.config.token_pixels

    @property
    def vit_grid(self) -> tuple[int, int]:
        """Rows and columns of the vision tower's patches."""
        width, height = self.config.vit_resize.resized(*self.size)
        return height // self.config.vit.patch_size, width // self.config.vit.patch_size

    @property
    def latent_tokens(self) -> int:
        rows, columns = self.latent_grid
        return rows * columns + MARKERS

    @property
    def vit_tokens(self) -> int:
        rows, columns = self.vit_grid
        return rows * columns + MARKERS

    @property
    def tokens(self) -> int:
        return self.vit_tokens + (self.latent_tokens if self.for_drawing else 0)

    @cached_property
    def digest(self) -> bytes:
        """Of what the picture shows; 32 bytes."""
        assert self.picture.mode == "RGB"
        values = memoryview(self.picture.tobytes())
        parts = [values[start : start + HASHED] for start in range(0, len(values), HASHED)]
        with ThreadPoolExecutor(HASHING) as pool:
            of_parts = b"".join(pool.map(lambda part: sha256(part).digest(), parts))
        return sha256(repr(self.picture.size).encode() + of_parts).digest()


Block = TextBlock | PictureBlock


@dataclass(frozen=True)
class Prepared:
    """A request that was checked: its terms opened, every setting filled in, the seed drawn."""

    terms: tuple[Term, ...]
    settings: PictureSettings | TextSettings
    changed: tuple[str, ...]
    """Settings that were changed, in words."""
    turns: tuple[str, ...] = ()
    """Texts of the frames after the first, each of which comes after the frame before."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What its caller ought to know of how it was read."""
        of_pictures = (note for term in self.terms if not isinstance(term, str) for note in term.notes)
        return (*of_pictures, *self.changed)

    @property
    def texts(self) -> list[str]:
        """All of them."""
        return [*(term for term in self.terms if isinstance(term, str)), *self.turns]

    @property
    def picture_sizes(self) -> list[tuple[int, int]]:
        """Width and height of the input pictures; an edit takes the last one's."""
        return [term.image.size for term in self.terms if not isinstance(term, str)]


def open_terms(terms: Iterable[Any]) -> list[Term]:
    """Texts checked and pictures opened.

    Args:
        terms: texts, and pictures in any form that `open_picture` takes; a text that is a data: URL is a picture, and a
            `Clip` is several.

    Raises:
        SettingError: there are no terms, or a text is empty.
        ImageError: a picture cannot be used.
    """
    if isinstance(terms, (str, bytes, Mapping)) or hasattr(type(terms), "__array__") or not isinstance(terms, Iterable):
        raise SettingError(f"terms must be a list of texts and pictures, not {type(terms).__name__}")
    opened: list[Term] = []
    for term in terms:
        if isinstance(term, str) and not is_data_url(term):
            check_prompt(term)
            opened.append(term)
        elif isinstance(term, Clip):
            opened += term.pictures()
        else:
            opened.append(open_picture(term))
    if not opened:
        raise SettingError("nothing to work from: give a prompt, a picture, or both")
    return opened


def to_wait(terms: Iterable[Term], config: BagelConfig) -> tuple[Term, ...]:
    """The same terms with large pictures at the size that the model is shown, so that a request that waits holds little
    memory."""
    return tuple(_as_shown(term, config) for term in terms)


def _as_shown(term: Term, config: BagelConfig) -> Term:
    """`PictureBlock` makes the same of both: a picture that the rule would resize once more stays as it is."""
    if isinstance(term, str):
        return term
    size = config.vae_resize.resized(*term.image.size)
    lasting = config.vae_resize.resized(*size) == size
    smaller = size[0] * size[1] < term.image.width * term.image.height
    return replace(term, image=resize(term.image, config.vae_resize)) if lasting and smaller else term


def read_terms(terms: Sequence[Term], config: BagelConfig, tokenizer: BagelTokenizer, drawing: bool) -> list[Block]:
    """Texts and pictures, in any order, as blocks."""
    blocks: list[Block] = []
    for term in terms:
        if isinstance(term, str):
            blocks.append(TextBlock(tuple(tokenizer.text_block(term))))
        else:
            blocks.append(PictureBlock(term.image, drawing, config))
    return blocks


class Contexts:
    """Contexts of one request in one key/value cache, laid out as `model.kv_cache` describes.

    Args:
        picture_tokens: tokens of what is to be generated at a time, with markers; 0 for an answer.
        image_branch: whether image guidance is on, which needs the texts alone.
        spare: room after the last block, for generated text.
        later: blocks that come after the first picture that is generated: pictures of the size of that and those after
            it, and texts between them.
        text_branch: whether guidance by text is on, which needs later pictures without the text too.
    """

    def __init__(
        self,
        model: LoadedModel,
        blocks: Sequence[Block],
        picture_tokens: int,
        image_branch: bool,
        spare: int,
        later: Sequence[Block] = (),
        text_branch: bool = False,
    ) -> None:
        self.model = model
        self.bagel, self.backend = model.bagel, model.attention
        untold = text_branch and (isinstance(blocks[-1], TextBlock) or spare > 0)
        between = any(isinstance(block, TextBlock) for block in later)
        apart = sum(block.tokens for block in later) if untold and not between else 0
        side = apart + (_tokens_after_first_picture([*blocks, *later]) if image_branch else 0)
        main = side + picture_tokens
        capacity = main + sum(block.tokens for block in (*blocks, *later)) + spare
        self.kv_cache = self.bagel.kv_cache(capacity)
        self.scratch = range(side, main)
        self.full = SequenceView(self.kv_cache, Region(main, capacity))
        self.text = self.full.fork()
        self.image: SequenceView | None = None
        self._apart = Region(0, apart, backwards=True)
        self._side = Region(apart, side)
        self._image_branch = image_branch
        self._later = sum(block.tokens for block in later)
        self._key = NOTHING
        self._store = model.context_store

    def append(self, block: Block, generator: torch.Generator) -> None:
        """Append an input block to the branches that see it."""
        if isinstance(block, TextBlock):
            self.text = self.full.fork()
            self._append_text(block)
            if self.image is not None and self._image_branch:
                append_text(self.bagel, self.image, torch.tensor(block.ids), self.backend)
            return
        if self.image is None and self._image_branch:
            self.image = self.full.fork(self._side)
        self._append_picture(block, generator)
        self.text = self.full.fork()

    def append_drawn(self, block: PictureBlock, generator: torch.Generator) -> None:
        """Append a picture that was drawn, to the context without text as well where that is another.

        It is encoded once, and not kept for other requests, nor is what follows it.
        """
        self._store = None
        if self.image is None and self._image_branch:
            self.image = self.full.fork(self._side)
        views = [self.full]
        if self._apart.stop:
            self.text = self.text.fork(self._apart)
            views.append(self.text)
        model, noise = self.model, encoding_noise(block, generator)
        latents = encoded_latents(model, block, noise)
        for view in views:
            append_framed(model, view, "gen", latents)
        patches = encoded_patches(model, block)
        for view in views:
            append_framed(model, view, "und", patches)
        if len(views) == 1:
            self.text = self.full.fork()

    def append_and_start(self, block: Block, generator: torch.Generator) -> Tensor:
        """Append the last block before an answer and the token that starts it, in one pass where that pays.

        Returns the start token's hidden state before the final norm, [1, 1, hidden_size].
        """
        if isinstance(block, TextBlock) and block.tokens <= TOGETHER:
            return self.start(block.ids)
        self.append(block, generator)
        return self.start()

    def start(self, before: tuple[int, ...] = ()) -> Tensor:
        """Append tokens and the one that starts generated text; returns that one's hidden state [1, 1, hidden_size]."""
        ids = torch.tensor([*before, self.model.tokenizer.im_start])
        short = self.model.short_passes
        hidden = None if short is None else short(ids, self.full, self.backend)
        return (append_text(self.bagel, self.full, ids, self.backend) if hidden is None else hidden)[:, -1:]

    def append_system(self, block: TextBlock) -> None:
        """Append think's system prompt, which is not an input text: every branch but the empty one sees it."""
        self._append_text(block)

    def append_thoughts(self, block: TextBlock) -> None:
        """Append the plan that think wrote, which only the full context sees."""
        if self.image is None:
            self.image = self.full.fork(self._side)
        self._grow_for(block.tokens)
        append_text(self.bagel, self.full, torch.tensor(block.ids), self.backend)

    def branches(self) -> Branches:
        """The contexts of guidance. Without an input picture the image branch is the full one."""
        image = self.image if self.image is not None else self.full.fork()
        return Branches(self.full, self.text, image if self._image_branch else None)

    def _append_text(self, block: TextBlock) -> None:
        ids = torch.tensor(block.ids)
        self._extend(
            ("text", lambda: ids.numpy().tobytes()),
            (block.tokens, block.tokens),
            lambda: append_text(self.bagel, self.full, ids, self.backend),
        )

    def _append_picture(self, block: PictureBlock, generator: torch.Generator) -> None:
        """VAE block where pictures are drawn, then ViT block. Its noise is drawn from the generator in any case."""
        model, view = self.model, self.full
        if block.for_drawing:
            noise = encoding_noise(block, generator)
            self._extend(
                ("vae", lambda: block.digest + noise.numpy().tobytes()),
                (block.latent_tokens, 1),
                lambda: append_latents(model, view, block, noise),
            )
        self._extend(("vit", lambda: block.digest), (block.vit_tokens, 1), lambda: append_patches(model, view, block))

    def _extend(
        self, content: tuple[str, Callable[[], bytes]], size: tuple[int, int], compute: Callable[[], object]
    ) -> None:
        """Append a block to the full context: as it was kept, or computed, and kept if there is a store.

        Args:
            content: what kind of block it is, and all that its keys depend on beside the blocks before it.
            size: its tokens, and the rope positions that it takes.
            compute: appends it by the model.
        """
        store = self._store
        if store is None:
            compute()
            return
        kind, told = content
        self._key = key_after(self._key, kind.encode(), told())
        tokens, positions = size
        if self._key in store:
            store.restore(self._key, self.kv_cache, self.full.append(tokens, positions))
            return
        compute()
        end = self.full.spans[-1].stop
        store.keep(self._key, self.kv_cache, range(end - tokens, end))

    def _grow_for(self, tokens: int) -> None:
        """A plan encoded again can be longer than it was generated: invalid bytes become U+FFFD."""
        region = self.full.region
        missing = region.used + tokens + self._later - (region.stop - region.start)
        if missing > 0:
            self.kv_cache.grow(missing)
            region.stop += missing


def _tokens_after_first_picture(blocks: Sequence[Block]) -> int:
    first = next((i for i, block in enumerate(blocks) if isinstance(block, PictureBlock)), len(blocks))
    return sum(block.tokens for block in blocks[first:] if isinstance(block, TextBlock))


def append_latents(model: LoadedModel, view: SequenceView, block: PictureBlock, noise: Tensor) -> None:
    """Append an input picture's VAE block; `noise` is `encoding_noise`."""
    append_framed(model, view, "gen", encoded_latents(model, block, noise))


def encoded_latents(model: LoadedModel, block: PictureBlock, noise: Tensor) -> Tensor:
    """A picture's clean latents as they enter the layers, [tokens, hidden_size]; `noise` is `encoding_noise`."""
    latents = encode_latents(model, block.image, noise)
    return model.bagel.embed_latents(latents, torch.zeros(1), *block.latent_grid)


def append_patches(model: LoadedModel, view: SequenceView, block: PictureBlock) -> None:
    """Append an input picture's ViT block."""
    append_framed(model, view, "und", encoded_patches(model, block))


def encoded_patches(model: LoadedModel, block: PictureBlock) -> Tensor:
    """What the vision tower makes of a picture, as it enters the layers, [tokens, hidden_size]."""
    with model.using("vit"):
        return model.bagel.embed_picture(shown_patches(model, block), *block.vit_grid)


def shown_patches(model: LoadedModel, block: PictureBlock) -> Tensor:
    """What the vision tower, which is on the device, is shown of a picture: [patches, patch_values] in its dtype."""
    vision = model.bagel.vision
    values = to_bytes(block.vit_image).to(vision.positions.device).permute(2, 0, 1)
    return in_range(patchify(values, block.config.vit.patch_size), vision.dtype)


def append_framed(model: LoadedModel, view: SequenceView, expert: str, hidden: Tensor) -> None:
    """Append a picture's tokens [T, hidden_size] in their markers: full attention, one rope position for all."""
    bagel, backend = model.bagel, model.attention
    markers = bagel.embed_text(torch.tensor([model.tokenizer.vision_start, model.tokenizer.vision_end]))
    rope = bagel.rope(torch.tensor([[view.position]]))
    if expert == "und":
        parts = [Part("und", torch.cat((markers[:1], hidden, markers[1:]))[None], rope)]
    else:
        parts = [Part("und", markers[None], rope), Part("gen", hidden[None], rope)]
    span = view.append(hidden.shape[0] + MARKERS, 1)
    bagel.decoder(parts, AppendAttention(view, span, backend, None))


def encoding_noise(block: PictureBlock, generator: torch.Generator) -> Tensor:
    """What a picture's latent is sampled with, float32 [1, z_channels, H/8, W/8], drawn from the generator."""
    vae, (width, height) = block.config.vae, block.size
    return torch.randn(1, vae.z_channels, height // vae.downsample, width // vae.downsample, generator=generator)


def encode_latents(model: LoadedModel, image: Image.Image, noise: Tensor) -> Tensor:
    """A picture's latent tokens, sampled with the noise: float32 [tokens, latent_values]."""
    assert model.vae is not None
    with model.using("vae"):
        weight = model.vae.encoder.conv_in.weight
        # A pixel's colors lie beside each other, which convolutions go on with.
        pixels = in_range(to_bytes(image).to(weight.device), weight.dtype).permute(2, 0, 1)[None]
        latent = model.vae.encode(pixels, noise.to(weight.device, weight.dtype))[0]
    return patchify(latent.float(), model.folder.config.latent_patch)

"""From a request's terms to contexts: blocks of tokens, the key/value cache's layout, and their prefill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..checkpoint.config import BagelConfig
from ..checkpoint.tokenizer import BagelTokenizer
from ..errors import SettingError
from ..model.decoder import Part
from ..model.kv_cache import AppendAttention, KVCache, Region, SequenceView
from ..model.vision import patchify
from ..pictures.callers import is_data_url
from ..pictures.opening import Picture, open_picture
from ..runtime.loader import LoadedModel
from ..sampling.denoise import Branches
from ..sampling.text import append_text
from ..settings import PictureSettings, TextSettings, check_prompt
from .images import resize, to_pixels

if TYPE_CHECKING:
    from PIL import Image

Term: TypeAlias = str | Picture
"""A text, or an opened picture."""

MARKERS = 2
"""Tokens that frame a picture: vision_start and vision_end."""


@dataclass(frozen=True)
class TextBlock:
    ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PictureBlock:
    """An input picture after the VAE's resize rule. `for_drawing`: it enters as a VAE block before the ViT block."""

    image: Image.Image
    for_drawing: bool
    latent_grid: tuple[int, int]
    vit_image: Image.Image
    vit_grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        rows, columns = self.vit_grid
        vit = rows * columns + MARKERS
        rows, columns = self.latent_grid
        return vit + (rows * columns + MARKERS if self.for_drawing else 0)


Block = TextBlock | PictureBlock


@dataclass(frozen=True)
class Prepared:
    """A request that was checked: its terms opened, every setting filled in, the seed drawn."""

    terms: tuple[Term, ...]
    settings: PictureSettings | TextSettings
    changed: tuple[str, ...]
    """Settings that were changed, in words."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What its caller ought to know of how it was read."""
        of_pictures = (note for term in self.terms if not isinstance(term, str) for note in term.notes)
        return (*of_pictures, *self.changed)

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """Width and height of the last input picture, whose size an edit takes."""
        return next((term.image.size for term in reversed(self.terms) if not isinstance(term, str)), None)


def open_terms(terms: Iterable[Any]) -> list[Term]:
    """Texts checked and pictures opened.

    Args:
        terms: texts, and pictures in any form that `open_picture` takes; a text that is a data: URL is a picture.

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
        else:
            opened.append(open_picture(term))
    if not opened:
        raise SettingError("nothing to work from: give a prompt, a picture, or both")
    return opened


def read_terms(terms: Sequence[Term], config: BagelConfig, tokenizer: BagelTokenizer, drawing: bool) -> list[Block]:
    """Texts and pictures, in any order, as blocks."""
    blocks: list[Block] = []
    for term in terms:
        if isinstance(term, str):
            blocks.append(TextBlock(tuple(tokenizer.text_block(term))))
        else:
            image = resize(term.image, config.vae_resize)
            side, patch = config.token_pixels, config.vit.patch_size
            vit_image = resize(image, config.vit_resize)
            grids = [(i.height // s, i.width // s) for i, s in ((image, side), (vit_image, patch))]
            blocks.append(PictureBlock(image, drawing, grids[0], vit_image, grids[1]))
    return blocks


class Contexts:
    """Contexts of one request in one key/value cache, laid out as `model.kv_cache` describes.

    Args:
        picture_tokens: tokens of the picture to be generated with its markers; 0 for an answer.
        image_branch: whether image guidance is on, which needs the texts alone.
        spare: room after the last block, for generated text.
    """

    def __init__(
        self, model: LoadedModel, blocks: Sequence[Block], picture_tokens: int, image_branch: bool, spare: int
    ) -> None:
        self.model = model
        self.bagel, self.backend = model.bagel, model.attention
        side = _tokens_after_first_picture(blocks) if image_branch else 0
        main = side + picture_tokens
        capacity = main + sum(block.tokens for block in blocks) + spare
        self.kv_cache = KVCache(model.folder.config.decoder, capacity, self.bagel.dtype, self.bagel.device)
        self.scratch = range(side, main)
        self.full = SequenceView(self.kv_cache, Region(main, capacity))
        self.text = self.full.fork()
        self.image: SequenceView | None = None
        self._side = Region(0, side)
        self._image_branch = image_branch

    def append(self, block: Block, generator: torch.Generator) -> None:
        """Append an input block to the branches that see it."""
        if isinstance(block, TextBlock):
            self.text = self.full.fork()
            ids = torch.tensor(block.ids)
            append_text(self.bagel, self.full, ids, self.backend)
            if self.image is not None:
                append_text(self.bagel, self.image, ids, self.backend)
            return
        if self.image is None and self._image_branch:
            self.image = self.full.fork(self._side)
        append_picture(self.model, self.full, block, generator)
        self.text = self.full.fork()

    def append_system(self, block: TextBlock) -> None:
        """Append think's system prompt, which is not an input text: every branch but the empty one sees it."""
        append_text(self.bagel, self.full, torch.tensor(block.ids), self.backend)

    def append_thoughts(self, block: TextBlock) -> None:
        """Append the plan that think wrote, which only the full context sees."""
        if self.image is None:
            self.image = self.full.fork()
        self._grow_for(block.tokens)
        append_text(self.bagel, self.full, torch.tensor(block.ids), self.backend)

    def branches(self) -> Branches:
        """The contexts of guidance. Without an input picture the image branch is the full one."""
        image = self.image if self.image is not None else self.full.fork()
        return Branches(self.full, self.text, image if self._image_branch else None)

    def _grow_for(self, tokens: int) -> None:
        """A plan encoded again can be longer than it was generated: invalid bytes become U+FFFD."""
        region = self.full.region
        missing = region.used + tokens - (region.stop - region.start)
        if missing > 0:
            self.kv_cache.grow(missing)
            region.stop += missing


def _tokens_after_first_picture(blocks: Sequence[Block]) -> int:
    first = next((i for i, block in enumerate(blocks) if isinstance(block, PictureBlock)), len(blocks))
    return sum(block.tokens for block in blocks[first:] if isinstance(block, TextBlock))


def append_picture(model: LoadedModel, view: SequenceView, block: PictureBlock, generator: torch.Generator) -> None:
    """Append an input picture: VAE block where pictures are drawn, then ViT block."""
    bagel = model.bagel
    if block.for_drawing:
        latents = encode_latents(model, block.image, generator)
        hidden = bagel.embed_latents(latents, torch.zeros(1), *block.latent_grid)
        append_framed(model, view, "gen", hidden)
    patches = patchify(to_pixels(block.vit_image), model.folder.config.vit.patch_size)
    with model.using("vit"):
        tokens = bagel.embed_picture(patches, *block.vit_grid)
    append_framed(model, view, "und", tokens)


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


def encode_latents(model: LoadedModel, image: Image.Image, generator: torch.Generator) -> Tensor:
    """A picture's sampled latent tokens, float32 [tokens, latent_values]; draws its noise from the generator."""
    assert model.vae is not None
    c = model.folder.config
    noise = torch.randn(
        1, c.vae.z_channels, image.height // c.vae.downsample, image.width // c.vae.downsample, generator=generator
    )
    with model.using("vae"):
        weight = model.vae.encoder.conv_in.weight
        pixels = to_pixels(image)[None].to(weight.device, weight.dtype)
        latent = model.vae.encode(pixels, noise.to(weight.device, weight.dtype))[0]
    return patchify(latent.float(), c.latent_patch)

"""A request's terms while it waits: small, and the same to the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image
from support.pictures import noise, pixels

from lowmem_bagel.checkpoint.config import BagelConfig, ResizeRule
from lowmem_bagel.generation.images import resize
from lowmem_bagel.generation.inputs import Prepared, to_wait
from lowmem_bagel.pictures.opening import Picture
from lowmem_bagel.settings import text_settings

RULE = ResizeRule(1024, 512, 16)
CONFIG = cast(BagelConfig, SimpleNamespace(vae_resize=RULE))


def waiting(term: str | Picture) -> Any:
    (kept,) = to_wait(Prepared((term,), text_settings({}), ()), CONFIG).terms
    return kept


@pytest.mark.parametrize("size", [(2000, 1500), (1025, 1024), (3000, 300), (1031, 777), (1024, 1024), (40, 30)])
def test_what_waits_is_small_and_shown_as_ever(size: tuple[int, int]) -> None:
    picture = Picture(Image.fromarray(noise(size[1], size[0])), ("a note",))
    kept = waiting(picture)
    assert kept.notes == picture.notes
    assert kept.image.width * kept.image.height <= size[0] * size[1]
    assert (pixels(resize(kept.image, RULE)) == pixels(resize(picture.image, RULE))).all()


def test_a_large_picture_does_not_wait_large() -> None:
    kept = waiting(Picture(Image.new("RGB", (8000, 6000))))
    assert kept.image.size == RULE.resized(8000, 6000)


def test_a_text_stays() -> None:
    assert waiting("a text") == "a text"

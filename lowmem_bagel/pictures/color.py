"""Colors as the picture's profile means them, in sRGB."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from .encoded import Note

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageCms import ImageCmsProfile

SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
"""Pillow's mode of the colors that a profile is for."""
SAME = 2
"""Of 255: a profile that moves no color further is sRGB by another name."""


def to_srgb(image: Image.Image, icc: bytes | None, note: Note) -> Image.Image:
    """The picture in sRGB, its alpha kept; unchanged where the profile is sRGB or missing.

    A profile that cannot be used is noted and left out of account.
    """
    from PIL import Image, ImageCms

    if image.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        return _converted(image, lab, "LAB")
    if not icc:
        return image
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = SPACES.get(profile.profile.xcolor_space, "")
        colors = _as(image, mode)
        if colors is None:
            note(f"its color profile is for {profile.profile.xcolor_space.strip()} and was left out of account")
            return image
        if _is_srgb(profile, mode):
            return image
        converted = _converted(colors, profile, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, OverflowError) as error:
        note(f"its color profile is damaged and was left out of account ({error})")
        return image
    return converted if alpha is None else Image.merge("RGBA", (*converted.split(), alpha))


def _as(image: Image.Image, mode: str) -> Image.Image | None:
    """The picture's colors in the mode of a profile; None where the profile is for other pictures."""
    if image.mode == "RGBA" and mode == "RGB":
        return image.convert("RGB")
    if image.mode in ("L", "LA", "1") and mode in ("L", "RGB"):
        return image.convert("L").convert(mode)
    return image if image.mode == mode else None


def _converted(image: Image.Image, profile: ImageCmsProfile, mode: str) -> Image.Image:
    from PIL import ImageCms

    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":  # in place: no second copy of a large picture
        ImageCms.applyTransform(image, transform, inPlace=True)
        return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


def _is_srgb(profile: ImageCmsProfile, mode: str) -> bool:
    """By what it does to colors, not by its name."""
    from PIL import Image, ImageChops

    if mode not in ("RGB", "L"):
        return False
    steps = bytes(range(0, 256, 15))
    colors = (
        bytes(v for r in steps for g in steps for b in steps for v in (r, g, b)) if mode == "RGB" else bytes(range(256))
    )
    shown = Image.frombytes(mode, (len(colors) // len(mode), 1), colors)
    moved = ImageChops.difference(_converted(shown.copy(), profile, mode), shown.convert("RGB"))
    return max(high for _, high in moved.getextrema()) <= SAME  # type: ignore[misc]

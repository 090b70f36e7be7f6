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
    from PIL import ImageCms

    if image.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        return _converted(image, lab)
    if not icc:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = SPACES.get(profile.profile.xcolor_space, "")
        if not _fits(image, mode):
            note(f"its color profile is for {profile.profile.xcolor_space.strip()} and was left out of account")
            return image
        if _is_srgb(profile, mode):
            return image
        return _by_profile(image, profile, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, OverflowError) as error:
        note(f"its color profile is damaged and was left out of account ({error})")
        return image


def _fits(image: Image.Image, mode: str) -> bool:
    """Whether a profile is for such pictures; one for RGB is for greys as well."""
    return mode in {"L": ("L", "RGB"), "LA": ("L", "RGB"), "RGBA": ("RGB",)}.get(image.mode, (image.mode,))


def _by_profile(image: Image.Image, profile: ImageCmsProfile, mode: str) -> Image.Image:
    from PIL import Image

    if mode == "RGB":
        colored = {"L": "RGB", "LA": "RGBA"}.get(image.mode)
        return _converted(image.convert(colored) if colored else image, profile)
    if image.mode != "LA":
        return _converted(image, profile)
    return Image.merge("RGBA", (*_converted(image.getchannel("L"), profile).split(), image.getchannel("A")))


def _converted(image: Image.Image, profile: ImageCmsProfile) -> Image.Image:
    """By the profile, which is for the picture's mode. Colors are changed in place, for want of room."""
    from PIL import ImageCms

    colored = image.mode in ("RGB", "RGBA")
    transform = ImageCms.buildTransform(
        profile, ImageCms.createProfile("sRGB"), image.mode, image.mode if colored else "RGB"
    )
    if colored:
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
    moved = ImageChops.difference(_converted(shown.copy(), profile), shown.convert("RGB"))
    return max(high for _, high in moved.getextrema()) <= SAME  # type: ignore[misc]

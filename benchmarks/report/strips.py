"""Pictures of the same seed by every variant, and beside each how it differs from the source's."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem_bagel.errors import SettingError, UserError

from .looks import Look, plain, png
from .reading import Report, title_of

if TYPE_CHECKING:
    from PIL import Image

MOST_COLUMNS = 6
SIDE = 256
"""Pixels of a picture's longer side in the report."""
NOTHING: Mapping[str, str] = {}
SOURCE = title_of("source")
FACTORS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Shown:
    """A picture of a strip: PNGs of it and of its difference times `factor`; or why there is none."""

    title: str
    picture: bytes = b""
    difference: bytes = b""
    factor: int = 0
    same: bool = False
    why: str = ""


def strip(report: Report) -> list[Shown]:
    """The first seed's pictures, the source's first; nothing where the record names none.

    One factor for all differences, so that they can be compared: the largest that leaves most of the worst one dark
    enough to be read.
    """
    if not report.source_files:
        return []
    try:
        source = _read(report, report.source_files[0])
    except UserError as error:
        return [Shown(SOURCE, why=str(error))]
    found = {variant.title: _tried(report, variant.files, source) for variant in report.fidelity if variant.files}
    apart = {title: pair[1] for title, pair in found.items() if not isinstance(pair, str)}
    factor = _factor(list(apart.values()))
    shown = [Shown(SOURCE, _png(source))]
    for title, pair in found.items():
        if isinstance(pair, str):
            shown.append(Shown(title, why=pair))
        else:
            shown.append(Shown(title, _png(pair[0]), _amplified(pair[1], factor), factor, not pair[1].any()))
    return shown


def _tried(report: Report, files: tuple[str, ...], source: Image.Image) -> tuple[Image.Image, Any] | str:
    """The picture and its difference from the source's, or why there is none."""
    import numpy as np

    try:
        picture = _read(report, files[0])
    except UserError as error:
        return str(error)
    if picture.size != source.size:
        return f"{files[0]} has another size than the source's"
    return picture, np.abs(np.asarray(picture, dtype=int) - np.asarray(source, dtype=int))


def _read(report: Report, name: str) -> Image.Image:
    """A picture beside the record, as RGB, and never one elsewhere.

    Raises:
        SettingError: it is not there.
        ImageError: it is no picture.
    """
    from lowmem_bagel.pictures.opening import open_picture

    folder = report.path.parent.resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise SettingError(f"{name} is not beside the record")
    return open_picture(path).image


def _factor(differences: list[Any]) -> int:
    import numpy as np

    largest = max((float(np.percentile(each, 99)) for each in differences), default=0.0)
    return max((factor for factor in FACTORS if factor * largest <= 255), default=1)


def _amplified(difference: Any, factor: int) -> bytes:
    import numpy as np
    from PIL import Image

    return _png(Image.fromarray(np.clip(difference * factor, 0, 255).astype(np.uint8)))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    shown = image.copy()
    shown.thumbnail((SIDE, SIDE))
    shown.save(file, "PNG", optimize=True)
    return file.getvalue()


def strip_file(shown: list[Shown], look: Look, about: Mapping[str, str] = NOTHING) -> bytes | None:
    """The strip as one PNG: pictures above, differences below. None where there is nothing to compare."""
    from PIL import Image

    there = [each for each in shown if each.picture]
    if len(there) < 2:
        return None
    columns = min(MOST_COLUMNS, len(there))
    figure, axes = look.panels(2 * math.ceil(len(there) / columns), columns)
    for panel in axes.flat:
        panel.axis("off")
    for n, each in enumerate(there):
        row, column = 2 * (n // columns), n % columns
        words = "" if not each.difference else "no difference" if each.same else f"difference ×{each.factor}"
        for panel, data, said in (
            (axes[row][column], each.picture, plain(each.title)), (axes[row + 1][column], each.difference, words),
        ):  # fmt: skip
            panel.set_title(said, fontsize=look.text_size, color=look.ink)
            if data:
                panel.imshow(Image.open(io.BytesIO(data)))
    return png(figure, about, colors=256)

"""Reads a picture back into shapes and colours, and judges it against what was asked. No learning in it.

A region of one colour is compared with each of the four shapes at its own centre and area, so position and size are
free where the sentence leaves them free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .scenes import COLOURS, SHAPES, Item, Scene, direction, item_mask
from .sentences import Caption

MIN_IOU = 0.6
MIN_PIXELS = 20
"""Smaller regions are not counted as shapes; larger ones that are no shape are faults."""
MIN_PURITY = 0.85
MAX_STRAY = 0.01
"""Share of the picture's pixels that may be neither background nor part of a shape (edges blend the two)."""
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_NAMES = list(COLOURS)
_BACKGROUND_DISTANCE = 60.0
"""In RGB levels: nearer pixels are background. The two nearest colours lie 97 apart."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Region:
    """A connected region that is not background."""

    mask: Mask
    x: float
    y: float
    colour: str
    purity: float
    """Share of the inner pixels that have the colour."""
    shape: str
    iou: float
    """With that shape of the region's own centre and area."""
    angle: float = 0.0
    """That it is turned by, where shapes may be."""


@dataclass(frozen=True)
class Reading:
    background: str
    purity: float
    """Share of the pixels outside all regions that are near the background's colour."""
    regions: tuple[Region, ...]


def read_picture(
    picture: NDArray[np.uint8], shapes: Sequence[str] = SHAPES, angles: Mapping[str, Sequence[float]] | None = None
) -> Reading:
    """picture: uint8 [H, W, 3]; shapes: that a region may be; angles: those by which one of a shape may be turned, in
    degrees (none where a shape is not among them)."""
    looks = [(shape, angle) for shape in shapes for angle in (angles or {}).get(shape, (0.0,))]
    # Channel by channel: a norm over an axis of three takes longer than all the rest.
    channels = picture.astype(np.float32).transpose(2, 0, 1)
    red, green, blue = (
        np.square(channel - of[:, None, None]) for channel, of in zip(channels, _PALETTE.T, strict=True)
    )
    distances = np.sqrt(red + green + blue).transpose(1, 2, 0)
    nearest = distances.argmin(-1)
    border = np.concatenate((nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]))
    background = int(np.bincount(border, minlength=len(_NAMES)).argmax())
    outside = distances[:, :, background] < _BACKGROUND_DISTANCE
    masks = [m for m in components(~outside) if m.sum() >= MIN_PIXELS]
    regions = tuple(_region(picture, m, distances, background, looks) for m in masks)
    beside = ~np.logical_or.reduce([_grow(m) for m in masks], initial=False) if masks else np.ones_like(outside)
    return Reading(_NAMES[background], float(outside[beside].mean()) if beside.any() else 0.0, regions)


def _region(
    picture: NDArray[np.uint8],
    mask: Mask,
    distances: NDArray[np.float32],
    background: int,
    looks: Sequence[tuple[str, float]],
) -> Region:
    inner = _shrink(_shrink(mask))
    if not inner.any():
        inner = mask
    counts = np.bincount(distances[inner].argmin(-1), minlength=len(_NAMES))
    counts[background] = 0
    colour = int(counts.argmax())
    # Half covered pixels decide the outline: those nearer to the region's colour than to the background.
    solid = _grow(mask) & (distances[:, :, colour] < distances[:, :, background])
    own = next(iter(sorted(components(solid), key=lambda m: -int(m.sum()))), mask)
    ys, xs = np.nonzero(own)
    x, y = float(xs.mean()) + 0.5, float(ys.mean()) + 0.5
    radius = float(np.sqrt(own.sum() / np.pi))
    # Whatever of the region is not of its colour counts against the shape too.
    full = own | _shrink(mask)
    scores = {look: iou(full, item_mask(Item(look[0], "", "", x, y, radius, look[1]), *mask.shape)) for look in looks}
    best = max(scores, key=lambda look: scores[look])
    near = distances[:, :, colour] < _BACKGROUND_DISTANCE
    return Region(full, x, y, _NAMES[colour], float(near[inner].mean()), best[0], scores[best], best[1])


def iou(a: Mask, b: Mask) -> float:
    """Intersection over union."""
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 0.0


def judge_drawing(picture: NDArray[np.uint8], caption: Caption, shapes: Sequence[str] = SHAPES) -> list[str]:
    """What is wrong with a picture drawn from a caption; empty where it is right."""
    reading = read_picture(picture, shapes)
    faults = stray_faults(reading)
    scene = caption.scene
    if caption.names_background and reading.background != scene.background:
        faults.append(f"background {reading.background}, not {scene.background}")
    found = Counter((r.shape, r.colour) for r in reading.regions)
    wanted = Counter(item.kind for item in scene.items)
    if found != wanted:
        faults.append(f"holds {_words(found)}, not {_words(wanted)}")
    elif caption.names_relation:
        a, b = (next(r for r in reading.regions if (r.shape, r.colour) == item.kind) for item in scene.items)
        where = direction(a.x - b.x, a.y - b.y)
        if where != scene.relation():
            faults.append(f"{_words(Counter([scene.items[0].kind]))} lies {where}, not {scene.relation()}")
    return faults


def judge_edit(picture: NDArray[np.uint8], target: Scene) -> list[str]:
    """What is wrong with an edited picture: every shape of the target must be where it belongs, and nothing else."""
    if picture.shape[:2] != (target.height, target.width):
        return [f"is {picture.shape[1]}x{picture.shape[0]}, not {target.width}x{target.height}"]
    reading = read_picture(picture)
    faults = stray_faults(reading)
    if reading.background != target.background:
        faults.append(f"background {reading.background}, not {target.background}")
    left = list(reading.regions)
    for item in target.items:
        wanted = item_mask(item, target.height, target.width)
        best = max(left, key=lambda r: iou(r.mask, wanted), default=None)
        score = iou(best.mask, wanted) if best else 0.0
        if best is None or score < MIN_IOU:
            faults.append(f"no {item.colour} {item.shape} in its place (IoU {score:.2f})")
            continue
        left = [r for r in left if r is not best]
        if (best.shape, best.colour) != item.kind:
            faults.append(f"a {best.colour} {best.shape} where a {item.colour} {item.shape} belongs")
    if left:
        faults.append(f"{len(left)} regions too many")
    return faults


def stray_faults(reading: Reading) -> list[str]:
    """What no scene has: an unclean background, regions of mixed colors or of no shape."""
    faults = []
    if reading.purity < 1 - MAX_STRAY:
        faults.append(f"the background is {100 * reading.purity:.1f}% clean")
    for region in reading.regions:
        if region.purity < MIN_PURITY:
            faults.append(f"a {region.colour} region of mixed colours ({100 * region.purity:.0f}% pure)")
        if region.iou < MIN_IOU:
            faults.append(f"a {region.colour} region that is no shape (IoU {region.iou:.2f})")
    return faults


def _words(kinds: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{n} {colour} {shape}" for (shape, colour), n in sorted(kinds.items())) or "nothing"


def components(mask: Mask) -> list[Mask]:
    """The 4-connected regions of a mask.

    A place takes the largest number around it until all have that of their region's last place; and since a number says
    of which place it was, each then takes what that place has by now, or it would be a step a pixel.
    """
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return []
    box = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
    within = mask[box]
    numbers = np.arange(1, within.size + 1, dtype=np.int32).reshape(within.shape)
    padded = np.zeros((within.shape[0] + 2, within.shape[1] + 2), np.int32)
    labels = padded[1:-1, 1:-1]
    labels[:] = numbers * within
    while True:
        spread = np.maximum(padded[:-2, 1:-1], padded[2:, 1:-1])
        for around in (padded[1:-1, :-2], padded[1:-1, 2:], labels):
            np.maximum(spread, around, out=spread)
        spread *= within
        if np.array_equal(spread, labels):
            break
        labels[:] = np.concatenate(([0], spread.ravel()))[spread]
    found = []
    for label in labels[labels == numbers]:
        region = np.zeros_like(mask)
        region[box] = labels == label
        found.append(region)
    return found


def _shrink(mask: Mask) -> Mask:
    return ~_grow(~mask)


def _grow(mask: Mask) -> Mask:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown

"""Color spaces that files name by numbers, made into profiles: PNG's gAMA, cHRM and cICP, AVIF's and HEIC's boxes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from .encoded import Note

Point = tuple[float, float]
"""Of the CIE's chromaticity diagram."""
D65: Point = (0.3127, 0.3290)
RGB_709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
PRIMARIES: Mapping[int, tuple[Sequence[Point], Point]] = {
    1: (RGB_709, D65),
    4: (((0.67, 0.33), (0.21, 0.71), (0.14, 0.08)), (0.310, 0.316)),
    5: (((0.64, 0.33), (0.29, 0.60), (0.15, 0.06)), D65),
    6: (((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)), D65),
    7: (((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)), D65),
    9: (((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)), D65),
    11: (((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), (0.314, 0.351)),
    12: (((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), D65),
}
"""Red, green and blue, and white, by the numbers of ITU-T H.273."""
GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions by the same numbers. Those of video are shown as sRGB's is, as viewers do."""
USUAL_GAMMA = 1 / 0.45455
D50 = (0.9642, 1.0, 0.8249)
BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))
CURVE_POINTS = 1024


def of_numbers(primaries: int, transfer: int, note: Note) -> bytes | None:
    """The profile of a pair of code points; None for sRGB and what is not known."""
    if transfer in HDR:
        note(f"its light is coded for HDR screens ({HDR[transfer]}), and is shown as it stands")
        return None
    if primaries not in PRIMARIES or (primaries == 1 and transfer not in GAMMAS):
        return None
    return profile(*PRIMARIES[primaries], GAMMAS.get(transfer))


def of_gamma(gamma: float, chromaticities: Sequence[float]) -> bytes | None:
    """The profile of samples that are light to the power of `gamma`; None where it would be none.

    Args:
        chromaticities: x and y of white, red, green and blue; empty for those of sRGB.
    """
    if not 0.1 < gamma < 10:
        return None
    points = [(x, y) for x, y in zip(chromaticities[::2], chromaticities[1::2], strict=True)]
    usual = abs(1 / gamma / USUAL_GAMMA - 1) < 0.05
    if points and all(0 <= x < 1 and 0 < y < 1 for x, y in points):
        return profile(points[1:], points[0], None if usual else 1 / gamma)
    return None if usual else profile(RGB_709, D65, 1 / gamma)


def profile(primaries: Sequence[Point], white: Point, gamma: float | None) -> bytes | None:
    """An ICC profile of a display with these primaries, and this exponent or sRGB's curve; None for impossible ones."""
    import numpy as np

    columns = np.array([_xyz(point) for point in primaries]).T
    if abs(np.linalg.det(columns)) < 1e-6:
        return None
    own = columns * np.linalg.solve(columns, _xyz(white))
    cone = np.array(BRADFORD)
    matrix = np.linalg.solve(cone, ((cone @ D50) / (cone @ _xyz(white)))[:, None] * cone) @ own
    curve = _curve(gamma)
    tags = {b"desc": b"desc\0\0\0\0\0\0\0\1" + bytes(79), b"cprt": b"text\0\0\0\0\0", b"wtpt": _point(D50)}
    for letter, column in zip((b"r", b"g", b"b"), matrix.T, strict=True):
        tags |= {letter + b"XYZ": _point(column.tolist()), letter + b"TRC": curve}
    return _assembled(tags)


def _xyz(point: Point) -> tuple[float, float, float]:
    x, y = point
    return x / y, 1.0, (1 - x - y) / y


def _point(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _curve(gamma: float | None) -> bytes:
    steps = [step / (CURVE_POINTS - 1) for step in range(CURVE_POINTS)]
    light = [v**gamma if gamma else v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in steps]
    return b"curv\0\0\0\0" + struct.pack(f">I{CURVE_POINTS}H", CURVE_POINTS, *(round(65535 * v) for v in light))


def _assembled(tags: Mapping[bytes, bytes]) -> bytes:
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data.ljust(-(-len(data) // 4) * 4, b"\0")
    head = struct.pack(">I4xI", start + len(body), 0x02100000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return head + _point(D50)[8:] + bytes(48) + table + body

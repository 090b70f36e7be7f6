"""The compiled loops that quantise a bf16 weight to GGUF's blocks. Importing this file imports numba.

Q8_0 is the rounding that everybody does. The K types leave open how scales are found; here it is least squares: of some
twenty ways to spread the levels over the values, each with the best scale (and min) for the levels that the values then
get, the one whose squared error is the least. The scales are rounded last, and values get the level next to them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, no-any-return"

from __future__ import annotations

import numpy as np

from ..compiled import INFINITY, compiled, compiled_sums, peak, squares, widen

F0, F1, F2, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
F31, F32, F63, F127, F128 = np.float32(31), np.float32(32), np.float32(63), np.float32(127), np.float32(128)
TINY, SLACK = np.float32(1e-30), np.float32(1.004)
U13 = np.uint32(13)
SMALLEST_NORMAL, BIAS = np.uint32(0x38800000), np.uint32(112 << 23)
HALF_BITS, FFF = np.uint32(0x3F000000), np.uint32(0xFFF)
HALF_INFINITY = 0x7C00
TOO_LARGE = np.uint32(0x4A800000)
"""The bf16 pattern of 2^22: scales of scales of such values are no fp16 numbers any more in the K types."""
SUB = 32
"""Values that share a scale in Q8_0, Q4_K and Q5_K."""
SMALL_SUB = 16
"""The same in Q6_K."""
SUPER = 256
STEPS, STEP = 20, np.float32(0.1)
"""How many spreads are tried, from one level fewer to one more."""


@compiled
def half(value, one, bits):
    """The fp16 pattern of a float32 that is not negative, rounded to even. one, bits: one word as both types."""
    one[0] = value
    if bits[0] < SMALLEST_NORMAL:  # a sum whose last place is fp16's smallest number
        one[0] = value + HALF
        return np.uint16(bits[0] - HALF_BITS)
    return np.uint16(min((bits[0] - BIAS + FFF + (bits[0] >> U13 & np.uint32(1))) >> U13, np.uint32(HALF_INFINITY)))


@compiled
def unhalf(pattern, one, bits):
    """The float32 of an fp16 pattern that is neither negative nor infinite."""
    if pattern < 0x400:
        return np.float32(pattern) * np.float32(2.0**-24)
    bits[0] = (np.uint32(pattern) << U13) + BIAS
    return one[0]


@compiled
def about(value, one, bits):
    """`half`, of the next number where a small one, which has few bits, would be too small for the largest levels."""
    found = half(value, one, bits)
    return np.uint16(found + 1) if unhalf(found, one, bits) * SLACK < value else found


@compiled
def encode_q8_0(bits, out, sums):
    """Quantise rows and measure what is lost.

    bits: uint16 [rows, width] of bf16, or uint32 of float32. out: uint8 [rows, width / 32 * 34]. sums: float64 [2], to
    which the squared norms of what is lost and of the weight are added. Returns whether all values are finite and their
    scales fp16 numbers; what is written is of no use otherwise.
    """
    width = bits.shape[1]
    wide, lost, codes = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(SUB, np.int8)
    patterns, one = wide.view(np.uint32), np.empty(1, np.float32)
    word = one.view(np.uint32)
    for r in range(bits.shape[0]):
        widen(bits[r], patterns)
        if peak(patterns) >= INFINITY:
            return False
        for b in range(width // SUB):
            values, loss = wide[b * SUB : (b + 1) * SUB], lost[b * SUB : (b + 1) * SUB]
            largest = F0
            for i in range(SUB):
                largest = max(largest, abs(values[i]))
            scale = largest / F127
            inverse = F1 / scale if scale > F0 else F0
            if np.isinf(inverse):
                inverse = F0
            stored = half(scale, one, word)
            if stored >= HALF_INFINITY:
                return False
            d = unhalf(stored, one, word)
            for i in range(SUB):
                scaled = values[i] * inverse
                size = abs(scaled)
                whole = np.floor(size)
                whole += np.floor(F2 * (size - whole))  # halves go away from zero
                level = whole if scaled >= F0 else -whole
                codes[i] = np.int8(level)
                loss[i] = d * level - values[i]
            block = out[r, b * 34 : (b + 1) * 34]
            block[0], block[1] = np.uint8(stored & 255), np.uint8(stored >> 8)
            for i in range(SUB):
                block[2 + i] = np.uint8(codes[i])
        sums[0] += squares(lost)
        sums[1] += squares(wide)
    return True


@compiled_sums
def _fit(values, count, top, low, inverse):
    """Sums of q, q^2 and q x for q = round((x - low) inverse), of 0 to `top`."""
    q1, q2, qx = F0, F0, F0
    for i in range(SUB):
        q = min(max(np.floor((values[i] - low) * inverse + HALF), F0), top)
        q1 += q
        q2 += q * q
        qx += q * values[i]
    return q1, q2, qx


@compiled_sums
def _moments(values):
    total, lowest, highest, square = F0, values[0], values[0], F0
    for i in range(SUB):
        total += values[i]
        square += values[i] * values[i]
        lowest = min(lowest, values[i])
        highest = max(highest, values[i])
    return total, lowest, highest, square


@compiled
def _scale_and_min(values, top):
    """The scale and the min, both not negative, so that scale * q - min of q up to `top` is near the values."""
    total, lowest, highest, square = _moments(values)
    low = min(lowest, F0)
    if highest <= low:
        return F0, -low
    best, scale, least = np.float32(np.inf), F0, F0
    for k in range(STEPS + 1):
        inverse = (top - F1 + STEP * np.float32(k)) / (highest - low)
        q1, q2, qx = _fit(values, SUB, top, low, inverse)
        determinant = F32 * q2 - q1 * q1
        s, m = F0, F1
        if determinant > F0:
            s = (F32 * qx - q1 * total) / determinant
            m = (q2 * total - q1 * qx) / determinant
        if m > F0 and q2 > F0:
            s, m = qx / q2, F0
        error = square + s * (s * q2 - F2 * qx) + m * (F2 * s * q1 + F32 * m - F2 * total)
        if s > F0 and m <= F0 and error < best:
            best, scale, least = error, s, -m
    return scale, least


@compiled
def _rounded_scale(value, inverse):
    return min(np.floor(value * inverse + HALF), F63)


@compiled
def _levels(values, codes, loss, scale, least, top):
    """The level next to each value, and what it is off by."""
    inverse = F1 / scale if scale > F0 else F0
    for i in range(SUB):
        q = min(max(np.floor((values[i] + least) * inverse + HALF), F0), top)
        codes[i] = np.uint8(q)
        loss[i] = scale * q - least - values[i]


@compiled
def _encode_super(values, loss, block, codes, scales, mins, top, one, word):
    """Everything of a block of Q4_K or Q5_K but the levels, which become `codes`."""
    most, deepest = F0, F0
    for s in range(8):
        scales[s], mins[s] = _scale_and_min(values[s * SUB : (s + 1) * SUB], top)
        most, deepest = max(most, scales[s]), max(deepest, mins[s])
    d_bits, m_bits = about(most / F63, one, word), about(deepest / F63, one, word)
    block[0], block[1] = np.uint8(d_bits & 255), np.uint8(d_bits >> 8)
    block[2], block[3] = np.uint8(m_bits & 255), np.uint8(m_bits >> 8)
    d, dmin = unhalf(d_bits, one, word), unhalf(m_bits, one, word)
    d_inverse, m_inverse = F1 / max(d, TINY), F1 / max(dmin, TINY)
    packed = block[4:16]
    for s in range(8):
        scale, least = _rounded_scale(scales[s], d_inverse), _rounded_scale(mins[s], m_inverse)
        part = slice(s * SUB, (s + 1) * SUB)
        _levels(values[part], codes[part], loss[part], d * scale, dmin * least, top)
        low, high = np.uint8(scale), np.uint8(least)
        if s < 4:
            packed[s], packed[4 + s] = low, high
        else:
            packed[4 + s] = np.uint8((low & 15) | (high & 15) << 4)
            packed[s - 4] |= np.uint8(low >> 4 << 6)
            packed[s] |= np.uint8(high >> 4 << 6)


@compiled
def _pack_nibbles(codes, packed):
    """codes [256] -> [128]: of each 64 values the first 32 in the low four bits."""
    for chunk in range(4):
        for i in range(32):
            low, high = codes[chunk * 64 + i] & 15, codes[chunk * 64 + 32 + i] & 15
            packed[chunk * 32 + i] = np.uint8(low | high << 4)


@compiled
def encode_q4_k(bits, out, sums):
    """As `encode_q8_0`; width a multiple of 256, out [rows, width / 256 * 144]."""
    width = bits.shape[1]
    wide, lost, codes = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(SUPER, np.uint8)
    scales, mins, one = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(1, np.float32)
    patterns, word = wide.view(np.uint32), one.view(np.uint32)
    for r in range(bits.shape[0]):
        widen(bits[r], patterns)
        if peak(patterns) >= TOO_LARGE:
            return False
        for b in range(width // SUPER):
            part, block = slice(b * SUPER, (b + 1) * SUPER), out[r, b * 144 : (b + 1) * 144]
            _encode_super(wide[part], lost[part], block, codes, scales, mins, np.float32(15), one, word)
            _pack_nibbles(codes, block[16:])
        sums[0] += squares(lost)
        sums[1] += squares(wide)
    return True


@compiled
def encode_q5_k(bits, out, sums):
    """As `encode_q8_0`; width a multiple of 256, out [rows, width / 256 * 176]."""
    width = bits.shape[1]
    wide, lost, codes = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(SUPER, np.uint8)
    scales, mins, one = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(1, np.float32)
    patterns, word = wide.view(np.uint32), one.view(np.uint32)
    for r in range(bits.shape[0]):
        widen(bits[r], patterns)
        if peak(patterns) >= TOO_LARGE:
            return False
        for b in range(width // SUPER):
            part, block = slice(b * SUPER, (b + 1) * SUPER), out[r, b * 176 : (b + 1) * 176]
            _encode_super(wide[part], lost[part], block, codes, scales, mins, np.float32(31), one, word)
            top = block[16:48]
            for i in range(32):
                byte = 0
                for s in range(8):
                    byte |= (codes[s * 32 + i] >> 4) << s
                top[i] = np.uint8(byte)
            _pack_nibbles(codes, block[48:])
        sums[0] += squares(lost)
        sums[1] += squares(wide)
    return True


@compiled_sums
def _fit_signed(values, inverse):
    """Sums of q^2 and q x for q = round(x inverse), of -32 to 31."""
    q2, qx = F0, F0
    for i in range(SMALL_SUB):
        q = min(max(np.floor(values[i] * inverse + HALF), -F32), F31)
        q2 += q * q
        qx += q * values[i]
    return q2, qx


@compiled
def _signed_scale(values):
    """The scale, of either sign, so that scale * q of q from -32 to 31 is near the values."""
    lowest, highest = F0, F0
    for i in range(SMALL_SUB):
        lowest, highest = min(lowest, values[i]), max(highest, values[i])
    end = lowest if -lowest >= highest else highest  # gets the level -32
    if abs(end) < TINY:
        return F0
    best, scale = F0, F0
    for k in range(STEPS + 1):
        q2, qx = _fit_signed(values, -(F31 + STEP * np.float32(k)) / end)
        if q2 > F0 and qx * qx > best * q2:
            best, scale = qx * qx / q2, qx / q2
    return scale


@compiled
def encode_q6_k(bits, out, sums):
    """As `encode_q8_0`; width a multiple of 256, out [rows, width / 256 * 210]."""
    width = bits.shape[1]
    wide, lost, codes = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(SUPER, np.uint8)
    scales, one = np.empty(16, np.float32), np.empty(1, np.float32)
    patterns, word = wide.view(np.uint32), one.view(np.uint32)
    for r in range(bits.shape[0]):
        widen(bits[r], patterns)
        if peak(patterns) >= TOO_LARGE:
            return False
        for b in range(width // SUPER):
            values, loss = wide[b * SUPER : (b + 1) * SUPER], lost[b * SUPER : (b + 1) * SUPER]
            block = out[r, b * 210 : (b + 1) * 210]
            largest = F0
            for s in range(16):
                scales[s] = _signed_scale(values[s * SMALL_SUB : (s + 1) * SMALL_SUB])
                largest = scales[s] if abs(scales[s]) > abs(largest) else largest
            d_bits = about(abs(largest) / F128, one, word)
            d = unhalf(d_bits, one, word)
            if largest > F0:  # which gets the scale -128
                d, d_bits = -d, d_bits | np.uint16(0x8000)
            inverse = F1 / d if d != F0 else F0
            for s in range(16):
                rounded = min(max(np.floor(scales[s] * inverse + HALF), -F128), F127)
                block[192 + s] = np.uint8(np.int8(rounded))
                scale = d * rounded
                level_inverse = F1 / scale if scale != F0 else F0
                for i in range(s * SMALL_SUB, (s + 1) * SMALL_SUB):
                    q = min(max(np.floor(values[i] * level_inverse + HALF), -F32), F31)
                    codes[i] = np.uint8(q + F32)
                    loss[i] = scale * q - values[i]
            block[208], block[209] = np.uint8(d_bits & 255), np.uint8(d_bits >> 8)
            for h in range(2):
                part, low, top = codes[h * 128 : (h + 1) * 128], block[h * 64 :], block[128 + h * 32 :]
                for i in range(32):
                    a, e, f, g = part[i], part[32 + i], part[64 + i], part[96 + i]
                    low[i] = np.uint8((a & 15) | (f & 15) << 4)
                    low[32 + i] = np.uint8((e & 15) | (g & 15) << 4)
                    top[i] = np.uint8(a >> 4 | e >> 4 << 2 | f >> 4 << 4 | g >> 4 << 6)
        sums[0] += squares(lost)
        sums[1] += squares(wide)
    return True

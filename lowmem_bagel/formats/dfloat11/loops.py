"""The compiled inner loops of the DFloat11 codec. Importing this file imports numba; only the codec does, when used.

The loops hold no lock, so the codec runs them on plain threads: numba's own parallel loops abort the process when two
threads enter them. A stream is handled in 64-bit words whose highest bit comes first ("windows", one a GPU thread).
"""

# The compiler takes types from the arguments; annotating every local would say nothing more.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import numpy as np

from ..compiled import compiled

WINDOW = 64
WINDOWS_PER_BLOCK = 512
BLOCK_BITS = WINDOW * WINDOWS_PER_BLOCK
PEEK = 12
"""Bits that are decoded by one look-up."""
U0, U1, U8, U63, U64 = (np.uint64(n) for n in (0, 1, 8, 63, 64))
UPEEK, UPEEK_SHIFT, UBYTE = np.uint64(PEEK), np.uint64(64 - PEEK), np.uint64(0xFF)


@compiled
def split(bits, sign_mantissa, counts):
    """Write the sign and mantissa bytes of bf16 `bits` (uint16 [n]) and add its exponents to `counts`.

    sign_mantissa: uint8 [n], out. counts: int64 [256].
    """
    for i in range(bits.size):
        sign_mantissa[i] = (bits[i] >> 8) & 0x80 | bits[i] & 0x7F
    tables = np.zeros((4, 256), np.int64)  # with one table, equal neighbours would wait for each other
    whole = bits.size // 4
    for i in range(whole):
        for j in range(4):
            tables[j, bits[4 * i + j] >> 7 & 0xFF] += 1
    for i in range(4 * whole, bits.size):
        tables[0, bits[i] >> 7 & 0xFF] += 1
    for j in range(4):
        counts += tables[j]


@compiled
def encode(bits, codes, lengths, start, index, words, gaps, positions):
    """Append the codes of the exponents of `bits` (uint16 [n]) to the stream from bit `start` on.

    codes: uint64 [256], left-aligned. lengths: uint64 [256], 1 to 32. index: number of weights before these.
    words: the stream, uint64, big-endian; only whole words are written. gaps: uint8, one a window, and positions:
    uint32, one a block, are written for the windows and blocks that are entered.
    Returns the first word where it began before these codes, and the last where it is not full; else 0.
    """
    place = start // WINDOW
    used = np.uint64(start % WINDOW)
    shared = used != U0
    head = U0
    word = U0
    for i in range(bits.size):
        exponent = (bits[i] >> 7) & 0xFF
        code = codes[exponent]
        length = lengths[exponent]
        word |= code >> used
        used += length
        if used >= U64:
            if shared:
                head = word
                shared = False
            else:
                words[place] = _swapped(word)
            used -= U64
            word = code << (length - used)
            place += 1
            if place < gaps.size:
                gaps[place] = used
                if place % WINDOWS_PER_BLOCK == 0:
                    positions[place // WINDOWS_PER_BLOCK] = index + i + 1
    return head, word


@compiled
def _swapped(word):
    """The word's bytes in reverse order."""
    out = U0
    for _ in range(8):
        out = out << U8 | word & UBYTE
        word >>= U8
    return out


@compiled
def pack_gaps(gaps, packed):
    """gaps: uint8 [8 * k] of 5-bit numbers -> packed: uint8 [5 * k], highest bits first."""
    for k in range(packed.size // 5):
        word = U0
        for j in range(8):
            word = word << np.uint64(5) | np.uint64(gaps[8 * k + j])
        for j in range(5):
            packed[5 * k + j] = (word >> np.uint64(32 - 8 * j)) & UBYTE


@compiled
def peek_table(luts, table):
    """Fill `table`, uint64 [2 ** PEEK], with the codes that these bits begin with: up to four whole ones.

    An entry's bytes, lowest first: four symbols; bits of the first code, of all but the last, of all; number of codes.
    0 codes: the first is longer than PEEK bits.
    """
    for front in range(table.size):
        symbols, ends, count = _whole_codes(luts, np.uint64(front) << UPEEK_SHIFT, PEEK)
        one, bits = ends & 255, ends >> 8 * max(count - 1, 0) & 255
        before = ends >> 8 * (count - 2) & 255 if count > 1 else 0
        table[front] = symbols | one << 32 | before << 40 | bits << 48 | count << 56


@compiled
def step_tables(luts, bits, steps, symbols):
    """Fill a kernel's multi-symbol tables, uint32 [2**bits] each; see `kernels.step_tables`."""
    for index in range(1 << bits):
        codes, ends, count = _whole_codes(luts, np.uint64(index) << np.uint64(64 - bits), bits)
        step, found = count << 8, 0
        for place in range(count):
            symbol = codes >> 8 * place & 255
            found |= (symbol >> 1 | (symbol & 1) << 7) << 8 * place
            end = ends >> 8 * place & 255
            step |= end << 16 + 4 * place if place + 1 < count else end
        steps[index], symbols[index] = step, found


@compiled
def _whole_codes(luts, front, width):
    """Up to four codes that `width` bits at the front of 64 begin with: their symbols and the bits after which each
    ends, a byte each, lowest first, and their number."""
    symbols, ends, bits, count = 0, 0, 0, 0
    unknown = (U1 << np.uint64(64 - width)) - U1
    while count < 4:
        # What follows the bits must not matter: a slot that only the end mark reaches holds some other symbol.
        symbol, length = _look_up(luts, front << np.uint64(bits))
        same = (symbol, length) == _look_up(luts, (front | unknown) << np.uint64(bits))
        if not same or length == 0 or bits + length > width:
            break
        bits += length
        symbols |= symbol << 8 * count
        ends |= bits << 8 * count
        count += 1
    return symbols, ends, count


@compiled
def _look_up(luts, bits):
    """The symbol at the front of 64 bits and its length; length 0 where no code begins so."""
    last = luts.shape[0] - 1
    table = 0
    entry = 0
    level = 0
    for level in range(4):
        entry = np.int64(luts[table, np.int64(bits >> np.uint64(56 - 8 * level) & UBYTE)])
        if entry < 240 or level == 3:
            break
        table = 256 - entry
        if table >= last:
            return 0, 0
    length = np.int64(luts[last, entry])
    return (entry, length) if 8 * level < length <= 8 * level + 8 else (0, 0)


@compiled
def _word(stream, place):
    """Word `place` of the stream (uint8); zeros follow its end."""
    word = U0
    first = 8 * place
    if first + 8 <= stream.size:
        for j in range(8):
            word = word << U8 | np.uint64(stream[first + j])
        return word
    for j in range(8):
        word = word << U8
        if first + j < stream.size:
            word |= np.uint64(stream[first + j])
    return word


@compiled
def decode(stream, luts, table, gaps, positions, sign_mantissa, first, last, out):
    """Decode blocks [first, last) into `out`, uint16, whose element 0 is weight positions[first].

    stream: uint8. table: of `peek_table`. gaps: uint8, packed. positions: int64 [blocks + 1], rising, its end at most
    sign_mantissa.size. Every gap and position is compared with the codes. Returns -1, or the first damaged block.
    """
    base = positions[first]
    total = positions[-1]
    exponents = np.empty(BLOCK_BITS + 4, np.uint8)
    for block in range(first, last):
        count = positions[block + 1] - positions[block]
        if count == 0:
            continue
        done = 0
        place = block * WINDOWS_PER_BLOCK
        used = _gap(gaps, place)
        following = _word(stream, place)
        while done < count:
            if place >= (block + 1) * WINDOWS_PER_BLOCK or np.uint64(_gap(gaps, place)) != used:
                return block
            word = following
            following = _word(stream, place + 1)
            while used < U64 and done < count:
                front = word << used | following >> U1 >> (U63 - used)
                entry = table[front >> UPEEK_SHIFT]
                found = np.int64(entry >> np.uint64(56))
                if used + (entry >> np.uint64(40) & UBYTE) < U64 and done + found <= count and found > 0:
                    exponents[done] = entry & UBYTE
                    exponents[done + 1] = entry >> U8 & UBYTE
                    exponents[done + 2] = entry >> np.uint64(16) & UBYTE
                    exponents[done + 3] = entry >> np.uint64(24) & UBYTE
                    done += found
                    used += entry >> np.uint64(48) & UBYTE
                elif found > 0:
                    exponents[done] = entry & UBYTE
                    done += 1
                    used += entry >> np.uint64(32) & UBYTE
                else:
                    symbol, length = _look_up(luts, front)
                    if length == 0:
                        return block
                    exponents[done] = symbol
                    done += 1
                    used += np.uint64(length)
            if used >= U64:
                used -= U64
                place += 1
        end = place * WINDOW + np.int64(used)
        if positions[block + 1] == total:
            if (end + 7) // 8 != stream.size:
                return block
        elif place != (block + 1) * WINDOWS_PER_BLOCK or np.uint64(_gap(gaps, place)) != used:
            return block
        start, end = positions[block], positions[block + 1]
        _join(exponents, sign_mantissa[start:end], out[start - base : end - base])
    return -1


@compiled
def _join(exponents, sign_mantissa, out):
    """bf16 bits, uint16 [n], of their parts, uint8 [n]. The compiler vectorises 16-bit numbers and plain indices."""
    for i in range(out.size):
        plain = np.int16(sign_mantissa[i])
        out[i] = np.uint16((plain & 0x80) << 8 | np.int16(exponents[i]) << 7 | plain & 0x7F)


@compiled
def _gap(gaps, window):
    """The 5-bit number of a window."""
    bit = 5 * window
    pair = np.uint64(gaps[bit >> 3]) << U8
    if (bit >> 3) + 1 < gaps.size:
        pair |= np.uint64(gaps[(bit >> 3) + 1])
    return pair >> np.uint64(11 - (bit & 7)) & np.uint64(31)

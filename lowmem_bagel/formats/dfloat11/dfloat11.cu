// Decoding of the DFloat11 format (arXiv 2504.11651; stored tensors as in the package dfloat11 0.5.0).
//
// A tile is 512 windows of 8 encoded bytes, one a thread; the format stores where the first code of a window begins
// and which output a tile starts with. A tile goes through three steps:
//   count    every thread counts the codes that begin in its window; a prefix sum gives each its place,
//   expand   every thread writes its exponents, one byte each, to their place in shared memory,
//   combine  the block joins them with the sign and mantissa bytes, 8 outputs at a time in 16-byte stores.
// A lookup of TABLE_BITS bits yields up to four symbols, so that walking a window twice is cheaper than keeping it.
// Blocks are persistent: each takes a range of tiles over all groups and keeps a group's tables in shared memory.
//
// Nothing is read or written out of bounds whatever the encoded bytes, tables and positions hold.

#include "common.cuh"

#ifndef TABLE_BITS
#define TABLE_BITS 11
#endif
#ifndef BLOCKS_PER_MULTIPROCESSOR
#define BLOCKS_PER_MULTIPROCESSOR 3
#endif
// Pieces of 8 sign bytes that a thread requests before it expands; 3 cover the usual 12,000 outputs a tile.
#ifndef EARLY_PIECES
#define EARLY_PIECES 3
#endif

#define THREADS 512
#define WARPS (THREADS / 32)
#define WINDOW_BYTES 8
#define WINDOW_BITS 64
#define ENTRIES (1 << TABLE_BITS)
#define POINTER 240      // values of a byte-wise table from here on name another table
#define ALL_LANES 0xffffffffu

#define STATUS_COUNT_MISMATCH 1u  // a tile does not hold as many codes as its positions say: the data is corrupt
#define STATUS_FP16_OVERFLOW 2u   // a finite weight does not fit fp16

// `_DESCRIPTOR` in kernels.py has the fields in this order. Addresses are relative to the kernel's `base`, but for `table`.
struct Group {
    u64 table;          // u32 steps[ENTRIES], u32 symbols[ENTRIES], u8 luts[lut_tables + 1][256]
    u64 lut_tables;
    u64 encoded;
    u64 encoded_bytes;
    u64 signs;
    u64 positions;
    u64 gaps;
    u64 weights;
    u64 first_tile;     // of this group among the tiles of all groups
    u64 tiles;
    u64 out_offset;     // in elements
};

// An entry of `steps`: bits 0-5 length of all codes, 8-10 their count (0: the first is longer than TABLE_BITS),
// 16-19, 20-23, 24-27 offset in bits of the second, third and fourth code, 0 where there is none.
// An entry of `symbols`: the exponents in order, lowest byte first, each rotated right by one bit: so its low bit
// lies where a bf16's low byte has it and the others where the high byte has them.
__device__ __forceinline__ u32 step_bits(u32 step) { return step & 63; }
__device__ __forceinline__ u32 step_count(u32 step) { return (step >> 8) & 7; }

struct Window {
    u32 high, middle, low;  // 96 bits, first bit highest: the window and what a code that begins in it may reach
};

__device__ __forceinline__ u32 bits_at(const Window& w, u32 bit) {
    const bool second = bit >= 32;
    return __funnelshift_l(second ? w.low : w.middle, second ? w.middle : w.high, bit);
}

__device__ __forceinline__ u32 big_endian(u32 word) { return __byte_perm(word, 0, 0x0123); }

// Up to four bytes of the stream, first one highest; zeros stand for what is beyond its end.
__device__ __noinline__ u32 load_last_bytes(const u8* encoded, u32 encoded_bytes, u32 byte) {
    u32 word = 0;
    for (u32 i = 0; i < 4 && byte + i < encoded_bytes; ++i) word |= static_cast<u32>(encoded[byte + i]) << (24 - 8 * i);
    return word;
}

// The 5-bit number of a window: where in it the first code begins.
__device__ __forceinline__ u32 load_gap(const u8* gaps, u32 window) {
    const u32 bit = (window & 7) * 5;  // eight gaps are five bytes
    const u8* bytes = gaps + (window >> 3) * 5 + (bit >> 3);
    const u32 next = (bit & 7) > 3 ? bytes[1] : 0;
    return (((static_cast<u32>(bytes[0]) << 8) | next) >> (11 - (bit & 7))) & 31;
}

// What a thread needs of a tile before it can count; requested one tile ahead.
struct Request {
    u32 high, middle;  // the thread's window
    u32 beyond;        // lane 31: the four bytes after it, which the other lanes have from their neighbour
    u32 gap, stop;
};

__device__ __forceinline__ Request request_tile(const Group& group, u64 base, u32 local) {
    const u32 window = local * THREADS + threadIdx.x, byte = window * WINDOW_BYTES;
    const u8* encoded = reinterpret_cast<const u8*>(base + group.encoded);
    const u32 encoded_bytes = static_cast<u32>(group.encoded_bytes);
    const bool last_lane = (threadIdx.x & 31) == 31;
    Request r = {0, 0, 0, 0, 0};
    if (byte + 12 <= encoded_bytes) {
        const uint2 words = __ldcs(reinterpret_cast<const uint2*>(encoded + byte));
        r.high = big_endian(words.x);
        r.middle = big_endian(words.y);
        if (last_lane) r.beyond = big_endian(__ldg(reinterpret_cast<const u32*>(encoded + byte + 8)));
    } else {
        r.high = load_last_bytes(encoded, encoded_bytes, byte);
        r.middle = load_last_bytes(encoded, encoded_bytes, byte + 4);
        if (last_lane) r.beyond = load_last_bytes(encoded, encoded_bytes, byte + 8);
    }
    r.gap = load_gap(reinterpret_cast<const u8*>(base + group.gaps), window);
    r.stop = __ldg(reinterpret_cast<const u32*>(base + group.positions) + local + 1);
    return r;
}

struct Symbol {
    u32 length, rotated;
};

// One code of any length by the format's byte-wise tables, which `luts` holds in shared memory.
__device__ __noinline__ Symbol long_code(const u8* luts, u32 lut_tables, u32 bits) {
    u32 symbol = luts[bits >> 24];
    for (int level = 1; level < 4 && symbol >= POINTER; ++level) {
        const u32 table = 256 - symbol;
        if (table >= lut_tables) break;
        bits <<= 8;
        symbol = luts[table * 256 + (bits >> 24)];
    }
    u32 length = luts[lut_tables * 256 + symbol];
    length = length < 1 ? 1 : length > 32 ? 32 : length;
    const Symbol result = {length, (symbol >> 1) | ((symbol & 1) << 7)};
    return result;
}

__device__ __forceinline__ u32 count_codes(const Window& w, u32 bit, const u32* steps, const u8* luts, u32 lut_tables) {
    u32 count = 0, last, step;
    do {
        const u32 bits = bits_at(w, bit);
        step = steps[bits >> (32 - TABLE_BITS)];
        if (step == 0) step = 256 | long_code(luts, lut_tables, bits).length;
        last = bit;
        count += step_count(step);
        bit += step_bits(step);
    } while (bit < WINDOW_BITS);
    // The last lookup may have run on into the next thread's codes.
    count -= last + ((step >> 16) & 15) >= WINDOW_BITS;
    count -= last + ((step >> 20) & 15) >= WINDOW_BITS;
    count -= last + ((step >> 24) & 15) >= WINDOW_BITS;
    return count;
}

// Writes `count` exponents to target[0...]. Whole words are stored at once; the bytes at both ends share their word
// with a neighbour's and are stored singly.
__device__ __forceinline__ void expand_codes(const Window& w, u32 bit, u32 count, u8* target, u32 target_offset,
                                             const u32* steps, const u32* symbols, const u8* luts, u32 lut_tables) {
    const u32 begin = target_offset & 3;
    u32* word = reinterpret_cast<u32*>(target + (target_offset & ~3u));
    u32 first = begin;    // bytes of the current word that are not ours
    u32 filled = begin;   // bytes of `pending` in use
    u64 pending = 0;
    while (count != 0) {
        const u32 bits = bits_at(w, bit);
        const u32 index = bits >> (32 - TABLE_BITS);
        u32 step = steps[index], found = symbols[index];
        if (step == 0) {
            const Symbol symbol = long_code(luts, lut_tables, bits);
            step = 256 | symbol.length;
            found = symbol.rotated;
        }
        const u32 taken = step_count(step) < count ? step_count(step) : count;
        bit += step_bits(step);
        count -= taken;
        pending |= static_cast<u64>(found) << (8 * filled);
        filled += taken;
        if (filled >= 4) {
            if (first == 0) {
                *word = static_cast<u32>(pending);
            } else {
                for (u32 i = first; i < 4; ++i) reinterpret_cast<u8*>(word)[i] = static_cast<u8>(pending >> (8 * i));
                first = 0;
            }
            ++word;
            pending >>= 32;
            filled -= 4;
        }
    }
    for (u32 i = first; i < filled; ++i) reinterpret_cast<u8*>(word)[i] = static_cast<u8>(pending >> (8 * i));
}

// bf16 bits -> fp16 bits, rounded to nearest even; sets `overflow` where a finite value becomes infinite.
__device__ __forceinline__ u32 to_fp16(u32 bf16, bool& overflow) {
    const u32 half = fp16_bits(bf16_value(bf16));
    overflow |= (half & 0x7fff) == 0x7c00 && (bf16 & 0x7f80) != 0x7f80;
    return half;
}

template <bool FP16>
__device__ __forceinline__ u32 finish_pair(u32 pair, bool& overflow) {
    if (!FP16) return pair;
    return to_fp16(pair & 0xffff, overflow) | to_fp16(pair >> 16, overflow) << 16;
}

// Four sign+mantissa bytes and four rotated exponents -> two words of two outputs each.
template <bool FP16>
__device__ __forceinline__ uint2 join(u32 signs, u32 exponents, bool& overflow) {
    const u32 high = (signs & 0x80808080u) | (exponents & 0x7f7f7f7fu);
    const u32 low = (signs & 0x7f7f7f7fu) | (exponents & 0x80808080u);
    return make_uint2(finish_pair<FP16>(__byte_perm(low, high, 0x5140), overflow),
                      finish_pair<FP16>(__byte_perm(low, high, 0x7362), overflow));
}

template <bool FP16>
__device__ __forceinline__ void store_piece(u16* out, uint2 signs, uint2 exponents, bool& overflow) {
    const uint2 left = join<FP16>(signs.x, exponents.x, overflow), right = join<FP16>(signs.y, exponents.y, overflow);
    *reinterpret_cast<uint4*>(out) = make_uint4(left.x, left.y, right.x, right.y);
}

#define NO_EDGE 0xffffffffu

// The pieces of 8 outputs at a tile's ends are shared with its neighbours and stored singly: lanes 0 to 7 take those of
// the first, 8 to 15 those of the last. The output of this thread, or NO_EDGE; a tile has outputs shift ... shift + size.
__device__ __forceinline__ u32 edge_of(u32 thread, u32 shift, u32 size) {
    const u32 tail = (shift + size) & ~7u;
    if (thread >= 16 || (thread < 8 ? shift == 0 : tail == 0 && shift != 0)) return NO_EDGE;
    const u32 place = thread < 8 ? thread : tail + thread - 8;
    return place >= shift && place < shift + size ? place : NO_EDGE;
}

// `capacity`: outputs of the largest tile. Shared memory: steps, symbols, luts (lut_bytes), then capacity + 16 bytes.
template <bool FP16>
__device__ void decode(const Group* groups, u32 tiles, u32 capacity, u32 lut_bytes, u64 base, u16* out, u32* status,
                       u8* shared) {
    u32* steps = reinterpret_cast<u32*>(shared);
    u32* symbols = steps + ENTRIES;
    u8* luts = reinterpret_cast<u8*>(symbols + ENTRIES);
    u8* exponents = luts + lut_bytes;
    __shared__ Group group;
    __shared__ u32 warp_counts[WARPS];

    const u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const u32 end = static_cast<u32>(static_cast<u64>(tiles) * (blockIdx.x + 1) / gridDim.x);
    u32 tile = static_cast<u32>(static_cast<u64>(tiles) * blockIdx.x / gridDim.x);
    const Group* next_group = groups;
    u32 group_end = 0;
    Request request = {0, 0, 0, 0, 0};
    u32 start = 0;
    bool overflow = false;

    for (; tile < end; ++tile) {
        if (tile >= group_end) {
            while (tile >= next_group->first_tile + next_group->tiles) ++next_group;
            __syncthreads();  // nobody still reads the last group
            if (thread < sizeof(Group) / sizeof(u64)) {
                reinterpret_cast<u64*>(&group)[thread] = reinterpret_cast<const u64*>(next_group)[thread];
            }
            const uint4* table = reinterpret_cast<const uint4*>(next_group->table);
            const u32 pieces = (2 * ENTRIES * 4 + (static_cast<u32>(next_group->lut_tables) + 1) * 256) / 16;
            for (u32 i = thread; i < pieces; i += THREADS) reinterpret_cast<uint4*>(shared)[i] = table[i];
            __syncthreads();
            group_end = static_cast<u32>(group.first_tile + group.tiles);
            const u32 first = tile - static_cast<u32>(group.first_tile);
            request = request_tile(group, base, first);
            start = __ldg(reinterpret_cast<const u32*>(base + group.positions) + first);
        }
        const u32 local = tile - static_cast<u32>(group.first_tile);
        const u32 lut_tables = static_cast<u32>(group.lut_tables);
        const u32 weights = static_cast<u32>(group.weights);
        const u32 below = __shfl_down_sync(ALL_LANES, request.high, 1);
        const Window window = {request.high, request.middle, lane == 31 ? request.beyond : below};
        const u32 gap = request.gap;

        if (start > weights) start = weights;
        const u32 stop = request.stop < weights ? request.stop : weights;
        const u32 size = stop <= start ? 0 : stop - start < capacity ? stop - start : capacity;
        const u32 shift = start & 7;  // exponents[shift] belongs to output `start`, so pieces of 8 align on both sides
        const u8* signs = reinterpret_cast<const u8*>(base + group.signs) + (start - shift);
        uint2 early[EARLY_PIECES];
#pragma unroll
        for (u32 i = 0; i < EARLY_PIECES; ++i) {
            const u32 first = (thread + i * THREADS) * 8;
            early[i] = make_uint2(0, 0);
            if (first >= shift && first + 8 <= shift + size) {
                early[i] = __ldcs(reinterpret_cast<const uint2*>(signs + first));
            }
        }

        const u32 edge = edge_of(thread, shift, size);
        const u32 edge_sign = edge != NO_EDGE ? signs[edge] : 0;

        const bool beyond = (local * THREADS + thread) * WINDOW_BYTES >= static_cast<u32>(group.encoded_bytes);
        u32 count = beyond ? 0 : count_codes(window, gap, steps, luts, lut_tables);
        u32 place = count;  // inclusive sum over the warp, then this thread's first place in the tile
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2) {
            const u32 lower = __shfl_up_sync(ALL_LANES, place, distance);
            if (lane >= distance) place += lower;
        }
        if (lane == 31) warp_counts[warp] = place;
        place -= count;
        __syncthreads();  // also: everybody has combined the last tile
        u32 before = lane < warp ? warp_counts[lane] : 0;
#pragma unroll
        for (u32 distance = 16; distance > 0; distance /= 2) before += __shfl_xor_sync(ALL_LANES, before, distance);
        place += before;
        if (thread == THREADS - 1) {
            const u32 total = place + count;
            // After the last weight the stream's end mark and padding read as codes.
            if (stop == weights ? total < size : total != size) atomicOr(status, STATUS_COUNT_MISMATCH);
        }

        const u32 room = place < size ? size - place : 0;
        count = count < room ? count : room;
        expand_codes(window, gap, count, exponents, shift + place, steps, symbols, luts, lut_tables);
        const u32 next_start = request.stop;
        if (tile + 1 < end && tile + 1 < group_end) request = request_tile(group, base, local + 1);
        __syncthreads();

        u16* target = out + group.out_offset + (start - shift);
#pragma unroll
        for (u32 i = 0; i < EARLY_PIECES; ++i) {
            const u32 first = (thread + i * THREADS) * 8;
            if (first >= shift && first + 8 <= shift + size) {
                const uint2 found = *reinterpret_cast<const uint2*>(exponents + first);
                store_piece<FP16>(target + first, early[i], found, overflow);
            }
        }
        for (u32 first = (thread + EARLY_PIECES * THREADS) * 8; first + 8 <= shift + size; first += THREADS * 8) {
            const uint2 found = *reinterpret_cast<const uint2*>(exponents + first);
            store_piece<FP16>(target + first, __ldcs(reinterpret_cast<const uint2*>(signs + first)), found, overflow);
        }
        if (edge != NO_EDGE) {
            target[edge] = static_cast<u16>(join<FP16>(edge_sign, exponents[edge], overflow).x);
        }
        start = next_start;
    }
    if (overflow) atomicOr(status, STATUS_FP16_OVERFLOW);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
decode_bf16(const Group* groups, u32 tiles, u32 capacity, u32 lut_bytes, u64 base, u16* out, u32* status) {
    extern __shared__ uint4 shared[];
    decode<false>(groups, tiles, capacity, lut_bytes, base, out, status, reinterpret_cast<u8*>(shared));
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
decode_fp16(const Group* groups, u32 tiles, u32 capacity, u32 lut_bytes, u64 base, u16* out, u32* status) {
    extern __shared__ uint4 shared[];
    decode<true>(groups, tiles, capacity, lut_bytes, base, out, status, reinterpret_cast<u8*>(shared));
}

// The fixed-length lossless form: decoding to bf16, and a matmul with few rows of activations of any type that decodes
// in registers. For bf16 activations fixed_length_tokens.cu has a faster one.

#include "fixed_length_parts.cu"

#define THREADS 512
#define WARPS (THREADS / 32)
#define TEAMS (THREADS / LANES)       // tiles that a block works on at a time

// Element types of activations and outputs.
#define FP32 0
#define BF16 1
#define FP16 2
#ifndef BLOCKS_PER_MULTIPROCESSOR
#define BLOCKS_PER_MULTIPROCESSOR 2
#endif

#ifndef CUDA_EMULATION
__device__ __forceinline__ u32 fp16_bits(float value) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
__device__ __forceinline__ float fp16_value(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

// ---------------------------------------------------------------------------------------------------------- decoding

// Each warp decodes four tiles at a time through 2 KB of shared memory, where the escapes are put in place, and stores
// them 16 bytes a lane. `out` is [rows, cols] bf16; cols a multiple of 8 and `out` 16-byte aligned, or stores are single.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_bf16(Weight w, u16* out) {
    __shared__ uint4 staging[WARPS][4 * TILE / 8];
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, team = lane / LANES, part = lane % LANES;
    const ExponentTables tables = load_tables(w.exponents);
    const u64 tiles = static_cast<u64>(w.rows) * w.tiles;
    uint4* stage = staging[warp];
    const bool wide = w.cols % 8 == 0;
    for (u64 first = (static_cast<u64>(blockIdx.x) * WARPS + warp) * 4; first < tiles;
         first += static_cast<u64>(gridDim.x) * WARPS * 4) {
        const u64 tile = first + team;
        u32 start = 0, escapes = 0;
        if (tile < tiles) {
            start = __ldg(w.tile_starts + tile);
            escapes = __ldg(w.tile_starts + tile + 1) - start;
            const Lane data = load_lane(w, tile, part);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 selectors = indices(data, i);
                const uint2 left = four_weights(sign_word(data, 2 * i), selectors, tables);
                const uint2 right = four_weights(sign_word(data, 2 * i + 1), selectors >> 16, tables);
                // Pieces of 16 bytes are rotated within a lane's four, so that the lanes' stores meet in no bank.
                const u32 piece = (i + (part >> 1)) & 3;
                stage[team * 32 + part * 4 + piece] = make_uint4(left.x, left.y, right.x, right.y);
            }
        }
        __syncwarp();
        for (u32 i = part; i < escapes; i += LANES) {
            const u32 column = w.escape_columns[start + i];
            const u32 owner = column / LANE_WEIGHTS, piece = (((column >> 3) & 3) + (owner >> 1)) & 3;
            reinterpret_cast<u16*>(stage)[(team * 32 + owner * 4 + piece) * 8 + (column & 7)] =
                w.escape_values[start + i];
        }
        __syncwarp();
        for (u32 t = 0; t < 4 && first + t < tiles; ++t) {
            const u64 row = (first + t) / w.tiles;
            const u32 column = static_cast<u32>(first + t - row * w.tiles) * TILE + lane * 8;
            const u32 owner = lane / 4, piece = ((lane & 3) + (owner >> 1)) & 3;
            const uint4 value = stage[t * 32 + owner * 4 + piece];
            u16* target = out + row * w.cols + column;
            if (wide) {
                if (column < w.cols) *reinterpret_cast<uint4*>(target) = value;
            } else {
                const u32 words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                    if (column + i < w.cols) target[i] = static_cast<u16>(words[i / 2] >> (16 * (i & 1)));
                }
            }
        }
        __syncwarp();
    }
}

// ------------------------------------------------------------------------------------------------------------ matmul

__device__ __forceinline__ float load_element(const void* data, u64 i, u32 type) {
    if (type == BF16) return __uint_as_float(static_cast<u32>(static_cast<const u16*>(data)[i]) << 16);
    if (type == FP16) return fp16_value(static_cast<const u16*>(data)[i]);
    return static_cast<const float*>(data)[i];
}

__device__ __forceinline__ float rounded(float value, u32 type) {
    if (type == BF16) return __uint_as_float(bf16_bits(value) << 16);
    if (type == FP16) return fp16_value(static_cast<u16>(fp16_bits(value)));
    return value;
}

__device__ __forceinline__ void store_element(void* data, u64 i, float value, u32 type) {
    if (type == BF16) static_cast<u16*>(data)[i] = static_cast<u16>(bf16_bits(value));
    else if (type == FP16) static_cast<u16*>(data)[i] = static_cast<u16>(fp16_bits(value));
    else static_cast<float*>(data)[i] = value;
}

// Mirrors `_MATMUL` in fixed_length.py.
struct Matmul {
    const void* x;             // [m, cols], or [m, 2 * cols] for SWIGLU
    const void* norm_weight;   // [cols] for RMS_NORM
    const void* bias;          // [rows] or null
    void* out;                 // [m, rows]
    float* partial;            // [segments, M, rows], where there are several segments
    u32* arrived;              // [gridDim.x] zeros, left as zeros
    float eps;
    u32 type, prologue, m;
    u32 segment_tiles;         // of a row's tiles, those that one block (blockIdx.y) multiplies
    u32 chunk_rows;            // rows between two reductions
};

// An activation's place in shared memory: 32 numbers of a lane, then 4 unused, so that 8 lanes' reads meet in no bank.
#define LANE_STRIDE (LANE_WEIGHTS + 4)
#define TILE_STRIDE (LANES * LANE_STRIDE)

__device__ __forceinline__ u32 place_of(u32 column) {
    return column / LANE_WEIGHTS * LANE_STRIDE + column % LANE_WEIGHTS;
}

// The activations of this block's segment, as the matmul multiplies them, in float32; zeros beyond m and cols.
template <int M>
__device__ void stage_activations(const Weight& w, const Matmul& p, u32 first_column, u32 columns, float* staged,
                                  float* scratch) {
    for (u32 row = 0; row < M; ++row) {
        float* target = staged + row * (columns / LANE_WEIGHTS * LANE_STRIDE);
        float scale = 1;
        if (p.prologue == RMS_NORM && row < p.m) {
            float squares = 0;
            for (u32 i = threadIdx.x; i < w.cols; i += THREADS) {
                const float value = load_element(p.x, static_cast<u64>(row) * w.cols + i, p.type);
                squares += value * value;
            }
            scale = rsqrtf(sum_over_block(squares, scratch) / w.cols + p.eps);
        }
        for (u32 i = threadIdx.x; i < columns; i += THREADS) {
            const u32 column = first_column + i;
            float value = 0;
            if (row < p.m && column < w.cols) {
                if (p.prologue == SWIGLU) {
                    const u64 base = static_cast<u64>(row) * 2 * w.cols + column;
                    const float gate = load_element(p.x, base, p.type);
                    const float up = load_element(p.x, base + w.cols, p.type);
                    value = rounded(rounded(gate / (1.0f + expf(-gate)), p.type) * up, p.type);
                } else {
                    value = load_element(p.x, static_cast<u64>(row) * w.cols + column, p.type);
                    if (p.prologue == RMS_NORM) {
                        value = rounded(value * scale, p.type) * load_element(p.norm_weight, column, p.type);
                        value = rounded(value, p.type);
                    }
                }
            }
            target[place_of(i)] = value;
        }
    }
}

struct Escapes {
    u32 start, count;
    u32 first, second;  // this lane's: bf16 bits << 16 | column; 0 where there is none
};

__device__ __forceinline__ u32 load_escape(const Weight& w, u32 i) {
    return static_cast<u32>(__ldcs(w.escape_values + i)) << 16 | __ldcs(w.escape_columns + i);
}

// Shared memory: activations M * segment tiles * TILE_STRIDE floats, then chunk_rows * segment tiles * M sums.
template <int M>
__device__ void multiply(const Weight& w, const Matmul& p, float* shared) {
    __shared__ float scratch[WARPS];
    __shared__ bool last_of_row;
    const u32 first_tile = blockIdx.y * p.segment_tiles;
    const u32 tiles = w.tiles - first_tile < p.segment_tiles ? w.tiles - first_tile : p.segment_tiles;
    const u32 reciprocal = ((1u << 22) + tiles - 1) / tiles;  // tile / tiles, exact below 8192 and for 128 tiles
    float* staged = shared;
    float* sums = shared + M * tiles * TILE_STRIDE;
    const u32 part = threadIdx.x % LANES, team = threadIdx.x / LANES;
    const u32 begin = static_cast<u32>(static_cast<u64>(w.rows) * blockIdx.x / gridDim.x);
    const u32 end = static_cast<u32>(static_cast<u64>(w.rows) * (blockIdx.x + 1) / gridDim.x);
    const ExponentTables tables = load_tables(w.exponents);

    // A unit is a tile of this block's rows and segment, numbered through all chunks of the block in the order in which
    // this team meets them: loads run one unit ahead of the arithmetic, tile starts two.
    struct Cursor {
        u32 chunk, unit;  // first row of the chunk; tile within the chunk
    };
    auto chunk_units = [&](u32 chunk) { return (end - chunk < p.chunk_rows ? end - chunk : p.chunk_rows) * tiles; };
    // Rounds are the same for all teams of a block, so a team may stand on a unit that does not exist.
    auto advance = [&](Cursor c) {
        c.unit += TEAMS;
        if (c.unit - team >= chunk_units(c.chunk)) {
            c.chunk += p.chunk_rows;
            c.unit = team;
        }
        return c;
    };
    auto exists = [&](Cursor c) { return c.chunk < end && c.unit < chunk_units(c.chunk); };
    auto tile_of = [&](Cursor c) {
        const u32 row = (c.unit * reciprocal) >> 22;
        return static_cast<u64>(c.chunk + row) * w.tiles + first_tile + (c.unit - row * tiles);
    };
    auto load_starts = [&](Cursor c) {
        Escapes e = {0, 0, 0, 0};
        if (exists(c)) {
            const u64 tile = tile_of(c);
            e.start = __ldg(w.tile_starts + tile);
            e.count = __ldg(w.tile_starts + tile + 1) - e.start;
        }
        return e;
    };
    auto load_data = [&](Cursor c, Escapes& e) {
        Lane data = {};
        if (exists(c)) {
            data = load_lane(w, tile_of(c), part);
            if (part < e.count) e.first = load_escape(w, e.start + part);
            if (part + LANES < e.count) e.second = load_escape(w, e.start + part + LANES);
        }
        return data;
    };

    Cursor here = {begin, team};
    Cursor ahead = here.chunk < end ? advance(here) : here;
    Escapes escapes = load_starts(here);
    Escapes escapes_ahead = load_starts(ahead);
    Lane data = load_data(here, escapes);
    stage_activations<M>(w, p, first_tile * TILE, tiles * TILE, staged, scratch);
    __syncthreads();

    for (u32 chunk = begin; chunk < end; chunk += p.chunk_rows) {
        const u32 units = chunk_units(chunk);
        for (u32 round = 0; round < units; round += TEAMS) {
            const Lane data_ahead = load_data(ahead, escapes_ahead);
            const Cursor later = ahead.chunk < end ? advance(ahead) : ahead;
            const Escapes escapes_later = load_starts(later);

            const u32 row = (here.unit * reciprocal) >> 22;
            const bool valid = here.unit < units;
            const float* x = staged + (valid ? here.unit - row * tiles : 0) * TILE_STRIDE;
            float total[M];
#pragma unroll
            for (int m = 0; m < M; ++m) total[m] = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const u32 selector = i % 2 ? indices(data, i / 2) >> 16 : indices(data, i / 2);
                const uint2 weights = four_weights(sign_word(data, i), selector, tables);
                const float w0 = __uint_as_float(weights.x << 16), w1 = __uint_as_float(weights.x & 0xffff0000u);
                const float w2 = __uint_as_float(weights.y << 16), w3 = __uint_as_float(weights.y & 0xffff0000u);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const float4 v = *reinterpret_cast<const float4*>(x + m * tiles * TILE_STRIDE + part * LANE_STRIDE +
                                                                      4 * i);
                    total[m] = fmaf(w0, v.x, fmaf(w1, v.y, fmaf(w2, v.z, fmaf(w3, v.w, total[m]))));
                }
            }
            auto add_escape = [&](u32 escape) {
                const float weight = __uint_as_float(escape & 0xffff0000u);
                const float* at = x + place_of(escape & 0xff);
#pragma unroll
                for (int m = 0; m < M; ++m) total[m] = fmaf(weight, at[m * tiles * TILE_STRIDE], total[m]);
            };
            if (part < escapes.count) add_escape(escapes.first);
            if (part + LANES < escapes.count) add_escape(escapes.second);
            for (u32 i = part + 2 * LANES; i < escapes.count; i += LANES) add_escape(load_escape(w, escapes.start + i));
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (u32 distance = LANES / 2; distance > 0; distance /= 2) {
                    total[m] += __shfl_xor_sync(ALL_LANES, total[m], distance);
                }
                if (valid && part == 0) sums[here.unit * M + m] = total[m];
            }
            here = ahead;
            ahead = later;
            data = data_ahead;
            escapes = escapes_ahead;
            escapes_ahead = escapes_later;
        }
        __syncthreads();
        const u32 rows = end - chunk < p.chunk_rows ? end - chunk : p.chunk_rows;
        for (u32 i = threadIdx.x; i < rows * M; i += THREADS) {
            const u32 row = i / M, m = i % M;
            float total = 0;
            for (u32 t = 0; t < tiles; ++t) total += sums[(row * tiles + t) * M + m];
            if (gridDim.y == 1) {
                if (p.bias != 0) total += load_element(p.bias, chunk + row, p.type);
                if (m < p.m) store_element(p.out, static_cast<u64>(m) * w.rows + chunk + row, total, p.type);
            } else {
                p.partial[(static_cast<u64>(blockIdx.y) * M + m) * w.rows + chunk + row] = total;
            }
        }
        __syncthreads();
    }
    if (gridDim.y == 1) return;

    // The last block of these rows to arrive adds the segments up, always in the same order.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last_of_row = atomicAdd(p.arrived + blockIdx.x, 1u) + 1 == gridDim.y;
        if (last_of_row) p.arrived[blockIdx.x] = 0;
    }
    __syncthreads();
    if (!last_of_row) return;
    __threadfence();
    for (u32 i = threadIdx.x; i < (end - begin) * M; i += THREADS) {
        const u32 m = i / (end - begin), row = begin + i % (end - begin);
        if (m >= p.m) continue;
        float total = 0;
        for (u32 segment = 0; segment < gridDim.y; ++segment) {
            total += __ldcg(p.partial + (static_cast<u64>(segment) * M + m) * w.rows + row);
        }
        if (p.bias != 0) total += load_element(p.bias, row, p.type);
        store_element(p.out, static_cast<u64>(m) * w.rows + row, total, p.type);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
matmul_1(Weight w, Matmul p) {
    extern __shared__ uint4 shared[];
    multiply<1>(w, p, reinterpret_cast<float*>(shared));
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
matmul_2(Weight w, Matmul p) {
    extern __shared__ uint4 shared[];
    multiply<2>(w, p, reinterpret_cast<float*>(shared));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
matmul_4(Weight w, Matmul p) {
    extern __shared__ uint4 shared[];
    multiply<4>(w, p, reinterpret_cast<float*>(shared));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
matmul_8(Weight w, Matmul p) {
    extern __shared__ uint4 shared[];
    multiply<8>(w, p, reinterpret_cast<float*>(shared));
}

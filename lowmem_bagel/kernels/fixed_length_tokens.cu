// The fixed-length lossless form times one to eight rows of bf16 activations, on tensor cores (compute capability 8.0
// and later). Decoded weights go from registers into mma instructions as they are; multiplied one by one, they would
// keep the integer units busy for longer than memory takes.
//
// A block multiplies a range of rows by a segment of their tiles; each of its warps keeps to one tile of a row. Weights
// are requested before the kernel waits for the one that makes its activations.

#include "fixed_length_parts.cu"

#define MAX_WARPS 16
#define ROWS 16                       // of the weight, that a warp multiplies at a time: the m of an mma
#define SLOT_STRIDE 40                // an activation's place in shared memory: 32 bf16 of a lane, then 8 unused, and
#define TOKEN_SHIFT 32                // tokens half a line apart, so that the lanes' reads meet in no bank

#ifndef CUDA_EMULATION
// c += w * x.T for 16 rows of w and 8 tokens, the rows of x. Lane 4g + t has, of token g, columns 2t, 2t + 1 in x0 and
// 2t + 8, 2t + 9 in x1; the same columns of w's row g in w.x and w.z, of row g + 8 in w.y and w.w; and of c, tokens 2t,
// 2t + 1 of row g in c.x, c.y, of row g + 8 in c.z, c.w. Which of a tile's columns these are does not matter.
__device__ __forceinline__ void multiply_add(float4& c, uint4 w, u32 x0, u32 x1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
        : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(x0), "r"(x1));
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#endif

// Mirrors `_Tokens` in fixed_length.py.
struct Tokens {
    const u16* x;              // bf16 [m, cols], or [m, 2 * cols] for SWIGLU
    const u16* norm_weight;    // [cols] for RMS_NORM
    const u16* bias;           // [rows] or null
    const u16* residual;       // like out, or null
    u16* out;                  // [m, rows], or [m, rows / 2] where paired
    float* partial;            // [segments, M, rows], where there are several segments
    u32* arrived;              // [gridDim.x] zeros, left as zeros
    float eps;
    u32 prologue, m;
    u32 wide;                  // 1: x and norm_weight can be read 16 bytes at a time
    u32 paired;                // 1: rows are gate | up, and what is stored is silu(gate) * up
    u32 segment_tiles;         // of a row's tiles, those that one block (blockIdx.y) multiplies
    u32 chunk_groups;          // groups of ROWS rows between two reductions; even
};

__device__ __forceinline__ float low_value(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_value(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float value_of(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }
__device__ __forceinline__ float as_bf16(float value) { return __uint_as_float(bf16_bits(value) << 16); }

struct Eight {
    float v[8];
};

// Columns column ... column + 7 of a row of bf16, zeros beyond its end.
__device__ __forceinline__ Eight load_eight(const u16* row, u32 column, u32 cols, u32 wide) {
    Eight e;
    if (wide != 0 && column < cols) {
        const uint4 words = *reinterpret_cast<const uint4*>(row + column);
        const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            e.v[2 * i] = low_value(w[i]);
            e.v[2 * i + 1] = high_value(w[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = column + i < cols ? value_of(row[column + i]) : 0;
    }
    return e;
}

__device__ __forceinline__ float activated(float gate, float up) {
    return as_bf16(as_bf16(gate / (1.0f + expf(-gate))) * up);
}

// The activations of this block's segment as they are multiplied, in bf16; zeros beyond m and cols.
template <int M>
__device__ __forceinline__ void stage_tokens(const Weight& w, const Tokens& p, u32 first_column, u32 columns,
                                             u16* staged, u32 token_stride, float* scratch) {
    for (u32 row = 0; row < M; ++row) {
        u16* target = staged + row * token_stride;
        const u16* x = p.x + static_cast<u64>(row) * w.cols * (p.prologue == SWIGLU ? 2 : 1);
        float scale = 1;
        if (p.prologue == RMS_NORM && row < p.m) {
            float squares = 0;
            for (u32 column = threadIdx.x * 8; column < w.cols; column += blockDim.x * 8) {
                const Eight e = load_eight(x, column, w.cols, p.wide);
#pragma unroll
                for (int i = 0; i < 8; ++i) squares += e.v[i] * e.v[i];
            }
            scale = rsqrtf(sum_over_block(squares, scratch) / w.cols + p.eps);
        }
        for (u32 place = threadIdx.x * 8; place < columns; place += blockDim.x * 8) {
            const u32 column = first_column + place;
            u32 words[4] = {0, 0, 0, 0};
            if (row < p.m) {
                Eight e = load_eight(x, column, w.cols, p.wide);
                if (p.prologue == SWIGLU) {
                    const Eight up = load_eight(x + w.cols, column, w.cols, p.wide);
#pragma unroll
                    for (int i = 0; i < 8; ++i) e.v[i] = activated(e.v[i], up.v[i]);
                } else if (p.prologue == RMS_NORM) {
                    const Eight n = load_eight(p.norm_weight, column, w.cols, p.wide);
#pragma unroll
                    for (int i = 0; i < 8; ++i) e.v[i] = as_bf16(e.v[i] * scale) * n.v[i];
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) words[i] = bf16_bits(e.v[2 * i]) | bf16_bits(e.v[2 * i + 1]) << 16;
            }
            *reinterpret_cast<uint4*>(target + place / LANE_WEIGHTS * SLOT_STRIDE + place % LANE_WEIGHTS) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// Of a tile's escapes, those that a lane adds: numbers lane % 4, + 4 and + 8. More are loaded when they are due.
struct Listed {
    u32 first, count;
    u16 values[3];
    u8 columns[3];
};

// A warp multiplies 16 rows of a column of tiles at a time: lane 4g + t has slots t ("near") and t + 4 ("far") of rows
// g and g + 8, a slot being what one lane has of a tile. Each half is requested anew as soon as it has been multiplied,
// and the bounds of the next escapes before those.
template <int M>
__device__ __forceinline__ void multiply_tokens(const Weight& w, const Tokens& p, u16* shared) {
    __shared__ float scratch[MAX_WARPS];
    __shared__ bool last_of_rows;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row_of_lane = lane >> 2, slot = lane & 3;
    const u32 first_tile = blockIdx.y * p.segment_tiles;
    const u32 tiles = w.tiles - first_tile < p.segment_tiles ? w.tiles - first_tile : p.segment_tiles;
    const u32 stride = blockDim.x / 32 / p.segment_tiles;  // warps that share a column of tiles
    const u32 column = warp % p.segment_tiles;             // of this warp
    const u32 half = p.paired ? w.rows / 2 : w.rows;
    const u32 step = p.paired ? 2 : 1;
    const u32 ranges = (half + ROWS - 1) / ROWS;
    const u32 begin = static_cast<u32>(static_cast<u64>(ranges) * blockIdx.x / gridDim.x) * step;
    const u32 end = static_cast<u32>(static_cast<u64>(ranges) * (blockIdx.x + 1) / gridDim.x) * step;
    const u32 token_stride = tiles * LANES * SLOT_STRIDE + TOKEN_SHIFT;
    u16* staged = shared;
    float* products = reinterpret_cast<float*>(staged + M * token_stride);  // [chunk_groups][segment_tiles][M][ROWS]

    let_next_kernel_start();
    const ExponentTables tables = load_tables(w.exponents);

    // Where paired, groups of gate's rows and up's alternate.
    auto place_of_group = [&](u32 group) { return (p.paired ? group >> 1 : group) * ROWS; };
    auto tile_of = [&](u32 group, u32 row_in_group) {
        u32 row = place_of_group(group) + row_in_group;
        row = (row < half ? row : half - 1) + (p.paired && (group & 1) ? half : 0);
        return static_cast<u64>(row) * w.tiles + first_tile + column;
    };
    auto working = [&](u32 group) { return group < end && column < tiles; };
    auto load_starts = [&](u32 group, u32 row) {
        uint2 starts = make_uint2(0, 0);
        if (working(group)) {
            const u32* at = w.tile_starts + tile_of(group, row);
            starts = make_uint2(__ldg(at), __ldg(at + 1));
        }
        return starts;
    };
    auto load_listed = [&](Listed& listed, uint2 starts) {
        listed.first = starts.x;
        listed.count = starts.y - starts.x;
#pragma unroll
        for (u32 i = 0; i < 3; ++i) {  // the list's padding takes what is beyond it
            listed.values[i] = __ldg(w.escape_values + starts.x + slot + 4 * i);
            listed.columns[i] = __ldg(w.escape_columns + starts.x + slot + 4 * i);
        }
    };
    const u16* x = staged + column * LANES * SLOT_STRIDE;
    const u16* my_token = x + (row_of_lane < M ? row_of_lane : 0) * token_stride;
    auto multiply_half = [&](float4& sum0, float4& sum1, const Lane& low, const Lane& high, u32 at) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 v = *reinterpret_cast<const uint4*>(my_token + at * SLOT_STRIDE + 8 * i);
            const u32 selectors0 = indices(low, i), selectors1 = indices(high, i);
            const uint2 a = four_weights(sign_word(low, 2 * i), selectors0, tables);
            const uint2 b = four_weights(sign_word(high, 2 * i), selectors1, tables);
            multiply_add(sum0, make_uint4(a.x, b.x, a.y, b.y), v.x, v.y);
            const uint2 c = four_weights(sign_word(low, 2 * i + 1), selectors0 >> 16, tables);
            const uint2 d = four_weights(sign_word(high, 2 * i + 1), selectors1 >> 16, tables);
            multiply_add(sum1, make_uint4(c.x, d.x, c.y, d.y), v.z, v.w);
        }
    };
    // The escapes' share of a row for all tokens, in all four lanes.
    auto correct = [&](const Listed& listed, float* total) {
        auto add = [&](u32 value, u32 at) {
            const u16* found = x + at / LANE_WEIGHTS * SLOT_STRIDE + at % LANE_WEIGHTS;
#pragma unroll
            for (int m = 0; m < M; ++m) {
                total[m] = fmaf(__uint_as_float(value << 16), value_of(found[m * token_stride]), total[m]);
            }
        };
#pragma unroll
        for (int m = 0; m < M; ++m) total[m] = 0;
#pragma unroll
        for (u32 i = 0; i < 3; ++i) {
            if (slot + 4 * i < listed.count) add(listed.values[i], listed.columns[i]);
        }
#pragma unroll 1
        for (u32 i = slot + 12; i < listed.count; i += 4) {
            add(w.escape_values[listed.first + i], w.escape_columns[listed.first + i]);
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            total[m] += __shfl_xor_sync(ALL_LANES, total[m], 1);
            total[m] += __shfl_xor_sync(ALL_LANES, total[m], 2);
        }
    };
    auto finish = [&](u32 m, u32 place, float value, float up) {
        if (p.bias != 0) value += value_of(p.bias[place]);
        if (p.paired) {
            if (p.bias != 0) up += value_of(p.bias[place + half]);
            value = activated(as_bf16(value), as_bf16(up));
        }
        const u64 at = static_cast<u64>(m) * half + place;
        if (p.residual != 0) value = as_bf16(value) + value_of(p.residual[at]);
        p.out[at] = static_cast<u16>(bf16_bits(value));
    };

    u32 group = begin + warp / p.segment_tiles;
    uint2 starts0 = load_starts(group, row_of_lane), starts1 = load_starts(group, row_of_lane + 8);
    Lane near0, near1, far0, far1;
    Listed listed0, listed1;
    if (working(group)) {
        near0 = load_lane(w, tile_of(group, row_of_lane), slot);
        near1 = load_lane(w, tile_of(group, row_of_lane + 8), slot);
        far0 = load_lane(w, tile_of(group, row_of_lane), slot + 4);
        far1 = load_lane(w, tile_of(group, row_of_lane + 8), slot + 4);
        load_listed(listed0, starts0);
        load_listed(listed1, starts1);
        starts0 = load_starts(group + stride, row_of_lane), starts1 = load_starts(group + stride, row_of_lane + 8);
    }
    wait_for_last_kernel();
    stage_tokens<M>(w, p, first_tile * TILE, tiles * TILE, staged, token_stride, scratch);
    __syncthreads();

    for (u32 chunk = begin; chunk < end; chunk += p.chunk_groups) {
        const u32 chunk_end = end - chunk < p.chunk_groups ? end : chunk + p.chunk_groups;
        for (; group < chunk_end; group += stride) {
            if (column >= tiles) continue;
            const bool more = group + stride < end;
            const u64 next0 = tile_of(group + stride, row_of_lane), next1 = tile_of(group + stride, row_of_lane + 8);
            float4 sum0 = make_float4(0, 0, 0, 0), sum1 = make_float4(0, 0, 0, 0);
            multiply_half(sum0, sum1, near0, near1, slot);
            if (more) {
                near0 = load_lane(w, next0, slot);
                near1 = load_lane(w, next1, slot);
            }
            multiply_half(sum0, sum1, far0, far1, slot + 4);
            if (more) {
                far0 = load_lane(w, next0, slot + 4);
                far1 = load_lane(w, next1, slot + 4);
            }
            float total0[M], total1[M];
            correct(listed0, total0);
            correct(listed1, total1);
            if (more) {
                load_listed(listed0, starts0);
                load_listed(listed1, starts1);
                starts0 = load_starts(group + 2 * stride, row_of_lane);
                starts1 = load_starts(group + 2 * stride, row_of_lane + 8);
            }
            float* target = products + ((group - chunk) * p.segment_tiles + column) * M * ROWS + row_of_lane;
#pragma unroll
            for (int m = 0; m < M; ++m) {
                if (slot == m / 2) {
                    target[m * ROWS] = total0[m] + (m % 2 ? sum0.y + sum1.y : sum0.x + sum1.x);
                    target[m * ROWS + 8] = total1[m] + (m % 2 ? sum0.w + sum1.w : sum0.z + sum1.z);
                }
            }
        }
        __syncthreads();
        const u32 outputs = (chunk_end - chunk) / step * ROWS * M;
        for (u32 i = threadIdx.x; i < outputs; i += blockDim.x) {
            const u32 row = i % ROWS, m = i / ROWS % M, local = i / (ROWS * M) * step;
            const u32 place = place_of_group(chunk + local) + row;
            if (place >= half || m >= p.m) continue;
            float total[2] = {0, 0};
            const float* source = products + (local * p.segment_tiles * M + m) * ROWS + row;
            for (u32 t = 0; t < tiles; ++t) {
                total[0] += source[t * M * ROWS];
                if (p.paired) total[1] += source[(p.segment_tiles + t) * M * ROWS];
            }
            if (gridDim.y == 1) {
                finish(m, place, total[0], total[1]);
            } else {
                float* target = p.partial + (static_cast<u64>(blockIdx.y) * M + m) * w.rows + place;
                target[0] = total[0];
                if (p.paired) target[half] = total[1];
            }
        }
        __syncthreads();
    }
    if (gridDim.y == 1) return;

    // The last block of these rows to arrive adds the segments up, always in the same order.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last_of_rows = atomicAdd(p.arrived + blockIdx.x, 1u) + 1 == gridDim.y;
        if (last_of_rows) p.arrived[blockIdx.x] = 0;
    }
    __syncthreads();
    if (!last_of_rows) return;
    __threadfence();
    const u32 first_place = begin / step * ROWS;
    const u32 places = (end / step * ROWS < half ? end / step * ROWS : half) - first_place;
    for (u32 i = threadIdx.x; i < places * p.m; i += blockDim.x) {
        const u32 m = i / places, place = first_place + i % places;
        float total[2] = {0, 0};
        for (u32 segment = 0; segment < gridDim.y; ++segment) {
            const float* source = p.partial + (static_cast<u64>(segment) * M + m) * w.rows + place;
            total[0] += __ldcg(source);
            if (p.paired) total[1] += __ldcg(source + half);
        }
        finish(m, place, total[0], total[1]);
    }
}

extern "C" __global__ void __launch_bounds__(MAX_WARPS * 32, 1)
tokens_1(Weight w, Tokens p) {
    extern __shared__ uint4 shared[];
    multiply_tokens<1>(w, p, reinterpret_cast<u16*>(shared));
}

extern "C" __global__ void __launch_bounds__(MAX_WARPS * 32, 1)
tokens_2(Weight w, Tokens p) {
    extern __shared__ uint4 shared[];
    multiply_tokens<2>(w, p, reinterpret_cast<u16*>(shared));
}

extern "C" __global__ void __launch_bounds__(MAX_WARPS * 32, 1)
tokens_4(Weight w, Tokens p) {
    extern __shared__ uint4 shared[];
    multiply_tokens<4>(w, p, reinterpret_cast<u16*>(shared));
}

extern "C" __global__ void __launch_bounds__(MAX_WARPS * 32, 1)
tokens_8(Weight w, Tokens p) {
    extern __shared__ uint4 shared[];
    multiply_tokens<8>(w, p, reinterpret_cast<u16*>(shared));
}


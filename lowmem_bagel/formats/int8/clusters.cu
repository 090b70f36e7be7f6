// The INT8 matmul by pairs of blocks on Hopper (sm_90a): y = (a @ w.T) * row_scale * token_scale + bias, rounded once.
//
// The two blocks of a cluster take neighbouring tiles of 128 tokens by the same 256 rows of the weight. Each fetches
// half of those rows, by one bulk copy that lands in both, so that the cache is read less. One warpgroup of a block
// only fetches, into a ring of stages; the other two multiply 64 tokens each by the widest product there is. They share
// stages and nothing else: one stores its results, straight from registers, while the other multiplies.
//
//     SWIGLU  the weight is [gate | up] by rows, a tile has 128 rows of gate and the same of up, and what is stored is
//             silu(gate) * up, rounded where it would be if gate and up had been stored
//     BIAS    one value a row of the weight is added before rounding
//     ADDS    the rounded result is added to what lies in the output

#include "halves.cuh"

constexpr u32 STAGES = 4, PAIR = 2, TILE_M = 128, TILE_N = 256, DEPTH = 128;
constexpr u32 A_BYTES = TILE_M * DEPTH, B_BYTES = TILE_N * DEPTH, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr u32 BAND = 8;                      // pairs of tile rows that are walked together
constexpr u32 PARTS = SWIGLU ? 2 : 1;        // of the weight, that make one result
constexpr u32 STEP_N = TILE_N / PARTS;       // columns of the result a tile

#include "bulk.cuh"

struct Tile {
    u32 m, n;  // where the pair's tile begins: tokens, columns of the result
};

// Tiles are walked in bands of BAND pairs, so that neighbours in time share operands in the cache.
__device__ __forceinline__ Tile tile_at(u32 index, u32 pairs, u32 tiles_n) {
    const u32 band = index / (BAND * tiles_n), left = pairs - band * BAND, height = left < BAND ? left : BAND;
    const u32 inside = index - band * BAND * tiles_n;
    return {(band * BAND + inside % height) * PAIR * TILE_M, inside / height * STEP_N};
}

__device__ __forceinline__ float low_value(u32 pair) { return half_value(pair & 0xffff); }
__device__ __forceinline__ float high_value(u32 pair) { return half_value(pair >> 16); }

// Four lanes have the same word of four columns each; afterwards each has the four words of one column.
__device__ __forceinline__ void transpose(u32 (&w)[4], u32 lane) {
    const bool odd = lane & 1, upper = lane & 2;
    const u32 a = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1);
    const u32 b = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
    if (odd) w[0] = a, w[2] = b;
    else w[1] = a, w[3] = b;
    const u32 c = __shfl_xor_sync(0xffffffffu, upper ? w[0] : w[2], 2);
    const u32 d = __shfl_xor_sync(0xffffffffu, upper ? w[1] : w[3], 2);
    if (upper) w[0] = c, w[1] = d;
    else w[2] = c, w[3] = d;
}

// silu(gate) * up of rounded values, rounded twice.
__device__ __forceinline__ u32 swiglu_pair(u32 gate, u32 up) {
    const u32 silu = half_pair(silu_of(low_value(gate)), silu_of(high_value(gate)));
    return half_pair(__fmul_rn(low_value(silu), low_value(up)), __fmul_rn(high_value(silu), high_value(up)));
}

__device__ __forceinline__ u32 sum_pair(u32 a, u32 b) {
    return half_pair(__fadd_rn(low_value(a), low_value(b)), __fadd_rn(high_value(a), high_value(b)));
}

// A warpgroup's results of 64 tokens from `first`, in columns from `start`. Lane l has of rows l / 4 and l / 4 + 8 of
// its warp's sixteen the columns 8 j + 2 (l % 4) and the next, for every j.
__device__ __forceinline__ void store_results(const int (&sums)[128], u32 first, u32 start, const float* token_scale,
                                              const float* row_scale, const u16* bias, u16* out, u32 m, u32 n) {
    const u32 lane = threadIdx.x % 32, quarter = lane % 4, row = first + threadIdx.x / 32 % 4 * 16 + lane / 4;
    const bool inside_m[2] = {row < m, row + 8 < m};
    float tokens[2] = {0, 0};
#pragma unroll
    for (u32 h = 0; h < 2; ++h)
        if (inside_m[h]) tokens[h] = __ldg(token_scale + row + 8 * h);
    u16* const mine = out + static_cast<u64>(row) * n + start + 8 * quarter;
    constexpr u32 FOURS = STEP_N / 32, AHEAD = 4;
    uint4 old[AHEAD][2];
#pragma unroll
    for (u32 four = 0; four < FOURS; ++four) {
        const bool inside = start + 32 * four + 8 * quarter < n;
        if (ADDS && four % AHEAD == 0) {
#pragma unroll
            for (u32 i = 0; i < AHEAD * 2; ++i) {
                const u32 at = 32 * (four + i / 2);
                if (start + at + 8 * quarter < n && inside_m[i % 2])
                    old[i / 2][i % 2] = *reinterpret_cast<const uint4*>(mine + static_cast<u64>(i % 2 * 8) * n + at);
            }
        }
        u32 words[2][4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 j = four * 4 + i, column = start + 8 * j + 2 * quarter;
            u32 pairs[2][PARTS];
#pragma unroll
            for (u32 part = 0; part < PARTS; ++part) {
                const u32 at = column + part * n, from = 4 * (j + part * 16);
                float2 scale = make_float2(0, 0);
                if (column < n) scale = __ldg(reinterpret_cast<const float2*>(row_scale + at));
                u32 added = 0;
                if (BIAS && column < n) added = __ldg(reinterpret_cast<const u32*>(bias + at));
#pragma unroll
                for (u32 h = 0; h < 2; ++h) {
                    float low = __fmul_rn(static_cast<float>(sums[from + 2 * h]), scale.x);
                    float high = __fmul_rn(static_cast<float>(sums[from + 2 * h + 1]), scale.y);
                    low = BIAS ? __fmaf_rn(low, tokens[h], low_value(added)) : __fmul_rn(low, tokens[h]);
                    high = BIAS ? __fmaf_rn(high, tokens[h], high_value(added)) : __fmul_rn(high, tokens[h]);
                    pairs[h][part] = half_pair(low, high);
                }
            }
#pragma unroll
            for (u32 h = 0; h < 2; ++h)
                words[h][i] = SWIGLU ? swiglu_pair(pairs[h][0], pairs[h][PARTS - 1]) : pairs[h][0];
        }
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            u32(&w)[4] = words[h];
            transpose(w, lane);
            if (ADDS) {
                const uint4 was = old[four % AHEAD][h];
                w[0] = sum_pair(w[0], was.x), w[1] = sum_pair(w[1], was.y);
                w[2] = sum_pair(w[2], was.z), w[3] = sum_pair(w[3], was.w);
            }
            uint4* const target = reinterpret_cast<uint4*>(mine + static_cast<u64>(h * 8) * n + 32 * four);
            if (inside && inside_m[h]) *target = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

// a_map: [m, k], b_map: the weight [n * PARTS, k], both in boxes of 128 by 128 bytes. out: [m, n], n a multiple of 8.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
int8_clusters(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
              const float* token_scale, const float* row_scale, const u16* bias, u16* out, u32 m, u32 n, u32 k) {
    extern __shared__ uint4 shared[];
    unsigned char* const ring = next_kibibyte(shared);
    u64* const full = reinterpret_cast<u64*>(ring + STAGES * STAGE_BYTES);
    u64* const empty = full + STAGES;
    const u32 pairs = (m + PAIR * TILE_M - 1) / (PAIR * TILE_M), tiles_n = (n + STEP_N - 1) / STEP_N;
    const u32 steps = (k + DEPTH - 1) / DEPTH, rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, PAIR * 2);  // each multiplying warpgroup of both blocks
        }
        fence_barrier_init();
    }
    cluster_sync();
    const u32 role = threadIdx.x / 128;
    u32 stage = 0, phase = 0;
    if (role == 0) {
        fewer_registers();
        if (threadIdx.x == 0) {
            for (u32 index = blockIdx.x / PAIR; index < pairs * tiles_n; index += gridDim.x / PAIR) {
                const Tile tile = tile_at(index, pairs, tiles_n);
                const u32 row = tile.m + rank * TILE_M, weight_row = tile.n + rank * (SWIGLU ? n : TILE_N / 2);
                for (u32 step = 0; step < steps; ++step) {
                    barrier_wait(empty + stage, phase ^ 1);
                    barrier_expect(full + stage, STAGE_BYTES);
                    unsigned char* const to = ring + stage * STAGE_BYTES;
                    bulk_load(to, &a_map, step * DEPTH, row, full + stage);
                    bulk_load_both(to + A_BYTES + rank * (B_BYTES / 2), &b_map, step * DEPTH, weight_row, full + stage);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        }
    } else {
        more_registers();
        const u32 half = role - 1, thread = threadIdx.x % 128;
        for (u32 index = blockIdx.x / PAIR; index < pairs * tiles_n; index += gridDim.x / PAIR) {
            const Tile tile = tile_at(index, pairs, tiles_n);
            int sums[128];
            u32 before = 0;
            for (u32 step = 0; step < steps; ++step) {
                barrier_wait(full + stage, phase);
                unsigned char* const at = ring + stage * STAGE_BYTES;
                const u64 a = operand(at + half * (A_BYTES / 2)), b = operand(at + A_BYTES);
                products_begin(sums);
                for (u32 part = 0; part < DEPTH / 32; ++part)  // 32 bytes on, in units of 16
                    product(sums, a + 2 * part, b + 2 * part, step + part != 0);
                products_commit();
                products_wait<1>(sums);
                if (step != 0 && thread < PAIR) barrier_arrive(empty + before, thread);
                before = stage;
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            products_wait<0>(sums);
            if (thread < PAIR) barrier_arrive(empty + before, thread);
            store_results(sums, tile.m + rank * TILE_M + half * 64, tile.n, token_scale, row_scale, bias, out, m, n);
        }
    }
    cluster_sync();  // none leaves while the other may still write to its memory
}

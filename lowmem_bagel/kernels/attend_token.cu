// Attention of one new token of text over a cache of halves, with its QK norm, its rope and its row of the cache.
//
// A block takes a part of the keys of one key/value head, a warp of it one of the query heads that share it: the warps
// find in the first-level cache what the first of them has read. Four lanes take a key, DIM / 4 of its values each, and
// keep a softmax of their own, in float32; the warp joins its eight at the end, and `join_parts` the parts.

#include "rotated_head.cuh"

#define THREADS (GROUP * 32)
#define TEAM 4                // lanes to a key
#define TEAMS (32 / TEAM)     // keys that a warp works on at a time
#define EACH (DIM / TEAM)     // values of a head that a lane holds, a multiple of 8

struct Token {
    const Wide* qkv;  // [(heads + 2 kv_heads) * DIM]
    const Wide* q_norm;
    const Wide* k_norm;
    const float* cos;  // [positions, DIM]
    const float* sin;
    const int* position;
    const int* length;  // of the cache, and so the row of this token
    u16* k;             // [rows, kv_heads, DIM]
    u16* v;
    float* sums;     // [heads, parts, DIM], not divided by
    float* weights;  // [heads, parts], the sum of the softmax's weights, relative to
    float* largest;  // [heads, parts], the largest score
    u64 row, head;   // strides of the caches in values
    u32 heads, kv_heads;
    float eps, scale;
};

struct Softmax {
    float largest, weights, sums[EACH];
};

// The lane's share of a head, from global or shared memory.
__device__ __forceinline__ void load_share(const u16* head, float* values) {
    const uint4* source = reinterpret_cast<const uint4*>(head + (threadIdx.x % TEAM) * EACH);
#pragma unroll
    for (int i = 0; i < EACH / 8; ++i) {
        const uint4 eight = source[i];
        const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            values[8 * i + 2 * p] = half_value(pairs[p] & 0xffff);
            values[8 * i + 2 * p + 1] = half_value(pairs[p] >> 16);
        }
    }
}

// One key a team; all lanes of the warp come here, `counts` says whose key does.
__device__ __forceinline__ void take(Softmax& s, const float* query, const u16* key, const u16* value, bool counts,
                                     float scale) {
    float share[EACH], product = 0;
    load_share(key, share);
#pragma unroll
    for (int i = 0; i < EACH; ++i) product += query[i] * share[i];
    load_share(value, share);
    for (int step = TEAM / 2; step > 0; step >>= 1) product += __shfl_xor_sync(0xffffffffu, product, step);
    if (!counts) return;
    const float score = product * scale;
    const float largest = score > s.largest ? score : s.largest;
    const float kept = expf(s.largest - largest), weight = expf(score - largest);
    s.weights = s.weights * kept + weight;
#pragma unroll
    for (int i = 0; i < EACH; ++i) s.sums[i] = s.sums[i] * kept + weight * share[i];
    s.largest = largest;
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_token(Token t) {
    alignas(16) __shared__ u16 queries[GROUP][DIM];
    alignas(16) __shared__ u16 own[2][DIM];  // key and value of the token
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, team = lane / TEAM;
    const u32 kv = blockIdx.x, part = blockIdx.y, parts = gridDim.y, head = kv * GROUP + warp;
    const u32 length = static_cast<u32>(*t.length);
    const float* cos = t.cos + static_cast<u64>(*t.position) * DIM;
    const float* sin = t.sin + static_cast<u64>(*t.position) * DIM;
    rotate_head(t.qkv + head * DIM, t.q_norm, cos, sin, DIM, t.eps, queries[warp]);
    if (part == 0 && warp == 0) {
        rotate_head(t.qkv + (t.heads + kv) * DIM, t.k_norm, cos, sin, DIM, t.eps, own[0]);
        const Wide* value = t.qkv + (t.heads + t.kv_heads + kv) * DIM;
        for (u32 i = lane; i < DIM; i += 32) own[1][i] = half_bits(wide_value(value[i]));
    }
    __syncthreads();
    u16* keys = t.k + kv * t.head;
    u16* values = t.v + kv * t.head;
    float query[EACH];
    load_share(queries[warp], query);
    Softmax mine = {};
    mine.largest = __uint_as_float(0xff800000u);  // minus infinity
    if (part == 0) {
        take(mine, query, own[0], own[1], team == 0, t.scale);
        for (u32 i = threadIdx.x; i < DIM; i += THREADS) {
            keys[length * t.row + i] = own[0][i];
            values[length * t.row + i] = own[1][i];
        }
    }
    const u32 share = (length + parts * TEAMS - 1) / (parts * TEAMS) * TEAMS, start = part * share;
    const u32 stop = start + share < length ? start + share : length;
    for (u32 first = start; first < stop; first += TEAMS) {
        const u32 at = first + team < stop ? first + team : first;
        take(mine, query, keys + at * t.row, values + at * t.row, first + team < stop, t.scale);
    }
    float largest = mine.largest;
    for (int step = TEAM; step < 32; step <<= 1) {
        const float other = __shfl_xor_sync(0xffffffffu, largest, step);
        largest = other > largest ? other : largest;
    }
    const u64 place = static_cast<u64>(head) * parts + part;
    const float kept = mine.weights > 0 ? expf(mine.largest - largest) : 0;  // 0 of a team without keys
    float weights = mine.weights * kept;
    for (int step = TEAM; step < 32; step <<= 1) weights += __shfl_xor_sync(0xffffffffu, weights, step);
    if (lane == 0) t.weights[place] = weights, t.largest[place] = largest;
    for (int i = 0; i < EACH; ++i) {
        float sum = mine.sums[i] * kept;
        for (int step = TEAM; step < 32; step <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (team == 0) t.sums[place * DIM + lane * EACH + i] = sum;
    }
}

// A head a block, a value a thread.
extern "C" __global__ void __launch_bounds__(DIM)
join_parts(const float* sums, const float* weights, const float* largest, Wide* out, u32 parts) {
    const u64 first = static_cast<u64>(blockIdx.x) * parts;
    float most = largest[first];
    for (u32 p = 1; p < parts; ++p) most = largest[first + p] > most ? largest[first + p] : most;
    float weight = 0, value = 0;
    for (u32 p = 0; p < parts; ++p) {
        const float kept = expf(largest[first + p] - most);  // 0 of a part without keys
        weight += weights[first + p] * kept;
        value += sums[(first + p) * DIM + threadIdx.x] * kept;
    }
    out[blockIdx.x * DIM + threadIdx.x] = as_wide(value / weight);
}

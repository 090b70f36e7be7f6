// Attention of one new token of text over a fp16 cache, with its QK norm, its rope and its row of the cache. One block
// does one query head; DIM, the head's size, is a multiple of 32. A warp takes every WARPS-th key, KEYS at a time, and
// keeps its own softmax, in float32; the block joins them at the end.

#include "rotated_head.cu"

#define THREADS 256
#define WARPS (THREADS / 32)
#define EACH (DIM / 32)  // values of a head that a lane holds
#define KEYS 4

struct Token {
    const float* qkv;  // [(heads + 2 kv_heads) * DIM]
    const float* q_norm;
    const float* k_norm;
    const float* cos;  // [positions, DIM]
    const float* sin;
    const int* position;
    const int* length;  // of the cache, and so the row of this token
    u16* k;             // [rows, kv_heads, DIM]
    u16* v;
    float* out;     // [heads, DIM]
    u64 row, head;  // strides of the caches in values
    u32 heads, kv_heads;
    float eps, scale;
};

struct Softmax {
    float largest, sum, values[EACH];
};

__device__ __forceinline__ void load_values(const u16* source, float* values) {
    const u32 lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < EACH; ++i) values[i] = fp16_value(source[i * 32 + lane]);
}

// Scores and values of `count` keys, the lane's part of each, into the softmax.
__device__ __forceinline__ void take(Softmax& s, const float* query, const float (*keys)[EACH],
                                     const float (*values)[EACH], int count, float scale) {
    float scores[KEYS], largest = s.largest;
#pragma unroll
    for (int n = 0; n < KEYS; ++n) {
        float product = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) product += query[i] * keys[n][i];
        scores[n] = warp_sum(product) * scale;
        if (n < count) largest = scores[n] > largest ? scores[n] : largest;
    }
    const float kept = expf(s.largest - largest);
    s.sum *= kept;
#pragma unroll
    for (int i = 0; i < EACH; ++i) s.values[i] *= kept;
#pragma unroll
    for (int n = 0; n < KEYS; ++n) {
        if (n >= count) continue;
        const float weight = expf(scores[n] - largest);
        s.sum += weight;
#pragma unroll
        for (int i = 0; i < EACH; ++i) s.values[i] += weight * values[n][i];
    }
    s.largest = largest;
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_token(Token t) {
    __shared__ u16 own[3][DIM];  // query, key and value of the token
    __shared__ float largest[WARPS], sums[WARPS], joined[WARPS][DIM];
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u32 group = t.heads / t.kv_heads, kv = blockIdx.x / group;
    const u32 length = static_cast<u32>(*t.length);
    const float* cos = t.cos + static_cast<u64>(*t.position) * DIM;
    const float* sin = t.sin + static_cast<u64>(*t.position) * DIM;
    if (warp == 0) rotate_head(t.qkv + blockIdx.x * DIM, t.q_norm, cos, sin, DIM, t.eps, own[0]);
    if (warp == 1) rotate_head(t.qkv + (t.heads + kv) * DIM, t.k_norm, cos, sin, DIM, t.eps, own[1]);
    if (warp == 2) {
        const float* value = t.qkv + (t.heads + t.kv_heads + kv) * DIM;
        for (u32 i = lane; i < DIM; i += 32) own[2][i] = fp16_bits(value[i]);
    }
    __syncthreads();
    const u16* keys = t.k + kv * t.head;
    const u16* values = t.v + kv * t.head;
    if (blockIdx.x % group == 0 && threadIdx.x < DIM) {
        t.k[kv * t.head + length * t.row + threadIdx.x] = own[1][threadIdx.x];
        t.v[kv * t.head + length * t.row + threadIdx.x] = own[2][threadIdx.x];
    }
    Softmax mine = {};
    float query[EACH], k[KEYS][EACH], v[KEYS][EACH];
    load_values(own[0], query);
    mine.largest = __uint_as_float(0xff800000u);  // minus infinity
    if (warp == 0) {                              // its own key first, so that no warp 0 is without one
        for (int n = 0; n < KEYS; ++n) load_values(own[1], k[n]), load_values(own[2], v[n]);
        take(mine, query, k, v, 1, t.scale);
    }
    for (u32 first = warp * KEYS; first < length; first += THREADS / 32 * KEYS) {
        const int count = length - first < KEYS ? length - first : KEYS;
#pragma unroll
        for (int n = 0; n < KEYS; ++n) {
            const u64 at = (n < count ? first + n : first) * t.row;
            load_values(keys + at, k[n]);
            load_values(values + at, v[n]);
        }
        take(mine, query, k, v, count, t.scale);
    }
    if (lane == 0) largest[warp] = mine.largest, sums[warp] = mine.sum;
    for (int i = 0; i < EACH; ++i) joined[warp][i * 32 + lane] = mine.values[i];
    __syncthreads();
    float most = largest[0];
    for (int w = 1; w < WARPS; ++w) most = largest[w] > most ? largest[w] : most;
    for (u32 i = threadIdx.x; i < DIM; i += THREADS) {
        float sum = 0, value = 0;
        for (int w = 0; w < WARPS; ++w) {
            const float kept = expf(largest[w] - most);  // 0 of a warp without keys
            sum += sums[w] * kept;
            value += joined[w][i] * kept;
        }
        t.out[blockIdx.x * DIM + i] = value / sum;
    }
}

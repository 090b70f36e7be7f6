// NF4 weights.

#include "packed.cuh"

// Levels of NF4, in float32, are an argument: codec.py has them.
struct Levels {
    float of[16];
};

// NF4 -> half: level * absmax in float32, rounded once. A word of eight codes a thread; eight words have one absmax.
extern "C" __global__ void __launch_bounds__(THREADS)
nf4_to_half(const u32* weight, const float* absmax, uint4* out, u64 words, Levels levels) {
    __shared__ float level[16];
    if (threadIdx.x < 16) level[threadIdx.x] = levels.of[threadIdx.x];
    __syncthreads();
    for (u64 i = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; i < words;
         i += static_cast<u64>(gridDim.x) * THREADS) {
        const u32 word = __ldg(weight + i);
        const float scale = __ldg(absmax + i / 8);
        u32 pairs[4];
        for (int b = 0; b < 4; ++b) {
            const u32 byte = word >> 8 * b & 0xff;
            pairs[b] = half_bits(level[byte >> 4] * scale) | half_bits(level[byte & 15] * scale) << 16;
        }
        out[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

__device__ __forceinline__ float dot_codes(u32 word, const float* level, const float* eight) {
    float sum = 0;
    for (int b = 0; b < 4; ++b) {
        const u32 byte = word >> 8 * b & 0xff;
        sum += level[byte >> 4] * eight[2 * b] + level[byte & 15] * eight[2 * b + 1];
    }
    return sum;
}

// out[n] = sum_k token[k] * weight[n, k]; width a multiple of 32: half a block of 64 values a lane; the 16 levels lie in 16 banks, so that look-ups meet in none.
extern "C" __global__ void __launch_bounds__(THREADS)
nf4_times_token(const u16* token, const uint4* weight, const float* absmax, float* out, u32 rows, u32 width,
                Levels levels) {
    alignas(16) __shared__ float staged[CHUNK];
    __shared__ float level[16];
    if (threadIdx.x < 16) level[threadIdx.x] = levels.of[threadIdx.x];
    const u32 lane = threadIdx.x & 31, first = (blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5)) * ROWS;
    float sums[ROWS] = {};
    for (u32 start = 0; start < width; start += CHUNK) {
        stage(token, staged, start, width);
        for (u32 at = lane * 32; at < CHUNK && start + at < width; at += 32 * 32) {
            float x[32];
            for (int i = 0; i < 8; ++i) *reinterpret_cast<float4*>(x + 4 * i) = *reinterpret_cast<float4*>(staged + at + 4 * i);
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                if (first + r >= rows) continue;
                const u64 value = static_cast<u64>(first + r) * width + start + at;
                const uint4 w = __ldcs(weight + value / 32);
                const float sum = dot_codes(w.x, level, x) + dot_codes(w.y, level, x + 8) +
                                  dot_codes(w.z, level, x + 16) + dot_codes(w.w, level, x + 24);
                sums[r] += sum * __ldg(absmax + value / 64);
            }
        }
    }
    for (u32 r = 0; r < ROWS; ++r) {
        const float sum = warp_sum(sums[r]);
        if (lane == 0 && first + r < rows) out[first + r] = sum;
    }
}

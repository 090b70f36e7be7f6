// INT8 weights.

#include "packed.cuh"

// int8 -> half times a power of two: exact. A word of four values a thread.
extern "C" __global__ void __launch_bounds__(THREADS) int8_to_half(const u32* weight, uint2* out, u64 words, float times) {
    for (u64 i = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; i < words;
         i += static_cast<u64>(gridDim.x) * THREADS) {
        const u32 word = __ldg(weight + i);
        u32 halves[4];
        for (int b = 0; b < 4; ++b) halves[b] = half_bits(static_cast<float>(static_cast<signed char>(word >> 8 * b)) * times);
        out[i] = make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
    }
}

// A signed byte as a float, by its place in the bits of 2^23: a conversion instruction would be four times slower.
__device__ __forceinline__ float byte_value(u32 flipped, int b) {
    return __uint_as_float(__byte_perm(flipped, 0x4b000000u, 0x7540 + b)) - 8388736.0f;
}

__device__ __forceinline__ float dot_word(u32 word, const float* four) {
    const u32 flipped = word ^ 0x80808080u;
    float sum = 0;
    for (int b = 0; b < 4; ++b) sum += byte_value(flipped, b) * four[b];
    return sum;
}

// out[n] = sum_k token[k] * weight[n, k]; width a multiple of 16.
extern "C" __global__ void __launch_bounds__(THREADS)
int8_times_token(const u16* token, const uint4* weight, float* out, u32 rows, u32 width) {
    alignas(16) __shared__ float staged[CHUNK];
    const u32 lane = threadIdx.x & 31, first = (blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5)) * ROWS;
    float sums[ROWS] = {};
    for (u32 start = 0; start < width; start += CHUNK) {
        stage(token, staged, start, width);
        for (u32 at = lane * 16; at < CHUNK && start + at < width; at += 32 * 16) {
            float x[16];
            for (int i = 0; i < 4; ++i) *reinterpret_cast<float4*>(x + 4 * i) = *reinterpret_cast<float4*>(staged + at + 4 * i);
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                if (first + r >= rows) continue;
                const uint4 w = __ldcs(weight + (static_cast<u64>(first + r) * width + start + at) / 16);
                sums[r] += dot_word(w.x, x) + dot_word(w.y, x + 4) + dot_word(w.z, x + 8) + dot_word(w.w, x + 12);
            }
        }
    }
    for (u32 r = 0; r < ROWS; ++r) {
        const float sum = warp_sum(sums[r]);
        if (lane == 0 && first + r < rows) out[first + r] = sum;
    }
}

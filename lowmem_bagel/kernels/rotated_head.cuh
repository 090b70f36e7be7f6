// QK norm and rope of one head by one warp, for the kernels that need it.

#include "halves.cuh"

__device__ __forceinline__ float warp_sum(float mine) {
    for (int step = 16; step > 0; step >>= 1) mine += __shfl_xor_sync(0xffffffffu, mine, step);
    return mine;
}

// target = rope(rms_norm(source) * norm), computed in float32 and rounded once; all of d values.
__device__ __forceinline__ void rotate_head(const Wide* source, const Wide* norm, const float* cos, const float* sin,
                                            u32 d, float eps, u16* target) {
    const u32 lane = threadIdx.x & 31, half = d / 2;
    float squares = 0;
    for (u32 i = lane; i < d; i += 32) squares += wide_value(source[i]) * wide_value(source[i]);
    const float rstd = rsqrtf(warp_sum(squares) / d + eps);
    for (u32 i = lane; i < half; i += 32) {
        const float left = wide_value(source[i]) * rstd * wide_value(norm[i]);
        const float right = wide_value(source[half + i]) * rstd * wide_value(norm[half + i]);
        target[i] = half_bits(left * cos[i] - right * sin[i]);
        target[half + i] = half_bits(right * cos[half + i] + left * sin[half + i]);
    }
}

// QK norm and rope of one head by one warp, for the kernels that need it.

#include "halves.cu"

__device__ __forceinline__ float warp_sum(float mine) {
    for (int step = 16; step > 0; step >>= 1) mine += __shfl_xor_sync(0xffffffffu, mine, step);
    return mine;
}

// target = rope(rms_norm(source) * norm), computed in float32 and rounded once to fp16; all of d values.
__device__ __forceinline__ void rotate_head(const float* source, const float* norm, const float* cos, const float* sin,
                                            u32 d, float eps, u16* target) {
    const u32 lane = threadIdx.x & 31, half = d / 2;
    float squares = 0;
    for (u32 i = lane; i < d; i += 32) squares += source[i] * source[i];
    const float rstd = rsqrtf(warp_sum(squares) / d + eps);
    for (u32 i = lane; i < half; i += 32) {
        const float left = source[i] * rstd * norm[i], right = source[half + i] * rstd * norm[half + i];
        target[i] = fp16_bits(left * cos[i] - right * sin[i]);
        target[half + i] = fp16_bits(right * cos[half + i] + left * sin[half + i]);
    }
}

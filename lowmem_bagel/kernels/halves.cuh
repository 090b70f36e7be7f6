// What the two arithmetics compute with:
//
//     BF16_ARITHMETIC  what surrounds the matmuls (Wide)  attention and weights (half)
//     0                float32                            fp16
//     1                bf16                               bf16

#include "common.cuh"

#if BF16_ARITHMETIC
typedef u16 Wide;
__device__ __forceinline__ u32 half_bits(float value) { return bf16_bits(value); }
__device__ __forceinline__ float half_value(u32 bits) { return bf16_value(bits); }
__device__ __forceinline__ float wide_value(Wide stored) { return bf16_value(stored); }
__device__ __forceinline__ Wide as_wide(float value) { return static_cast<Wide>(bf16_bits(value)); }
#else
typedef float Wide;
__device__ __forceinline__ u32 half_bits(float value) { return fp16_bits(value); }
__device__ __forceinline__ float half_value(u32 bits) { return fp16_value(static_cast<u16>(bits)); }
__device__ __forceinline__ float wide_value(Wide stored) { return stored; }
__device__ __forceinline__ Wide as_wide(float value) { return value; }
#endif

// The value as it would be stored.
__device__ __forceinline__ float rounded(float value) { return wide_value(as_wide(value)); }

// Four neighbours at a multiple of four values.
__device__ __forceinline__ void load_four(const float* source, float* four) {
    const float4 loaded = *reinterpret_cast<const float4*>(source);
    four[0] = loaded.x, four[1] = loaded.y, four[2] = loaded.z, four[3] = loaded.w;
}

__device__ __forceinline__ void store_four(float* target, const float* four) {
    *reinterpret_cast<float4*>(target) = make_float4(four[0], four[1], four[2], four[3]);
}

#if BF16_ARITHMETIC
__device__ __forceinline__ void load_four(const Wide* source, float* four) {
    const uint2 loaded = *reinterpret_cast<const uint2*>(source);
    four[0] = bf16_value(loaded.x & 0xffff), four[1] = __uint_as_float(loaded.x & 0xffff0000);
    four[2] = bf16_value(loaded.y & 0xffff), four[3] = __uint_as_float(loaded.y & 0xffff0000);
}

__device__ __forceinline__ void store_four(Wide* target, const float* four) {
    *reinterpret_cast<uint2*>(target) =
        make_uint2(bf16_bits(four[0]) | bf16_bits(four[1]) << 16, bf16_bits(four[2]) | bf16_bits(four[3]) << 16);
}
#endif

// Activations before a matmul, a token (row) a block: normalised, or scaled, as fp16 at a power of two or as int8 at
// absmax / 127. A row is read once and stays in registers: THREADS threads hold QUADS times four of its values each.
//
// The largest magnitude is found among bits taken for integers, where a NaN is larger than infinity, and infinity than
// any number: both reach `back`, so that they stay visible in the product.

#include "halves.cuh"

// Types of the input: Wide, or fp16 in either arithmetic.
#define WIDE 0
#define FP16 1

struct Row {
    float values[QUADS][4];
};

struct Input {
    const void* x;
    const Wide* norm;  // RMSNorm's weight, or null
    u64 stride;         // values from row to row
    u32 width;
    u32 type;
    u32 fours;  // rows begin at multiples of 16 bytes and are multiples of four values
    float eps;
};

__device__ __forceinline__ u32 block_largest(u32 mine) {
    __shared__ u32 warps[32];
    for (int step = 16; step > 0; step >>= 1) {
        const u32 other = __shfl_xor_sync(0xffffffffu, mine, step);
        mine = other > mine ? other : mine;
    }
    __syncthreads();  // of a former use
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = mine;
    __syncthreads();
    u32 largest = 0;
    for (int i = 0; i < THREADS / 32; ++i) largest = warps[i] > largest ? warps[i] : largest;
    return largest;
}

__device__ __forceinline__ float block_sum(float mine) {
    __shared__ float warps[32];
    for (int step = 16; step > 0; step >>= 1) mine += __shfl_xor_sync(0xffffffffu, mine, step);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = mine;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < THREADS / 32; ++i) sum += warps[i];
    return sum;
}

__device__ __forceinline__ u32 column_of(int quad) { return (quad * THREADS + threadIdx.x) * 4; }

__device__ __forceinline__ void load(const Input& in, const void* x, u32 type, u64 at, u32 column, float* four) {
    if (column >= in.width) {
        four[0] = four[1] = four[2] = four[3] = 0;
    } else if (in.fours && type == WIDE) {
        load_four(static_cast<const Wide*>(x) + at, four);
    } else if (in.fours) {
        const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(static_cast<const u16*>(x) + at));
        four[0] = fp16_value(loaded.x & 0xffff), four[1] = fp16_value(loaded.x >> 16);
        four[2] = fp16_value(loaded.y & 0xffff), four[3] = fp16_value(loaded.y >> 16);
    } else {
        for (u32 i = 0; i < 4; ++i) {
            if (column + i >= in.width) four[i] = 0;
            else if (type == WIDE) four[i] = wide_value(static_cast<const Wide*>(x)[at + i]);
            else four[i] = fp16_value(static_cast<const u16*>(x)[at + i]);
        }
    }
}

// The row, normalised if a norm is given, and the bits of its largest magnitude.
__device__ __forceinline__ u32 load_row(const Input& in, Row& row) {
    const u64 start = blockIdx.x * in.stride;
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        load(in, in.x, in.type, start + column_of(q), column_of(q), row.values[q]);
    }
    if (in.norm != nullptr) {
        float squares = 0;
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
#pragma unroll
            for (int i = 0; i < 4; ++i) squares += row.values[q][i] * row.values[q][i];
        }
        const float rstd = rsqrtf(block_sum(squares) / in.width + in.eps);
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            float weight[4];
            load(in, in.norm, WIDE, column_of(q), column_of(q), weight);
#pragma unroll
            for (int i = 0; i < 4; ++i) row.values[q][i] = rounded(rounded(row.values[q][i] * rstd) * weight[i]);
        }
    }
    u32 largest = 0;
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 magnitude = __float_as_uint(row.values[q][i]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    return block_largest(largest);
}

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(Input in, Wide* out) {
    Row row;
    load_row(in, row);
    Wide* target = out + static_cast<u64>(blockIdx.x) * in.width;
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const u32 column = column_of(q);
        if (column >= in.width) continue;
        if (in.fours) {
            store_four(target + column, row.values[q]);
        } else {
            for (u32 i = 0; i < 4 && column + i < in.width; ++i) target[column + i] = as_wide(row.values[q][i]);
        }
    }
}

// out = fp16(x * 2^s) with s = exponent - e, max |x| < 2^e, within MAX_SHIFT either way; back = 2^-s.
extern "C" __global__ void __launch_bounds__(THREADS)
to_fp16(Input in, u16* out, float* back, int exponent, int max_shift) {
    Row row;
    const u32 largest = load_row(in, row);
    int shift = largest == 0 ? exponent : exponent - (static_cast<int>(largest >> 23) - 126);
    shift = shift < -max_shift ? -max_shift : shift > max_shift ? max_shift : shift;
    const float up = __uint_as_float(static_cast<u32>(127 + shift) << 23);
    if (threadIdx.x == 0) back[blockIdx.x] = __uint_as_float(static_cast<u32>(127 - shift) << 23);
    u16* target = out + static_cast<u64>(blockIdx.x) * in.width;
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const u32 column = column_of(q);
        const float* four = row.values[q];
        if (column >= in.width) continue;
        if (in.fours) {
            const u32 low = fp16_bits(four[0] * up) | fp16_bits(four[1] * up) << 16;
            const u32 high = fp16_bits(four[2] * up) | fp16_bits(four[3] * up) << 16;
            *reinterpret_cast<uint2*>(target + column) = make_uint2(low, high);
        } else {
            for (u32 i = 0; i < 4 && column + i < in.width; ++i) target[column + i] = fp16_bits(four[i] * up);
        }
    }
}

__device__ __forceinline__ u32 quantised(float value, float divisor) {
    float whole = rintf(value / divisor);
    whole = whole < -127 ? -127 : whole > 127 ? 127 : whole;  // NaN passes; the scale is NaN then too
    return static_cast<u32>(static_cast<int>(whole)) & 0xff;
}

// out = x / scale rounded half to even, scale = max |x| / 127: the arithmetic of ops/int8.py. back = scale.
extern "C" __global__ void __launch_bounds__(THREADS)
to_int8(Input in, signed char* out, float* back) {
    Row row;
    const float scale = __uint_as_float(load_row(in, row)) / 127.0f;
    const float divisor = scale > 0 ? scale : 1.0f;
    if (threadIdx.x == 0) back[blockIdx.x] = scale;
    signed char* target = out + static_cast<u64>(blockIdx.x) * in.width;
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const u32 column = column_of(q);
        const float* four = row.values[q];
        if (column >= in.width) continue;
        if (in.fours) {
            *reinterpret_cast<u32*>(target + column) = quantised(four[0], divisor) | quantised(four[1], divisor) << 8 |
                                                       quantised(four[2], divisor) << 16 |
                                                       quantised(four[3], divisor) << 24;
        } else {
            for (u32 i = 0; i < 4 && column + i < in.width; ++i)
                target[column + i] = static_cast<signed char>(quantised(four[i], divisor));
        }
    }
}

// What is done with the product of a matmul whose activations were scaled (prologues.cu):
//
//     y[row, n] = product[row, n] * columns[n] * back[row] + bias[n]      in float32, left to right
//
// and SwiGLU of activations that were not. A block of THREADS threads takes four values a thread of one row. Products are
// float32, or int32 where they are of int8.

#include "rotated_head.cuh"

#define THREADS 256

struct Product {
    const void* values;
    const float* back;
    const float* columns;  // null: ones
    const Wide* bias;      // null: zeros
    u32 width;             // values in a row
    u32 integers;
    u32 fours;  // four neighbours can be accessed at once
};

template <class T>
__device__ __forceinline__ float value_of(T stored) { return wide_value(stored); }
#if BF16_ARITHMETIC
template <>
__device__ __forceinline__ float value_of<float>(float stored) { return stored; }
#endif

template <class T>
__device__ __forceinline__ void load(const T* source, u32 fours, u64 at, u32 count, float otherwise, float* four) {
    if (source == nullptr) {
        four[0] = four[1] = four[2] = four[3] = otherwise;
    } else if (fours) {
        load_four(source + at, four);
    } else {
        for (u32 i = 0; i < 4; ++i) four[i] = i < count ? value_of(source[at + i]) : 0;
    }
}

// Up to four values from `column` of this block's row on; `count` of them are inside.
__device__ __forceinline__ void result_at(const Product& p, u32 column, u32 count, float* four) {
    const u64 at = static_cast<u64>(blockIdx.x) * p.width + column;
    load(static_cast<const float*>(p.values), p.fours, at, count, 0, four);
    if (p.integers) {
        for (int i = 0; i < 4; ++i) four[i] = static_cast<float>(static_cast<int>(__float_as_uint(four[i])));
    }
    float columns[4], bias[4];
    load(p.columns, p.fours, column, count, 1, columns);
    load(p.bias, p.fours, column, count, 0, bias);
    const float back = p.back[blockIdx.x];
    for (int i = 0; i < 4; ++i) {
        four[i] = four[i] * columns[i] * back;
        if (p.bias != nullptr) four[i] += bias[i];
    }
}

__device__ __forceinline__ void store(Wide* out, u32 fours, u64 at, u32 count, const float* four) {
    if (fours) {
        store_four(out + at, four);
    } else {
        for (u32 i = 0; i < count; ++i) out[at + i] = as_wide(four[i]);
    }
}

__device__ __forceinline__ u32 first_column() { return (blockIdx.y * THREADS + threadIdx.x) * 4; }

__device__ __forceinline__ u32 inside(u32 column, u32 width) {
    return column >= width ? 0 : width - column < 4 ? width - column : 4;
}

// out may be where the product is, if they are as wide.
extern "C" __global__ void __launch_bounds__(THREADS) epilogue(Product p, Wide* out) {
    const u32 column = first_column(), count = inside(column, p.width);
    if (count == 0) return;
    float four[4];
    result_at(p, column, count, four);
    store(out, p.fours, static_cast<u64>(blockIdx.x) * p.width + column, count, four);
}

extern "C" __global__ void __launch_bounds__(THREADS) epilogue_add(Product p, Wide* residual) {
    const u32 column = first_column(), count = inside(column, p.width);
    if (count == 0) return;
    float four[4], held[4];
    result_at(p, column, count, four);
    const u64 at = static_cast<u64>(blockIdx.x) * p.width + column;
    load(residual, p.fours, at, count, 0, held);
    for (int i = 0; i < 4; ++i) held[i] += four[i];
    store(residual, p.fours, at, count, held);
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// out = silu(gate) * up: the left and the right half of a row, of 2 * width values, rounded as PyTorch rounds.
extern "C" __global__ void __launch_bounds__(THREADS) swiglu(const Wide* gate_up, Wide* out, u32 width, u32 fours) {
    const u32 column = first_column(), count = inside(column, width);
    if (count == 0) return;
    const u64 row = static_cast<u64>(blockIdx.x) * 2 * width;
    float gate[4], up[4];
    load(gate_up, fours, row + column, count, 0, gate);
    load(gate_up, fours, row + width + column, count, 0, up);
    for (int i = 0; i < 4; ++i) gate[i] = rounded(silu(gate[i])) * up[i];
    store(out, fours, static_cast<u64>(blockIdx.x) * width + column, count, gate);
}

// The same of a product.
extern "C" __global__ void __launch_bounds__(THREADS) epilogue_swiglu(Product p, Wide* out) {
    const u32 half = p.width / 2, column = first_column(), count = inside(column, half);
    if (count == 0) return;
    float gate[4], up[4];
    result_at(p, column, count, gate);
    result_at(p, half + column, count, up);
    for (int i = 0; i < 4; ++i) gate[i] = silu(gate[i]) * up[i];
    store(out, p.fours, static_cast<u64>(blockIdx.x) * half + column, count, gate);
}

// ------------------------------------------------------------------------------------------------- QK norm and rope

struct Heads {
    const Wide* qkv;  // [batch, tokens, (heads + 2 kv_heads) * d], contiguous
    const Wide* q_norm;
    const Wide* k_norm;
    const float* cos;  // rows of d
    const float* sin;
    u16* q;
    u16* k;
    u16* v;
    u64 rope_batch, rope_token, q_batch, q_token, kv_batch, kv_token, kv_head;  // strides in values
    u32 heads, kv_heads, d;
    float eps;
};

// A token a block, a head a warp: q and k = rope(rms_norm(head) * weight), rounded once; v is only rounded.
extern "C" __global__ void __launch_bounds__(THREADS) rotate(Heads h) {
    const u32 lane = threadIdx.x & 31, all = h.heads + 2 * h.kv_heads;
    const u64 token = blockIdx.x, batch = blockIdx.y;
    const float* cos = h.cos + batch * h.rope_batch + token * h.rope_token;
    const float* sin = h.sin + batch * h.rope_batch + token * h.rope_token;
    for (u32 head = threadIdx.x >> 5; head < all; head += THREADS / 32) {
        const Wide* source = h.qkv + ((batch * gridDim.x + token) * all + head) * h.d;
        const u64 kv = batch * h.kv_batch + token * h.kv_token;
        u16* target = head < h.heads ? h.q + batch * h.q_batch + token * h.q_token + head * h.d
                      : head < h.heads + h.kv_heads ? h.k + kv + (head - h.heads) * h.kv_head
                                                    : h.v + kv + (head - h.heads - h.kv_heads) * h.kv_head;
        if (head >= h.heads + h.kv_heads) {
            for (u32 i = lane; i < h.d; i += 32) target[i] = half_bits(wide_value(source[i]));
            continue;
        }
        rotate_head(source, head < h.heads ? h.q_norm : h.k_norm, cos, sin, h.d, h.eps, target);
    }
}

// What is done with the product of a matmul whose activations were narrowed (narrow.cu):
//
//     y[row, n] = product[row, n] * columns[n] * back[row] + bias[n]      float32, left to right
//
// A block of THREADS threads takes four values a thread of one row. Products are float32, or int32 where they are of int8.

#include "rotated_head.cu"

#define THREADS 256

struct Product {
    const void* values;
    const float* back;
    const float* columns;  // null: ones
    const float* bias;     // null: zeros
    u32 width;             // values in a row
    u32 integers;
    u32 wide;  // four neighbours can be accessed at once
};

__device__ __forceinline__ void four_floats(const float* source, u32 wide, u64 at, u32 count, float otherwise,
                                            float* four) {
    if (source == nullptr) {
        four[0] = four[1] = four[2] = four[3] = otherwise;
    } else if (wide) {
        const float4 loaded = *reinterpret_cast<const float4*>(source + at);
        four[0] = loaded.x, four[1] = loaded.y, four[2] = loaded.z, four[3] = loaded.w;
    } else {
        for (u32 i = 0; i < 4; ++i) four[i] = i < count ? source[at + i] : 0;
    }
}

// Up to four values from `column` of this block's row on; `count` of them are inside.
__device__ __forceinline__ void widened(const Product& p, u32 column, u32 count, float* four) {
    const u64 at = static_cast<u64>(blockIdx.x) * p.width + column;
    four_floats(static_cast<const float*>(p.values), p.wide, at, count, 0, four);
    if (p.integers) {
        for (int i = 0; i < 4; ++i) four[i] = static_cast<float>(static_cast<int>(__float_as_uint(four[i])));
    }
    float columns[4], bias[4];
    four_floats(p.columns, p.wide, column, count, 1, columns);
    four_floats(p.bias, p.wide, column, count, 0, bias);
    const float back = p.back[blockIdx.x];
    for (int i = 0; i < 4; ++i) {
        four[i] = four[i] * columns[i] * back;
        if (p.bias != nullptr) four[i] += bias[i];
    }
}

__device__ __forceinline__ void store_four(float* out, u32 wide, u64 at, u32 count, const float* four) {
    if (wide) {
        *reinterpret_cast<float4*>(out + at) = make_float4(four[0], four[1], four[2], four[3]);
    } else {
        for (u32 i = 0; i < count; ++i) out[at + i] = four[i];
    }
}

__device__ __forceinline__ u32 first_column() { return (blockIdx.y * THREADS + threadIdx.x) * 4; }

__device__ __forceinline__ u32 inside(u32 column, u32 width) {
    return column >= width ? 0 : width - column < 4 ? width - column : 4;
}

// out may be where the product is.
extern "C" __global__ void __launch_bounds__(THREADS) widen(Product p, float* out) {
    const u32 column = first_column(), count = inside(column, p.width);
    if (count == 0) return;
    float four[4];
    widened(p, column, count, four);
    store_four(out, p.wide, static_cast<u64>(blockIdx.x) * p.width + column, count, four);
}

extern "C" __global__ void __launch_bounds__(THREADS) add(Product p, float* residual) {
    const u32 column = first_column(), count = inside(column, p.width);
    if (count == 0) return;
    float four[4], held[4];
    widened(p, column, count, four);
    const u64 at = static_cast<u64>(blockIdx.x) * p.width + column;
    four_floats(residual, p.wide, at, count, 0, held);
    for (int i = 0; i < 4; ++i) held[i] += four[i];
    store_four(residual, p.wide, at, count, held);
}

// out = silu(gate) * up: the left and the right half of a row.
extern "C" __global__ void __launch_bounds__(THREADS) activate(Product p, float* out) {
    const u32 half = p.width / 2, column = first_column(), count = inside(column, half);
    if (count == 0) return;
    float gate[4], up[4];
    widened(p, column, count, gate);
    widened(p, half + column, count, up);
    for (int i = 0; i < 4; ++i) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    store_four(out, p.wide, static_cast<u64>(blockIdx.x) * half + column, count, gate);
}

// ------------------------------------------------------------------------------------------------- QK norm and rope

struct Heads {
    const float* qkv;  // [batch, tokens, (heads + 2 kv_heads) * d], contiguous
    const float* q_norm;
    const float* k_norm;
    const float* cos;  // rows of d
    const float* sin;
    u16* q;
    u16* k;
    u16* v;
    u64 rope_batch, rope_token, q_batch, q_token, kv_batch, kv_token, kv_head;  // strides in values
    u32 heads, kv_heads, d;
    float eps;
};

// A token a block, a head a warp: q and k = rope(rms_norm(head) * weight), rounded once to fp16; v is only rounded.
extern "C" __global__ void __launch_bounds__(THREADS) rotate(Heads h) {
    const u32 lane = threadIdx.x & 31, all = h.heads + 2 * h.kv_heads;
    const u64 token = blockIdx.x, batch = blockIdx.y;
    const float* cos = h.cos + batch * h.rope_batch + token * h.rope_token;
    const float* sin = h.sin + batch * h.rope_batch + token * h.rope_token;
    for (u32 head = threadIdx.x >> 5; head < all; head += THREADS / 32) {
        const float* source = h.qkv + ((batch * gridDim.x + token) * all + head) * h.d;
        const u64 kv = batch * h.kv_batch + token * h.kv_token;
        u16* target = head < h.heads ? h.q + batch * h.q_batch + token * h.q_token + head * h.d
                      : head < h.heads + h.kv_heads ? h.k + kv + (head - h.heads) * h.kv_head
                                                    : h.v + kv + (head - h.heads - h.kv_heads) * h.kv_head;
        if (head >= h.heads + h.kv_heads) {
            for (u32 i = lane; i < h.d; i += 32) target[i] = fp16_bits(source[i]);
            continue;
        }
        rotate_head(source, head < h.heads ? h.q_norm : h.k_norm, cos, sin, h.d, h.eps, target);
    }
}

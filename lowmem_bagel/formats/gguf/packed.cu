// Weights in GGUF's blocks (checkpoint/gguf_blocks.py says what they are), by their type KIND: 8 for Q8_0, else 4, 5 or 6.

#include "packed.cuh"

#if KIND == 8
#define BLOCK_BYTES 34
#define BLOCK_WORDS 4
#elif KIND == 4
#define BLOCK_BYTES 144
#define BLOCK_WORDS 32
#elif KIND == 5
#define BLOCK_BYTES 176
#define BLOCK_WORDS 32
#else
#define BLOCK_BYTES 210
#define BLOCK_WORDS 32
#endif

// Two bytes at an even place, and a signed byte of them.
__device__ __forceinline__ u32 pair_at(const u8* place) { return *reinterpret_cast<const u16*>(place); }
__device__ __forceinline__ float signed_byte(u32 byte) { return static_cast<float>(static_cast<int>(byte << 24) >> 24); }

#if KIND == 4 || KIND == 5
__device__ __forceinline__ u32 four_at(const u8* place) { return *reinterpret_cast<const u32*>(place); }

// The scale and the min of a group of 32 values.
__device__ __forceinline__ void scale_and_min(const u8* block, u32 group, float& scale, float& least) {
    const u32 shift = group % 4 * 8;
    const u32 a = four_at(block + 4) >> shift, b = four_at(block + 8) >> shift, c = four_at(block + 12) >> shift;
    const u32 s = group < 4 ? a & 63 : (c & 15) | (a >> 2 & 48), m = group < 4 ? b & 63 : (c >> 4 & 15) | (b >> 2 & 48);
    scale = fp16_value(static_cast<u16>(pair_at(block))) * s;
    least = fp16_value(static_cast<u16>(pair_at(block + 2))) * m;
}
#endif

// The eight values of a word of a block, and where the first of them and each next stand in the row: see formats/gguf/kernels.py.
__device__ __forceinline__ void word_values(const u8* block, u32 word, float* value) {
#if KIND == 8
    const float d = fp16_value(static_cast<u16>(pair_at(block)));
    for (u32 i = 0; i < 4; ++i) {
        const u32 pair = pair_at(block + 2 + word * 8 + 2 * i);
        value[2 * i] = d * signed_byte(pair);
        value[2 * i + 1] = d * signed_byte(pair >> 8);
    }
#elif KIND == 6
    const u32 half = word / 16, at = word % 16 * 2;
    const u32 a = pair_at(block + half * 64 + at), b = pair_at(block + half * 64 + 32 + at);
    const u32 top = pair_at(block + 128 + half * 32 + at);
    const float d = fp16_value(static_cast<u16>(pair_at(block + 208)));
    for (u32 g = 0; g < 4; ++g) {
        const float scale = d * signed_byte(block[192 + half * 8 + 2 * g + at / 16]);
        const u32 low = (g & 1 ? b : a) >> (g & 2 ? 4 : 0), high = top >> 2 * g;
        for (u32 i = 0; i < 2; ++i) {
            const int code = static_cast<int>((low >> 8 * i & 15) | (high >> 8 * i & 3) << 4) - 32;
            value[2 * g + i] = scale * code;
        }
    }
#else
    const u32 chunk = word / 8;
    u32 q = four_at(block + BLOCK_BYTES - 128 + word * 4);
    u32 low = q & 0x0f0f0f0f, high = q >> 4 & 0x0f0f0f0f;
#if KIND == 5
    const u32 top = four_at(block + 16 + word % 8 * 4) >> 2 * chunk;
    low |= (top & 0x01010101) << 4;
    high |= (top >> 1 & 0x01010101) << 4;
#endif
    float s, m, t, n;
    scale_and_min(block, 2 * chunk, s, m);
    scale_and_min(block, 2 * chunk + 1, t, n);
    for (u32 i = 0; i < 4; ++i) {
        value[i] = s * (low >> 8 * i & 31) - m;
        value[4 + i] = t * (high >> 8 * i & 31) - n;
    }
#endif
}

// Where value i of a word stands in its block.
__device__ __forceinline__ u32 place_of(u32 word, u32 i) {
#if KIND == 8
    return word * 8 + i;
#elif KIND == 6
    return word / 16 * 128 + word % 16 * 2 + i % 2 + i / 2 * 32;
#else
    return word / 8 * 64 + word % 8 * 4 + i % 4 + i / 4 * 32;
#endif
}

// Blocks -> half, in float32 rounded once. A word of eight values a thread.
extern "C" __global__ void __launch_bounds__(THREADS)
blocks_to_half(const u8* weight, u16* out, u64 words) {
    for (u64 i = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; i < words;
         i += static_cast<u64>(gridDim.x) * THREADS) {
        const u64 block = i / BLOCK_WORDS;
        const u32 word = static_cast<u32>(i % BLOCK_WORDS);
        float value[8];
        word_values(weight + block * BLOCK_BYTES, word, value);
        u16* target = out + block * BLOCK_WORDS * 8;
        for (u32 k = 0; k < 8; k += 2) {  // pairs stand side by side in every type
            const u32 pair = half_bits(value[k]) | half_bits(value[k + 1]) << 16;
            *reinterpret_cast<u32*>(target + place_of(word, k)) = pair;
        }
    }
}

// out[n] = sum_k token[k] * weight[n, k]: a warp takes ROWS rows, a lane a word of each at a time.
extern "C" __global__ void __launch_bounds__(THREADS)
blocks_times_token(const u16* token, const u8* weight, float* out, u32 rows, u32 width) {
    alignas(16) __shared__ float staged[CHUNK];
    const u32 lane = threadIdx.x & 31, first = (blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5)) * ROWS;
    float sums[ROWS] = {};
    for (u32 start = 0; start < width; start += CHUNK) {  // CHUNK is of whole blocks
        stage(token, staged, start, width);
        for (u32 at = lane; at < CHUNK / 8 && start + at * 8 < width; at += 32) {
            const u32 block = at / BLOCK_WORDS, word = at % BLOCK_WORDS;
            for (u32 r = 0; r < ROWS; ++r) {
                if (first + r >= rows) continue;
                const u64 place = static_cast<u64>(first + r) * (width / (8 * BLOCK_WORDS)) + start / (8 * BLOCK_WORDS) + block;
                float value[8];
                word_values(weight + place * BLOCK_BYTES, word, value);
                for (u32 k = 0; k < 8; ++k) sums[r] += value[k] * staged[block * BLOCK_WORDS * 8 + place_of(word, k)];
            }
        }
    }
    for (u32 r = 0; r < ROWS; ++r) {
        const float sum = warp_sum(sums[r]);
        if (lane == 0 && first + r < rows) out[first + r] = sum;
    }
}

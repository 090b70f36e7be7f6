// What the kernels of the fixed-length lossless form (quant/fixed_length.py) share.
//
// Eight lanes work on a tile of 256 weights, 32 consecutive weights a lane: two 16-byte loads of sign and mantissa
// bytes and the words A, B, C of the index. A byte permute turns four indices into four exponents. Escaped weights come
// out of that as stand-ins below 2^-126 and are put right from a list of (column in the tile, bf16) kept per tile.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define TILE 256
#define LANES 8                       // that share a tile
#define LANE_WEIGHTS (TILE / LANES)
#define TILE_WORDS 24                 // of the index
#define ALL_LANES 0xffffffffu

// What is done to the activations first.
#define PLAIN 0
#define RMS_NORM 1
#define SWIGLU 2

// Mirrors `_WEIGHT` in fixed_length.py.
struct Weight {
    const uint4* signs;         // [rows * tiles * 16]
    const u32* index;           // [rows * tiles * TILE_WORDS]
    const u32* tile_starts;     // [rows * tiles + 1]
    const u16* escape_values;   // bf16 bits
    const u8* escape_columns;
    const u8* exponents;        // [8], entry 7 is 0
    u32 rows, cols, tiles;      // tiles of a row
};

struct ExponentTables {
    u32 high0, high1, low0, low1;  // for 8 indices: the exponent's share of a bf16's high and of its low byte
};

__device__ __forceinline__ ExponentTables load_tables(const u8* exponents) {
    const uint2 e = __ldg(reinterpret_cast<const uint2*>(exponents));
    const ExponentTables t = {(e.x >> 1) & 0x7f7f7f7fu, (e.y >> 1) & 0x7f7f7f7fu, (e.x << 7) & 0x80808080u,
                              (e.y << 7) & 0x80808080u};
    return t;
}

// The 32 weights of a lane as stored.
struct Lane {
    uint4 signs0, signs1;
    u32 a, b, c;
};

__device__ __forceinline__ Lane load_lane(const Weight& w, u64 tile, u32 lane) {
    const uint4* signs = w.signs + tile * (TILE / 16) + lane * 2;
    const u32* index = w.index + tile * TILE_WORDS + lane * 3;
    const Lane result = {__ldcs(signs), __ldcs(signs + 1), __ldcs(index), __ldcs(index + 1), __ldcs(index + 2)};
    return result;
}

// Indices of the lane's weights 8i .. 8i+7, one a nibble.
__device__ __forceinline__ u32 indices(const Lane& lane, int i) {
    if (i == 0) return lane.a & 0x77777777u;
    if (i == 1) return lane.b & 0x77777777u;
    if (i == 2) return lane.c & 0x77777777u;
    return ((lane.a >> 3) & 0x11111111u) | ((lane.b >> 2) & 0x22222222u) | ((lane.c >> 1) & 0x44444444u);
}

__device__ __forceinline__ u32 sign_word(const Lane& lane, int i) {
    const uint4& s = i < 4 ? lane.signs0 : lane.signs1;
    return (i & 3) == 0 ? s.x : (i & 3) == 1 ? s.y : (i & 3) == 2 ? s.z : s.w;
}

// Weights 4i .. 4i+3 of a lane as two words of two bf16; `selector` has their indices in its low four nibbles.
__device__ __forceinline__ uint2 four_weights(u32 signs, u32 selector, const ExponentTables& t) {
    const u32 high = (signs & 0x80808080u) | __byte_perm(t.high0, t.high1, selector);
    const u32 low = (signs & 0x7f7f7f7fu) | __byte_perm(t.low0, t.low1, selector);
    return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
}

__device__ __forceinline__ u32 bf16_bits(float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40;  // stays NaN
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// `scratch`: a float a warp.
__device__ __forceinline__ float sum_over_block(float value, float* scratch) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
    __syncthreads();
    float total = 0;
    for (u32 i = 0; i < blockDim.x / 32; ++i) total += scratch[i];
    return total;
}

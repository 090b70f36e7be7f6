// Runs a kernel of clusters (`kernels/bulk.cuh`) on the CPU: every thread of a cluster is a thread of the system, blocks
// have memory of their own, and one cluster runs at a time. Products read their operands as late as they may: when they
// are waited for. Whoever waits for what never comes ends the process.
#pragma once
#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define CUDA_EMULATION 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __shared__ static

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index3 { unsigned x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __uint_as_float(unsigned bits) { float v; std::memcpy(&v, &bits, 4); return v; }
inline unsigned __float_as_uint(float v) { unsigned bits; std::memcpy(&bits, &v, 4); return bits; }
template <class T> T __ldg(const T* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T)) std::fprintf(stderr, "unaligned\n"), std::abort();
    return *p;
}
inline unsigned fp16_bits(float value) { _Float16 h = static_cast<_Float16>(value); std::uint16_t b; std::memcpy(&b, &h, 2); return b; }
inline float fp16_value(unsigned short bits) { _Float16 h; std::memcpy(&h, &bits, 2); return static_cast<float>(h); }

thread_local Index3 threadIdx, blockIdx;
inline Index3 gridDim, blockDim;

namespace emulation {

constexpr unsigned PAIR = 2, THREADS = 384, SHARED = 232448, MOST_SECONDS = 60;
alignas(1024) inline unsigned char memory[PAIR][SHARED + 1024];
constexpr unsigned SKEW = 16;  // where a block's memory begins: at no multiple of 1024

struct Barrier {
    unsigned arrivals = 0, pending = 0, phase = 0;
    long bytes = 0;
};
inline Barrier barriers[PAIR][SHARED / 8];
inline std::mutex lock;
inline std::condition_variable over[PAIR];
inline std::barrier<>* all;
struct Warp {
    std::barrier<> meet{32};
    unsigned words[2][32];  // in turn: whoever writes one has met those who read it
};
inline std::vector<Warp>* warps;
inline std::vector<std::barrier<>*>* warpgroups;
thread_local unsigned rank, turn;

inline void fail(const char* what) {
    std::fprintf(stderr, "%s: block %u of the cluster, thread %u\n", what, rank, threadIdx.x);
    std::_Exit(3);
}
inline unsigned place(const void* pointer) { return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - memory[rank]); }
inline void settle(Barrier& b, unsigned of) {
    if (b.pending == 0 && b.bytes == 0) b.pending = b.arrivals, b.phase ^= 1, over[of].notify_all();
}

// What a map describes: rows of bytes, in boxes of 128 by 128 that are swizzled by 128.
struct Map {
    const unsigned char* base;
    std::uint64_t columns, rows;
};

struct Product {
    std::uint64_t a, b;
    bool adds;
};
thread_local std::vector<std::vector<Product>> groups;
thread_local std::vector<Product> open;

// The 32 bytes of a row, in the two pieces of 16 that swizzling moves.
inline void read_row(signed char (&to)[32], std::uint64_t descriptor, unsigned row) {
    const unsigned start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1) fail("not swizzled by 128");
    for (unsigned piece = 0; piece < 32; piece += 16) {
        const unsigned at = start + row / 8 * stride + row % 8 * 128 + piece;
        std::memcpy(to + piece, memory[rank] + (at ^ (at >> 7 & 7) << 4), 16);
    }
}

// Sums of products of shorts, which g++ adds up many at a time: those of signed chars it took one by one.
__attribute__((optimize("O3"))) inline void compute(int (&d)[128], const Product& p) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    signed char read[32];
    short rows[2][32], column[32];
    for (unsigned i = 0; i < 2; ++i) {
        read_row(read, p.a, 16 * warp + lane / 4 + 8 * i);
        for (unsigned k = 0; k < 32; ++k) rows[i][k] = read[k];
    }
    for (unsigned j = 0; j < 64; ++j) {
        read_row(read, p.b, 8 * (j / 2) + 2 * (lane % 4) + j % 2);
        for (unsigned k = 0; k < 32; ++k) column[k] = read[k];
        for (unsigned i = 0; i < 2; ++i) {
            int& sum = d[4 * (j / 2) + 2 * i + j % 2];
            int added = 0;
            for (unsigned k = 0; k < 32; ++k) added += rows[i][k] * column[k];
            sum = p.adds ? sum + added : added;
        }
    }
}

}  // namespace emulation

inline unsigned __shfl_xor_sync(unsigned, unsigned value, unsigned mask) {
    auto& warp = (*emulation::warps)[emulation::rank * (emulation::THREADS / 32) + threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32;
    auto& words = warp.words[emulation::turn ^= 1];
    words[lane] = value;
    warp.meet.arrive_and_wait();
    return words[lane ^ mask];
}

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
struct TensorMap;

inline u32 shared_address(const void* pointer) { return emulation::place(pointer); }
inline u32 cluster_rank() { return emulation::rank; }
inline void cluster_sync() { emulation::all->arrive_and_wait(); }
inline emulation::Barrier& barrier_of(u64* barrier, u32 rank) { return emulation::barriers[rank][emulation::place(barrier) / 8]; }
inline void barrier_init(u64* barrier, u32 arrivals) { barrier_of(barrier, emulation::rank) = {arrivals, arrivals, 0, 0}; }
inline void fence_barrier_init() {}
inline void barrier_expect(u64* barrier, u32 bytes) {
    std::lock_guard held(emulation::lock);
    auto& b = barrier_of(barrier, emulation::rank);
    if (b.pending == 0) emulation::fail("an arrival too many");
    b.bytes += bytes, --b.pending;
    emulation::settle(b, emulation::rank);
}
inline void barrier_arrive(u64* barrier, u32 rank) {
    std::lock_guard held(emulation::lock);
    auto& b = barrier_of(barrier, rank);
    if (b.pending == 0) emulation::fail("an arrival too many");
    --b.pending;
    emulation::settle(b, rank);
}
inline void barrier_wait(u64* barrier, u32 parity) {
    std::unique_lock held(emulation::lock);
    const auto& b = barrier_of(barrier, emulation::rank);
    const auto most = std::chrono::seconds(emulation::MOST_SECONDS);
    if (!emulation::over[emulation::rank].wait_for(held, most, [&] { return b.phase != parity; })) emulation::fail("waits for ever");
}
inline void load_to(unsigned rank, void* to, const TensorMap* map, u32 column, u32 row, u64* barrier) {
    const auto& from = *reinterpret_cast<const emulation::Map*>(map);
    std::lock_guard held(emulation::lock);
    const unsigned at = emulation::place(to);
    if (at % 1024) emulation::fail("a box that does not begin at a multiple of 1024");
    for (unsigned r = 0; r < 128; ++r)
        for (unsigned c = 0; c < 128; c += 16) {  // pieces that swizzling moves whole, while everybody waits for the lock
            const bool any = row + r < from.rows && column + c < from.columns;
            const std::uint64_t inside = any ? std::min<std::uint64_t>(16, from.columns - column - c) : 0;
            unsigned char* const piece = emulation::memory[rank] + at + r * 128 + (c / 16 ^ r % 8) * 16;
            if (inside) std::memcpy(piece, from.base + (row + r) * from.columns + column + c, inside);
            std::memset(piece + inside, 0, 16 - inside);
        }
    auto& b = barrier_of(barrier, rank);
    b.bytes -= 128 * 128;
    emulation::settle(b, rank);
}
inline void bulk_load(void* to, const TensorMap* map, u32 column, u32 row, u64* barrier) {
    load_to(emulation::rank, to, map, column, row, barrier);
}
inline void bulk_load_both(void* to, const TensorMap* map, u32 column, u32 row, u64* barrier) {
    for (unsigned rank = 0; rank < emulation::PAIR; ++rank) load_to(rank, to, map, column, row, barrier);
}
inline void fewer_registers() {}
inline void more_registers() {}
inline void products_begin(int (&)[128]) {}
inline void product(int (&)[128], u64 a, u64 b, u32 adds) { emulation::open.push_back({a, b, adds != 0}); }
inline void products_commit() { emulation::groups.push_back(std::move(emulation::open)), emulation::open.clear(); }
template <int LEFT> void products_wait(int (&d)[128]) {
    while (emulation::groups.size() > LEFT) {
        for (const auto& p : emulation::groups.front()) emulation::compute(d, p);
        emulation::groups.erase(emulation::groups.begin());
    }
    // A product is the whole warpgroup's, and over for all of it at once.
    (*emulation::warpgroups)[emulation::rank * (emulation::THREADS / 128) + threadIdx.x / 128]->arrive_and_wait();
}
inline u32 half_pair(float low, float high);
inline float silu_of(float x) { return x / (1.0f + std::exp(-x)); }

namespace emulation {

template <class Run> void run_cluster(unsigned first_block, Run run) {
    std::barrier<> meet(PAIR * THREADS);
    std::vector<Warp> mine(PAIR * THREADS / 32);
    std::vector<std::barrier<>*> groups_of_warps;
    for (unsigned i = 0; i < PAIR * THREADS / 128; ++i) groups_of_warps.push_back(new std::barrier<>(128));
    all = &meet, warps = &mine, warpgroups = &groups_of_warps;
    std::memset(memory, 0xa5, sizeof memory);
    std::vector<std::thread> threads;
    for (unsigned r = 0; r < PAIR; ++r)
        for (unsigned t = 0; t < THREADS; ++t)
            threads.emplace_back([=] {
                rank = r, threadIdx = {t, 0, 0}, blockIdx = {first_block + r, 0, 0};
                run(memory[r] + SKEW);
            });
    for (auto& thread : threads) thread.join();
    for (auto* one : groups_of_warps) delete one;
}

}  // namespace emulation

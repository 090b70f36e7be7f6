// Runs a kernel of clusters (`kernels/bulk.cuh`) on the CPU: every thread of a cluster is a coroutine, blocks have memory
// of their own, and one cluster runs at a time. Whose turn it is changes where somebody waits, in an order that
// is always another. Bulk copies arrive at once, or when nobody goes on without. Products read their operands as late as
// they may: when they are waited for. Whoever waits for what never comes ends the process.
#pragma once
#include <setjmp.h>
#include <time.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
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

inline Index3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {

constexpr unsigned PAIR = 2, THREADS = 384, SHARED = 232448;
constexpr std::size_t STACK = 64 * 1024;
alignas(1024) inline unsigned char memory[PAIR][SHARED + 1024];
constexpr unsigned SKEW = 16;  // where a block's memory begins: at no multiple of 1024

struct Barrier {
    unsigned arrivals = 0, pending = 0, phase = 0;
    long bytes = 0;
};
inline Barrier barriers[PAIR][SHARED / 8];
struct Meeting {
    unsigned expected, arrived = 0, generation = 0;
};
inline Meeting all{PAIR * THREADS}, warpgroups[PAIR * THREADS / 128];
struct Warp {
    Meeting meeting{32};
    unsigned words[2][32];  // in turn: whoever writes one has met those who read it
};
inline Warp warps[PAIR * THREADS / 32];

struct Product {
    std::uint64_t a, b;
    bool adds;
};
struct Coroutine {
    ucontext_t context;  // only its first turn begins here: switching by jumps makes no system call
    jmp_buf jump;
    bool started, done;
    unsigned rank, thread, turn;
    std::vector<std::vector<Product>> groups;
    std::vector<Product> open;
};
inline Coroutine coroutines[PAIR * THREADS];
inline std::unique_ptr<char[]> coroutine_stacks;
inline Coroutine* self;
inline unsigned rank;
inline jmp_buf to_whose_turn_it_is;
inline bool somebody_went_on;
inline void (*of_everybody)(const void*);
inline const void* given_to_everybody;

__attribute__((noinline)) inline void let_others() {
    if (_setjmp(self->jump) == 0) _longjmp(to_whose_turn_it_is, 1);
}
inline void meet(Meeting& meeting) {
    const unsigned generation = meeting.generation;
    if (++meeting.arrived == meeting.expected) meeting.arrived = 0, ++meeting.generation, somebody_went_on = true;
    while (meeting.generation == generation) let_others();
}

inline void fail(const char* what) {
    std::fprintf(stderr, "%s: block %u of the cluster, thread %u\n", what, rank, threadIdx.x);
    std::_Exit(3);
}
inline unsigned place(const void* pointer) { return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - memory[rank]); }
inline void settle(Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) b.pending = b.arrivals, b.phase ^= 1, somebody_went_on = true;
}

// What a map describes: rows of bytes, in boxes of 128 by 128 that are swizzled by 128.
struct Map {
    const unsigned char* base;
    std::uint64_t columns, rows;
};

struct Copy {
    Map from;
    unsigned char* to;
    unsigned column, row;
    Barrier* barrier;
};
inline std::vector<Copy> copies;  // those that have begun and are not there yet

inline void land(std::size_t which) {
    const Copy copy = copies[which];
    copies.erase(copies.begin() + which);
    for (unsigned r = 0; r < 128; ++r)
        for (unsigned c = 0; c < 128; c += 16) {  // pieces that swizzling moves whole
            const bool any = copy.row + r < copy.from.rows && copy.column + c < copy.from.columns;
            const std::uint64_t inside = any ? std::min<std::uint64_t>(16, copy.from.columns - copy.column - c) : 0;
            unsigned char* const piece = copy.to + r * 128 + (c / 16 ^ r % 8) * 16;
            if (inside) std::memcpy(piece, copy.from.base + (copy.row + r) * copy.from.columns + copy.column + c, inside);
            std::memset(piece + inside, 0, 16 - inside);
        }
    copy.barrier->bytes -= 128 * 128;
    settle(*copy.barrier);
}

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
    auto& warp = emulation::warps[emulation::rank * (emulation::THREADS / 32) + threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32;
    auto& words = warp.words[emulation::self->turn ^= 1];
    words[lane] = value;
    emulation::meet(warp.meeting);
    return words[lane ^ mask];
}

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
struct TensorMap;

inline u32 shared_address(const void* pointer) { return emulation::place(pointer); }
inline u32 cluster_rank() { return emulation::rank; }
inline void cluster_sync() { emulation::meet(emulation::all); }
inline emulation::Barrier& barrier_of(u64* barrier, u32 rank) { return emulation::barriers[rank][emulation::place(barrier) / 8]; }
inline void barrier_init(u64* barrier, u32 arrivals) { barrier_of(barrier, emulation::rank) = {arrivals, arrivals, 0, 0}; }
inline void fence_barrier_init() {}
inline void barrier_expect(u64* barrier, u32 bytes) {
    auto& b = barrier_of(barrier, emulation::rank);
    if (b.pending == 0) emulation::fail("an arrival too many");
    b.bytes += bytes, --b.pending;
    emulation::settle(b);
}
inline void barrier_arrive(u64* barrier, u32 rank) {
    auto& b = barrier_of(barrier, rank);
    if (b.pending == 0) emulation::fail("an arrival too many");
    --b.pending;
    emulation::settle(b);
}
inline void barrier_wait(u64* barrier, u32 parity) {
    const auto& b = barrier_of(barrier, emulation::rank);
    while (b.phase == parity) emulation::let_others();
}
inline void load_to(unsigned rank, void* to, const TensorMap* map, u32 column, u32 row, u64* barrier) {
    const unsigned at = emulation::place(to);
    if (at % 1024) emulation::fail("a box that does not begin at a multiple of 1024");
    const auto& from = *reinterpret_cast<const emulation::Map*>(map);
    emulation::copies.push_back({from, emulation::memory[rank] + at, column, row, &barrier_of(barrier, rank)});
    if (std::rand() % 2) emulation::land(emulation::copies.size() - 1);
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
inline void product(int (&)[128], u64 a, u64 b, u32 adds) { emulation::self->open.push_back({a, b, adds != 0}); }
inline void products_commit() {
    emulation::self->groups.push_back(std::move(emulation::self->open)), emulation::self->open.clear();
}
template <int LEFT> void products_wait(int (&d)[128]) {
    auto& groups = emulation::self->groups;
    while (groups.size() > LEFT) {
        for (const auto& p : groups.front()) emulation::compute(d, p);
        groups.erase(groups.begin());
    }
    // A product is the whole warpgroup's, and over for all of it at once.
    emulation::meet(emulation::warpgroups[emulation::rank * (emulation::THREADS / 128) + threadIdx.x / 128]);
}
inline u32 half_pair(float low, float high);
inline float silu_of(float x) { return x / (1.0f + std::exp(-x)); }

namespace emulation {

inline void begin_and_end() {
    of_everybody(given_to_everybody);
    self->done = somebody_went_on = true;
    let_others();
}

inline void take_turn(Coroutine& one, unsigned first_block) {
    self = &one, rank = one.rank, threadIdx = {one.thread, 0, 0}, blockIdx = {first_block + one.rank, 0, 0};
    if (_setjmp(to_whose_turn_it_is) != 0) return;
    if (one.started) _longjmp(one.jump, 1);
    one.started = true;
    setcontext(&one.context);
}

template <class Run> void run_cluster(unsigned first_block, Run run) {
    of_everybody = [](const void* given) { (*static_cast<const Run*>(given))(memory[rank] + SKEW); };
    given_to_everybody = &run;
    all = {PAIR * THREADS};
    for (auto& warp : warps) warp.meeting = {32};
    for (auto& warpgroup : warpgroups) warpgroup = {128};
    std::memset(memory, 0xa5, sizeof memory);
    if (!coroutine_stacks) coroutine_stacks.reset(new char[PAIR * THREADS * STACK]), std::srand(time(nullptr));
    std::vector<Coroutine*> left;
    for (unsigned i = 0; i < PAIR * THREADS; ++i) {
        Coroutine& one = coroutines[i];
        one.started = one.done = false, one.rank = i / THREADS, one.thread = i % THREADS, one.turn = 0;
        getcontext(&one.context);
        one.context.uc_stack.ss_sp = coroutine_stacks.get() + i * STACK;
        one.context.uc_stack.ss_size = STACK;
        one.context.uc_link = nullptr;
        makecontext(&one.context, begin_and_end, 0);
        left.push_back(&one);
    }
    while (!left.empty()) {
        somebody_went_on = false;
        for (std::size_t i = left.size(); i > 1; --i) std::swap(left[i - 1], left[std::rand() % i]);
        for (Coroutine* one : left) take_turn(*one, first_block);
        left.erase(std::remove_if(left.begin(), left.end(), [](Coroutine* one) { return one->done; }), left.end());
        if (somebody_went_on) continue;
        if (copies.empty()) fail("waits for ever");
        land(std::rand() % copies.size());
    }
}

}  // namespace emulation

// Runs a CUDA C++ kernel on the CPU, compiled by g++ as it is: every thread of a block is a coroutine, so barriers and
// warp exchanges mean what they mean on the GPU. Vector accesses check their alignment. One block runs at a time;
// threads take turns in ascending or descending order, which a missing barrier does not survive both of.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time; the harness rewrites `extern __shared__` to `extern`
#define __align__(n) alignas(n)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index3 { unsigned x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

constexpr std::size_t STACK = 64 * 1024;

struct Thread {
    ucontext_t context;  // only its first turn begins here: switching by jumps makes no system call
    jmp_buf jump;
    bool started, done;
    unsigned exchanges;
};

struct Barrier {
    unsigned arrived = 0, generation = 0;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<char> stacks;
    std::vector<std::uint64_t> lanes[2];  // an exchange word a thread, in turn: whoever writes one met those who read it
    std::vector<Barrier> warps;
    Barrier all;
    bool progress;
    jmp_buf scheduler;
    unsigned current;
};

inline Block block;
inline Index3 thread_index, block_index, grid_size, block_size;
inline void (*body)();

inline void turn() {
    if (_setjmp(block.threads[block.current].jump) == 0) _longjmp(block.scheduler, 1);
}

inline void resume() {
    Thread& thread = block.threads[block.current];
    if (_setjmp(block.scheduler) != 0) return;
    if (thread.started) _longjmp(thread.jump, 1);
    thread.started = true;
    setcontext(&thread.context);
}

inline void wait(Barrier& barrier, unsigned expected) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        block.progress = true;
    }
    while (barrier.generation == generation) turn();
}

inline void wait_warp() { wait(block.warps[thread_index.x / 32], 32); }
inline void wait_block() { wait(block.all, block_size.x); }

inline void entry() {
    for (;;) {  // a turn after its end begins with the next block: making a context takes longer than most bodies do
        body();
        block.threads[block.current].done = true;
        turn();
    }
}

inline void make_threads(unsigned threads) {
    block.threads.resize(threads);
    block.stacks.resize(threads * STACK);
    for (unsigned t = 0; t < threads; ++t) {
        Thread& thread = block.threads[t];
        thread.started = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = block.stacks.data() + t * STACK;
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, entry, 0);
    }
}

inline void run_block(unsigned threads, bool descending) {
    if (threads > block.threads.size()) make_threads(threads);
    for (auto& lanes : block.lanes) lanes.assign(threads, 0xdeadbeefdeadbeefull);
    block.warps.assign((threads + 31) / 32, Barrier{});
    block.all = Barrier{};
    for (unsigned t = 0; t < threads; ++t) block.threads[t].done = false, block.threads[t].exchanges = 0;
    for (unsigned left = threads; left != 0;) {
        block.progress = false;
        for (unsigned i = 0; i < threads; ++i) {
            const unsigned t = descending ? threads - 1 - i : i;
            if (block.threads[t].done) continue;
            block.current = t;
            thread_index = {t, 0, 0};
            resume();
            if (block.threads[t].done) {
                --left;
                block.progress = true;
            }
        }
        if (!block.progress) {
            std::fprintf(stderr, "deadlock: the threads of a block wait at different barriers\n");
            std::abort();
        }
    }
}

template <class... A, std::size_t... I>
void launch(void (*kernel)(A...), void** arguments, unsigned grid_x, unsigned grid_y, unsigned threads, bool descending,
            std::index_sequence<I...>) {
    static void (*called)(A...);
    static std::tuple<A...>* values;
    std::tuple<A...> unpacked(*static_cast<A*>(arguments[I])...);
    called = kernel;
    values = &unpacked;
    body = [] { std::apply(called, *values); };
    grid_size = {grid_x, grid_y, 1};
    block_size = {threads, 1, 1};
    for (unsigned y = 0; y < grid_y; ++y)
        for (unsigned x = 0; x < grid_x; ++x) {
            block_index = {x, y, 0};
            run_block(threads, descending);
        }
}

template <class... A>
void launch(void (*kernel)(A...), void** arguments, unsigned grid_x, unsigned grid_y, unsigned threads, int descending) {
    launch(kernel, arguments, grid_x, grid_y, threads, descending != 0, std::index_sequence_for<A...>{});
}

template <class T>
T exchange(T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "an exchange word is 8 bytes");
    const unsigned warp = thread_index.x & ~31u, self = thread_index.x;
    std::vector<std::uint64_t>& lanes = block.lanes[++block.threads[self].exchanges % 2];
    std::memcpy(&lanes[self], &value, sizeof(T));
    wait_warp();
    T result;
    std::memcpy(&result, &lanes[warp + source], sizeof(T));
    return result;
}

template <class T>
const T& aligned(const T* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % alignof(T) != 0) {
        std::fprintf(stderr, "misaligned access of %zu bytes\n", sizeof(T));
        std::abort();
    }
    return *address;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size
#define blockDim emulation::block_size
#define EMULATED_KERNEL(name)                                                                                      \
    extern "C" void emulate_##name(void** arguments, unsigned x, unsigned y, unsigned threads, int descending) { \
        emulation::launch(name, arguments, x, y, threads, descending);                                            \
    }

inline void __syncthreads() { emulation::wait_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::wait_warp(); }

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance, unsigned width = 32) {
    const unsigned lane = emulation::thread_index.x & 31, first = lane & ~(width - 1);
    return emulation::exchange(value, lane < first + distance ? lane : lane - distance);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance, unsigned width = 32) {
    const unsigned lane = emulation::thread_index.x & 31, last = lane | (width - 1);
    return emulation::exchange(value, lane + distance > last ? lane : lane + distance);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask, unsigned = 32) {
    return emulation::exchange(value, (emulation::thread_index.x & 31) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned source, unsigned width = 32) {
    return emulation::exchange(value, (emulation::thread_index.x & 31 & ~(width - 1)) + (source & (width - 1)));
}

template <class T>
T __ldg(const T* address) { return emulation::aligned(address); }
template <class T>
T __ldcs(const T* address) { return emulation::aligned(address); }
template <class T>
T __ldcg(const T* address) { return emulation::aligned(address); }

inline unsigned atomicOr(unsigned* address, unsigned bits) {
    const unsigned old = *address;
    *address |= bits;
    return old;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
    const unsigned old = *address;
    *address += value;
    return old;
}
inline void __threadfence() {}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const std::uint64_t bytes = (static_cast<std::uint64_t>(y) << 32) | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> (4 * i) & 15;
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7))) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((((static_cast<std::uint64_t>(high) << 32) | low) << (shift & 31)) >> 32);
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float fp16_value(std::uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return half;
}
inline unsigned fp16_bits(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    std::uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

inline void let_next_kernel_start() {}
inline void wait_for_last_kernel() {}

// What packed weights have in common: made halves for a library's matmul, or multiplied with one token, in fp16, as they
// are read.

#include "rotated_head.cuh"

#define THREADS 256
#define ROWS 2      // of the weight that a warp works on at a time
#define CHUNK 4096  // values of the token that are in shared memory at a time

__device__ __forceinline__ void stage(const u16* token, float* staged, u32 start, u32 width) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < CHUNK && start + i < width; i += THREADS) staged[i] = fp16_value(token[start + i]);
    __syncthreads();
}

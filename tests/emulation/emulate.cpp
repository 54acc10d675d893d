// Runs a CUDA source on the CPU, for tests on machines without a GPU: one thread a CUDA thread of a block, blocks one
// after another, shared memory as static arrays, __syncthreads as a barrier. Compiled with -DSOURCE="file.cu".
#include <immintrin.h>

#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

typedef long long int64;
struct Index { unsigned int x, y, z; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim, blockDim;
static std::barrier<>* block_barrier;

#define EMULATED
#define DEVICE static inline
#define __global__
#define __shared__ static
#define __launch_bounds__(n)
static void __syncthreads() { block_barrier->arrive_and_wait(); }
static int64 min(int64 a, int64 b) { return a < b ? a : b; }
static float exp2_approximate(float x) { return exp2f(x); }
static float half_to_float(unsigned short x) { return _cvtsh_ss(x); }
static unsigned short float_to_half(float x) { return _cvtss_sh(x, 0); }
static unsigned int bits(float x) { unsigned int b; memcpy(&b, &x, 4); return b; }
static float from_bits(unsigned int b) { float x; memcpy(&x, &b, 4); return x; }

#include SOURCE

template <class... P, size_t... I>
static void run(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    std::barrier<> barrier(blockDim.x);
    block_barrier = &barrier;
    std::vector<std::thread> threads;
    for (unsigned int lane = 0; lane < blockDim.x; ++lane)
        threads.emplace_back([=] {
            threadIdx = {lane, 0, 0};
            for (unsigned int z = 0; z < gridDim.z; ++z)
                for (unsigned int y = 0; y < gridDim.y; ++y)
                    for (unsigned int x = 0; x < gridDim.x; ++x) {
                        blockIdx = {x, y, z};
                        kernel(*(P*)arguments[I]...);
                        __syncthreads();
                    }
        });
    for (auto& thread : threads) thread.join();
}

template <class... P>
static void launch_kernel(void (*kernel)(P...), void** arguments) {
    run(kernel, arguments, std::index_sequence_for<P...>());
}

extern "C" int launch(const char* name, int gx, int gy, int gz, int threads, void** arguments) {
    gridDim = {(unsigned)gx, (unsigned)gy, (unsigned)gz};
    blockDim = {(unsigned)threads, 1, 1};
#define KERNEL(k) if (!strcmp(name, #k)) { launch_kernel(k, arguments); return 0; }
    KERNELS
    return 1;
}

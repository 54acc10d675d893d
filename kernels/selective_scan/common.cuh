// What the CUDA sources share: types, conversions, exp2, softplus, the way over chunks. SCALAR is the type of the feature
// maps: 0 float, 1 half, 2 bfloat16; everything is computed in float.

#ifndef EMULATED  // tests run this file on a CPU and then supply these few functions themselves
typedef long long int64;
#define DEVICE __device__ __forceinline__

DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float half_to_float(unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

DEVICE unsigned short float_to_half(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

DEVICE unsigned int bits(float x) { return __float_as_uint(x); }
DEVICE float from_bits(unsigned int x) { return __uint_as_float(x); }
#endif

#if SCALAR == 0
typedef float scalar;
DEVICE float load(const scalar* p) { return *p; }
DEVICE scalar narrow(float x) { return x; }
#elif SCALAR == 1
typedef unsigned short scalar;
DEVICE float load(const scalar* p) { return half_to_float(*p); }
DEVICE scalar narrow(float x) { return float_to_half(x); }
#else
typedef unsigned short scalar;
DEVICE float load(const scalar* p) { return from_bits((unsigned int)*p << 16); }
DEVICE scalar narrow(float x) {  // round to nearest even; NaN stays NaN
    unsigned int b = bits(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return (scalar)((b >> 16) | 0x40u);
    return (scalar)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}
#endif

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// Turns what lone chunks end with into what chunks begin with: from the first chunk on or, `backwards`, from the last. One
// thread a state of an image: grid (ceil(channels N / blockDim), batch). ends [batch, chunks, channels, N], sums [batch,
// chunks, channels] of dt, A [channels, N].
DEVICE void carry_over(
    float* __restrict__ ends, const float* __restrict__ sums, const float* __restrict__ A, int64 channels, int64 chunks,
    bool backwards) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x, size = channels * N_STATES;
    if (i >= size) return;
    const float decay = A[i] * LOG2E;
    float carried = 0.0f;
    for (int64 c = 0; c < chunks; ++c) {
        const int64 at = blockIdx.y * chunks + (backwards ? chunks - 1 - c : c);
        const float own = ends[at * size + i];
        ends[at * size + i] = carried;
        carried = fmaf(exp2_approximate(decay * sums[at * channels + i / N_STATES]), carried, own);
    }
}

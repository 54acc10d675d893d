// The selective scan as a C programmer would write it first: the yardstick of the CPU kernels in bench/kernels.py.
// cc -O3 -march=native -ffast-math -fopenmp -shared -fPIC scan_loop.c -lm. B and C are [groups, L, N] here.
#include <math.h>
#include <stdlib.h>

void scan_loop(const float* u, const float* delta, const float* A, const float* B, const float* C, const float* D,
               const float* bias, float* y, long dim, long groups, long n, long length) {
#pragma omp parallel for schedule(static)
    for (long d = 0; d < dim; ++d) {
        const float *b = B + d / (dim / groups) * length * n, *c = C + d / (dim / groups) * length * n;
        float* restrict h = calloc(n, sizeof(float));
        for (long t = 0; t < length; ++t) {
            float dt = delta[d * length + t] + bias[d], value = u[d * length + t], sum = 0.0f;
            dt = dt > 20.0f ? dt : log1pf(expf(dt));
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < n; ++i) {
                h[i] = expf(dt * A[d * n + i]) * h[i] + dt * value * b[t * n + i];
                sum += c[t * n + i] * h[i];
            }
            y[d * length + t] = sum + D[d] * value;
        }
        free(h);
    }
}

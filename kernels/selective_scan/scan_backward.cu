// Gradients of the selective scan for NVIDIA GPUs. Compiled at run time by NVRTC: no headers but common.cuh.
//
// With h[t] = a[t] h[t-1] + dt[t] B[t] u[t], a[t] = exp(dt[t] A) and y[t] = C[t] h[t] + D u[t], the adjoint runs backwards:
//     g[t] = gy[t] C[t] + a[t+1] g[t+1],
// and what a chunk hands to the one before it, a[first] g[first], is  own + exp(A sum dt) * (what it was handed).  So, as in
// scan.cu, there are three launches:
//   1. `adjoint`: every chunk handed zero: what it hands on, and its sum of dt;
//   2. `carry_back` walks over the chunks from the last;
//   3. `scan_backward`: every chunk with what it is truly handed. It computes the states again from the one before the
//      chunk, which the forward pass kept: first the states before each tile of steps, then, tile by tile from the last, those
//      before each step. They are thread-local (128 / TILE + TILE times N numbers).
// One thread owns one channel, a block is one warp. B and C belong to all channels of a group: their gradients are summed
// over the channels of a block here, in a fixed order, and over blocks by the caller.
//
// Fixed when compiling: N_STATES, THREADS (channels of a block), CHUNK (steps between kept states), SCALAR.

#include "common.cuh"

#define TILE 16                  // steps brought into shared memory at a time; divides CHUNK
#define ROWS (2 * N_STATES)      // sums over the channels at each step: N for B, N for C
#define GROUP (THREADS > ROWS ? THREADS / ROWS : 1)  // steps whose sums are formed together, so that no thread idles

// Where a block is: grid (chunks, groups * tiles of THREADS channels, batch), as for `scan`.
struct Place {
    int64 group, first, channels, channel, slot, rows, BC, begin, end, dim;
    bool mine;
};

DEVICE Place locate(int64 groups, int64 width, int64 length) {
    const int64 tiles = (width + THREADS - 1) / THREADS, image = blockIdx.z;
    Place p;
    p.dim = groups * width;
    p.group = blockIdx.y / tiles;
    p.first = (blockIdx.y % tiles) * THREADS;
    p.channels = min((int64)THREADS, width - p.first);
    p.mine = threadIdx.x < p.channels;
    p.channel = p.group * width + p.first + (p.mine ? threadIdx.x : 0);
    p.slot = (image * gridDim.x + blockIdx.x) * p.dim + p.channel;
    p.rows = (image * p.dim + p.group * width + p.first) * length;
    p.BC = (image * groups + p.group) * N_STATES * length;
    p.begin = blockIdx.x * (int64)CHUNK;
    p.end = min(length, p.begin + CHUNK);
    return p;
}

// Brings rows [channels, steps] of a [batch, dim, L] tensor into tile[channel][step].
DEVICE void bring(float tile[THREADS][TILE + 1], const scalar* from, int64 channels, int64 length, int steps) {
    for (int i = threadIdx.x; i < channels * TILE; i += THREADS) {
        const int row = i / TILE, t = i % TILE;
        if (t < steps) tile[row][t] = load(from + row * length + t);
    }
}

// Brings [N, steps] of a [batch, groups, N, L] tensor into tile[step][n].
DEVICE void bring_states(float tile[TILE][N_STATES], const scalar* from, int64 length, int steps) {
    for (int i = threadIdx.x; i < N_STATES * TILE; i += THREADS) {
        const int n = i / TILE, t = i % TILE;
        if (t < steps) tile[t][n] = load(from + n * length + t);
    }
}

DEVICE float step_size(float raw, int64 positive) { return positive ? softplus(raw) : raw; }

// gy, delta [batch, dim, L]; A [dim, N]; C [batch, groups, N, L]; bias [dim] or null. handed [batch, chunks, dim, N]: what
// each chunk hands to the one before it if handed zero; sums [batch, chunks, dim] of dt.
extern "C" __global__ void __launch_bounds__(THREADS) adjoint(
    const scalar* __restrict__ gy, const scalar* __restrict__ delta, const float* __restrict__ A,
    const scalar* __restrict__ C, const float* __restrict__ bias, float* __restrict__ handed, float* __restrict__ sums,
    int64 groups, int64 width, int64 length, int64 positive) {
    __shared__ float gy_tile[THREADS][TILE + 1];
    __shared__ float dt_tile[THREADS][TILE + 1];
    __shared__ float C_tile[TILE][N_STATES];
    const Place p = locate(groups, width, length);
    const int lane = threadIdx.x;
    const float own_bias = bias ? bias[p.channel] : 0.0f;
    float decay[N_STATES], g[N_STATES], total = 0.0f;
#pragma unroll
    for (int n = 0; n < N_STATES; ++n) {
        decay[n] = A[p.channel * N_STATES + n] * LOG2E;
        g[n] = 0.0f;
    }
    for (int64 start = p.begin + (p.end - p.begin - 1) / TILE * TILE; start >= p.begin; start -= TILE) {
        const int steps = (int)min((int64)TILE, p.end - start);
        __syncthreads();
        bring(gy_tile, gy + p.rows + start, p.channels, length, steps);
        bring(dt_tile, delta + p.rows + start, p.channels, length, steps);
        bring_states(C_tile, C + p.BC + start, length, steps);
        __syncthreads();
        if (!p.mine) continue;
        for (int t = steps - 1; t >= 0; --t) {
            const float dt = step_size(dt_tile[lane][t] + own_bias, positive), slope = gy_tile[lane][t];
            total += dt;
#pragma unroll
            for (int n = 0; n < N_STATES; ++n)
                g[n] = exp2_approximate(dt * decay[n]) * fmaf(slope, C_tile[t][n], g[n]);
        }
    }
    if (!p.mine) return;
    sums[p.slot] = total;
    for (int n = 0; n < N_STATES; ++n) handed[p.slot * N_STATES + n] = g[n];
}

// Turns what lone chunks hand on into what chunks are handed.
extern "C" __global__ void carry_back(
    float* __restrict__ handed, const float* __restrict__ sums, const float* __restrict__ A, int64 channels,
    int64 chunks) {
    carry_over(handed, sums, A, channels, chunks, true);
}

// gy, u, delta [batch, dim, L]; A [dim, N]; B, C [batch, groups, N, L]; D, bias [dim] or null; states [batch, chunks, dim,
// N] before each chunk; handed as above. Gradients: of u and delta [batch, dim, L]; of A [batch, chunks, dim, N], D and
// bias [batch, chunks, dim], to be summed; of B and C [tiles, batch, groups, N, L], to be summed over the tiles.
extern "C" __global__ void __launch_bounds__(THREADS) scan_backward(
    const scalar* __restrict__ gy, const scalar* __restrict__ u, const scalar* __restrict__ delta,
    const float* __restrict__ A, const scalar* __restrict__ B, const scalar* __restrict__ C,
    const float* __restrict__ D, const float* __restrict__ bias, const float* __restrict__ states,
    const float* __restrict__ handed, scalar* __restrict__ grad_u, scalar* __restrict__ grad_delta,
    float* __restrict__ grad_A, float* __restrict__ grad_B, float* __restrict__ grad_C, float* __restrict__ grad_D,
    float* __restrict__ grad_bias, int64 groups, int64 width, int64 length, int64 positive) {
    __shared__ float gy_tile[THREADS][TILE + 1];
    __shared__ float u_tile[THREADS][TILE + 1];   // each turns into its gradient, step by step
    __shared__ float dt_tile[THREADS][TILE + 1];
    __shared__ float B_tile[TILE][N_STATES];
    __shared__ float C_tile[TILE][N_STATES];
    __shared__ float products[GROUP * ROWS][THREADS + 1];
    const Place p = locate(groups, width, length);
    const int lane = threadIdx.x;
    const int64 tiles = (width + THREADS - 1) / THREADS;
    const float own_bias = bias ? bias[p.channel] : 0.0f, skip = D ? D[p.channel] : 0.0f;
    float decay[N_STATES], g[N_STATES], sum_A[N_STATES], sum_D = 0.0f, sum_bias = 0.0f;
    float before_tile[CHUNK / TILE][N_STATES], before[TILE][N_STATES], state[N_STATES];
#pragma unroll
    for (int n = 0; n < N_STATES; ++n) {
        decay[n] = A[p.channel * N_STATES + n] * LOG2E;
        g[n] = handed ? handed[p.slot * N_STATES + n] : 0.0f;
        state[n] = states[p.slot * N_STATES + n];
        sum_A[n] = 0.0f;
    }

    const int last = (int)((p.end - p.begin - 1) / TILE);
    for (int tile = 0; tile < last; ++tile) {  // states before each tile; all of these tiles are full
        const int64 start = p.begin + tile * TILE;
        __syncthreads();
        bring(u_tile, u + p.rows + start, p.channels, length, TILE);
        bring(dt_tile, delta + p.rows + start, p.channels, length, TILE);
        bring_states(B_tile, B + p.BC + start, length, TILE);
        __syncthreads();
        for (int n = 0; n < N_STATES; ++n) before_tile[tile][n] = state[n];
        if (!p.mine) continue;
        for (int t = 0; t < TILE; ++t) {
            const float dt = step_size(dt_tile[lane][t] + own_bias, positive), increment = dt * u_tile[lane][t];
#pragma unroll
            for (int n = 0; n < N_STATES; ++n)
                state[n] = fmaf(exp2_approximate(dt * decay[n]), state[n], increment * B_tile[t][n]);
        }
    }
    for (int n = 0; n < N_STATES; ++n) before_tile[last][n] = state[n];

    for (int tile = last; tile >= 0; --tile) {
        const int64 start = p.begin + tile * TILE;
        const int steps = (int)min((int64)TILE, p.end - start);
        __syncthreads();
        bring(gy_tile, gy + p.rows + start, p.channels, length, steps);
        bring(u_tile, u + p.rows + start, p.channels, length, steps);
        bring(dt_tile, delta + p.rows + start, p.channels, length, steps);
        bring_states(B_tile, B + p.BC + start, length, steps);
        bring_states(C_tile, C + p.BC + start, length, steps);
        __syncthreads();
        for (int n = 0; n < N_STATES; ++n) state[n] = before_tile[tile][n];
        if (p.mine) {
            for (int t = 0; t < steps; ++t) {
                const float dt = step_size(dt_tile[lane][t] + own_bias, positive), increment = dt * u_tile[lane][t];
#pragma unroll
                for (int n = 0; n < N_STATES; ++n) {
                    before[t][n] = state[n];
                    state[n] = fmaf(exp2_approximate(dt * decay[n]), state[n], increment * B_tile[t][n]);
                }
            }
        }
        // Backwards, GROUP steps at a time: each thread its products, then the sums over threads take the places of B and C
        // of those steps, which nobody needs any more.
        for (int high = steps; high > 0; high -= GROUP) {
            const int low = high > GROUP ? high - GROUP : 0;
            for (int t = high - 1; t >= low; --t) {
                float* product_B = &products[(t - low) * ROWS][lane];
                float* product_C = product_B + N_STATES * (THREADS + 1);
                if (!p.mine) {
                    for (int n = 0; n < N_STATES; ++n) product_B[n * (THREADS + 1)] = product_C[n * (THREADS + 1)] = 0.0f;
                    continue;
                }
                const float raw = dt_tile[lane][t] + own_bias, dt = step_size(raw, positive);
                const float value = u_tile[lane][t], slope = gy_tile[lane][t], increment = dt * value;
                float through_B = 0.0f, through_decay = 0.0f;
#pragma unroll
                for (int n = 0; n < N_STATES; ++n) {
                    const float factor = exp2_approximate(dt * decay[n]), old = factor * before[t][n];
                    product_C[n * (THREADS + 1)] = slope * fmaf(increment, B_tile[t][n], old);
                    g[n] = fmaf(slope, C_tile[t][n], g[n]);
                    product_B[n * (THREADS + 1)] = g[n] * increment;
                    through_B = fmaf(g[n], B_tile[t][n], through_B);
                    const float of_exponent = g[n] * old;  // dt A is the exponent
                    sum_A[n] = fmaf(of_exponent, dt, sum_A[n]);
                    through_decay = fmaf(of_exponent, decay[n], through_decay);
                    g[n] *= factor;
                }
                float of_dt = fmaf(through_B, value, through_decay * LN2);
                if (positive && raw <= 20.0f) of_dt /= 1.0f + expf(-raw);
                sum_D = fmaf(slope, value, sum_D);
                sum_bias += of_dt;
                u_tile[lane][t] = fmaf(skip, slope, dt * through_B);
                dt_tile[lane][t] = of_dt;
            }
            __syncthreads();
            for (int row = lane; row < (high - low) * ROWS; row += THREADS) {
                float sum = 0.0f;
                for (int i = 0; i < THREADS; ++i) sum += products[row][i];
                const int t = low + row / ROWS, n = row % ROWS;
                if (n < N_STATES) B_tile[t][n] = sum;
                else C_tile[t][n - N_STATES] = sum;
            }
            __syncthreads();
        }
        for (int i = lane; i < p.channels * TILE; i += THREADS) {
            const int row = i / TILE, t = i % TILE;
            if (t < steps) {
                grad_u[p.rows + row * length + start + t] = narrow(u_tile[row][t]);
                grad_delta[p.rows + row * length + start + t] = narrow(dt_tile[row][t]);
            }
        }
        const int64 partial = (blockIdx.y % tiles) * gridDim.z * groups * N_STATES * length + p.BC + start;
        for (int i = lane; i < N_STATES * TILE; i += THREADS) {
            const int n = i / TILE, t = i % TILE;
            if (t < steps) {
                grad_B[partial + n * length + t] = B_tile[t][n];
                grad_C[partial + n * length + t] = C_tile[t][n];
            }
        }
    }
    if (!p.mine) return;
    grad_D[p.slot] = sum_D;
    grad_bias[p.slot] = sum_bias;
    for (int n = 0; n < N_STATES; ++n) grad_A[p.slot * N_STATES + n] = sum_A[n];
}

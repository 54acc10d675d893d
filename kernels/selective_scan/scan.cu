// The selective scan and the 2-D state-space step for NVIDIA GPUs. Compiled at run time by NVRTC: no headers.
//
// One thread owns one channel and keeps its N states in registers; neighbouring threads own neighbouring channels. The
// sequence is cut into chunks so that there are threads enough. Three launches:
//   1. every chunk from a zero state: the state it ends with, and the sum of its step sizes (mode "summary");
//   2. `carry` walks over the chunks, since  state_out = exp(A sum dt) state_in + state_of_chunk  is exact;
//   3. every chunk again from its true state, now with output.
// The state is thus never written except once a chunk. exp(dt A) is computed twice a state and step: on current devices
// the special-function units (16 exp2 a cycle and multiprocessor), not memory, are then the limit for N >= 8.
//
// Fixed when compiling: N_STATES, RANK (of the dt projection), THREADS (channels of a block: 32 or 64), SCALAR (type of
// the feature maps: 0 float, 1 half, 2 bfloat16).

#include "common.cuh"

#define TILE 32  // steps brought into shared memory at a time

// One step of one channel: state <- exp(dt A) state + dt u B, returns C state. A comes times log2 e.
DEVICE float step(float* state, const float* A, float dt, float u, const float* B, const float* C) {
    float increment = dt * u, y = 0.0f;
#pragma unroll
    for (int n = 0; n < N_STATES; ++n) {
        state[n] = fmaf(exp2_approximate(dt * A[n]), state[n], increment * B[n]);
        y = fmaf(C[n], state[n], y);
    }
    return y;
}

// u, delta, y [batch, dim, L]; A [dim, N]; B, C [batch, groups, N, L]; D, bias [dim], D may be null.
// states [batch, chunks, dim, N] and sums [batch, chunks, dim]: without y written ("summary"), with y the states are
// where the chunks start (null: from zero) and the last state goes to `last` [batch, dim, N].
// Grid: (chunks, groups * tiles of THREADS channels, batch).
extern "C" __global__ void __launch_bounds__(THREADS) scan(
    const scalar* __restrict__ u, const scalar* __restrict__ delta, const float* __restrict__ A,
    const scalar* __restrict__ B, const scalar* __restrict__ C, const float* __restrict__ D,
    const float* __restrict__ bias, scalar* __restrict__ y, float* __restrict__ states, float* __restrict__ sums,
    float* __restrict__ last, int64 groups, int64 width, int64 length, int64 chunk, int64 positive) {
    __shared__ float u_tile[THREADS][TILE + 1];
    __shared__ float dt_tile[THREADS][TILE + 1];
    __shared__ float B_tile[TILE][N_STATES];
    __shared__ float C_tile[TILE][N_STATES];
    const int64 tiles = (width + THREADS - 1) / THREADS, dim = groups * width;
    const int64 group = blockIdx.y / tiles, first = (blockIdx.y % tiles) * THREADS, image = blockIdx.z;
    const int64 channels = min((int64)THREADS, width - first);  // of this block
    const int lane = threadIdx.x;
    const bool mine = lane < channels;
    const int64 channel = group * width + first + (mine ? lane : 0);
    const int64 slot = (image * gridDim.x + blockIdx.x) * dim + channel;
    const int64 rows = (image * dim + group * width + first) * length, BC = (image * groups + group) * N_STATES * length;

    float state[N_STATES], decay[N_STATES], total = 0.0f;
#pragma unroll
    for (int n = 0; n < N_STATES; ++n) {
        decay[n] = A[channel * N_STATES + n] * LOG2E;
        state[n] = y && states ? states[slot * N_STATES + n] : 0.0f;
    }
    const float own_bias = bias ? bias[channel] : 0.0f, skip = D ? D[channel] : 0.0f;

    const int64 end = min(length, (int64)(blockIdx.x + 1) * chunk);
    for (int64 start = blockIdx.x * chunk; start < end; start += TILE) {
        const int steps = (int)min((int64)TILE, end - start);
        __syncthreads();
        for (int i = lane; i < channels * TILE; i += THREADS) {
            const int row = i / TILE, t = i % TILE;
            if (t < steps) {
                u_tile[row][t] = load(u + rows + row * length + start + t);
                dt_tile[row][t] = load(delta + rows + row * length + start + t);
            }
        }
        for (int i = lane; i < N_STATES * TILE; i += THREADS) {
            const int n = i / TILE, t = i % TILE;
            if (t < steps) {
                B_tile[t][n] = load(B + BC + n * length + start + t);
                C_tile[t][n] = load(C + BC + n * length + start + t);
            }
        }
        __syncthreads();
        if (mine) {
            for (int t = 0; t < steps; ++t) {
                float dt = dt_tile[lane][t] + own_bias;
                if (positive) dt = softplus(dt);
                const float value = u_tile[lane][t];
                total += dt;
                u_tile[lane][t] = fmaf(skip, value, step(state, decay, dt, value, B_tile[t], C_tile[t]));
            }
        }
        if (y) {
            __syncthreads();
            for (int i = lane; i < channels * TILE; i += THREADS) {
                const int row = i / TILE, t = i % TILE;
                if (t < steps) y[rows + row * length + start + t] = narrow(u_tile[row][t]);
            }
        }
    }
    if (!mine) return;
    if (!y) {
        sums[slot] = total;
        for (int n = 0; n < N_STATES; ++n) states[slot * N_STATES + n] = state[n];
    } else if (blockIdx.x == gridDim.x - 1 && last) {
        for (int n = 0; n < N_STATES; ++n) last[(image * dim + channel) * N_STATES + n] = state[n];
    }
}

// Turns the states at the ends of lone chunks into the states at their starts.
extern "C" __global__ void carry(
    float* __restrict__ states, const float* __restrict__ sums, const float* __restrict__ A, int64 channels,
    int64 chunks) {
    carry_over(states, sums, A, channels, chunks, false);
}

// The 2-D step. x [batch, L, width]; projected [batch, L, paths, RANK + 2 N]; order [batch, paths, L]; dt_weight
// [paths, width, RANK]; bias, D [paths, width]; A [paths, width, N]; prompt [batch, L, N] or null; y float: at
// image * y_image + path * y_path + pixel * width + channel. states and sums as above with paths * width channels.
// With y, `path` is the one path of the launch and `accumulate` adds to what is there (one path visits a pixel once, so
// nothing races); without, blockIdx.z runs over images and paths. Grid: (chunks, tiles, batch [* paths]).
extern "C" __global__ void __launch_bounds__(THREADS) state_space(
    const scalar* __restrict__ x, const scalar* __restrict__ projected, const int* __restrict__ order,
    const float* __restrict__ dt_weight, const float* __restrict__ bias, const float* __restrict__ A,
    const float* __restrict__ D, const float* __restrict__ prompt, float* __restrict__ y, float* __restrict__ states,
    float* __restrict__ sums, int64 paths, int64 width, int64 length, int64 chunk, int64 only_path, int64 accumulate,
    int64 y_image, int64 y_path) {
    const int ROW = RANK + 2 * N_STATES;
    __shared__ float rows[TILE][RANK + 2 * N_STATES];
    __shared__ int pixels[TILE];
    const int lane = threadIdx.x;
    const int64 image = y ? blockIdx.z : blockIdx.z / paths, path = y ? only_path : blockIdx.z % paths;
    const bool mine = blockIdx.y * THREADS + lane < width;
    const int64 channel = mine ? blockIdx.y * THREADS + lane : 0, own = path * width + channel;
    const int64 slot = (image * gridDim.x + blockIdx.x) * paths * width + own;

    float state[N_STATES], decay[N_STATES], weight[RANK], total = 0.0f;
#pragma unroll
    for (int n = 0; n < N_STATES; ++n) {
        decay[n] = A[own * N_STATES + n] * LOG2E;
        state[n] = y && states ? states[slot * N_STATES + n] : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < RANK; ++r) weight[r] = dt_weight[own * RANK + r];
    const float own_bias = bias[own], skip = D[own];

    const int64 end = min(length, (int64)(blockIdx.x + 1) * chunk);
    for (int64 start = blockIdx.x * chunk; start < end; start += TILE) {
        const int steps = (int)min((int64)TILE, end - start);
        __syncthreads();
        for (int t = lane; t < steps; t += THREADS) pixels[t] = order[(image * paths + path) * length + start + t];
        __syncthreads();
        for (int i = lane; i < steps * ROW; i += THREADS) {
            const int t = i / ROW, j = i % ROW;
            float value = load(projected + ((image * length + pixels[t]) * paths + path) * ROW + j);
            if (prompt && j >= RANK + N_STATES)
                value += prompt[(image * length + start + t) * N_STATES + j - RANK - N_STATES];
            rows[t][j] = value;
        }
        __syncthreads();
        if (mine) {
            for (int t = 0; t < steps; ++t) {
                const int64 pixel = pixels[t];
                float dt = own_bias;
#pragma unroll
                for (int r = 0; r < RANK; ++r) dt = fmaf(weight[r], rows[t][r], dt);
                dt = softplus(dt);
                total += dt;
                const float value = load(x + (image * length + pixel) * width + channel);
                const float* B = rows[t] + RANK;
                const float result = fmaf(skip, value, step(state, decay, dt, value, B, B + N_STATES));
                if (y) {
                    float* target = y + image * y_image + path * y_path + pixel * width + channel;
                    *target = accumulate ? *target + result : result;
                }
            }
        }
    }
    if (mine && !y) {
        sums[slot] = total;
        for (int n = 0; n < N_STATES; ++n) states[slot * N_STATES + n] = state[n];
    }
}

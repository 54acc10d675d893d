"""The CPU kernels: vector code for LANES channels side by side, and the loops around it, compiled by Numba.

Numba's own vectoriser cannot prove that the buffers of the scan do not overlap and leaves the inner loop scalar, so
the few operations that matter are written as LLVM vector instructions. LLVM maps LANES floats onto whatever the
machine has (one AVX-512 register, two of AVX2, four of SSE or NEON).

Everything is in this one file because Numba's cache on disk notices changes in the file of a function, and only there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
TILE = 64
"""Steps that are brought into the cache at a time; divides INTERVAL."""
INTERVAL = 128
"""Steps between two kept states: chunked.STATE_INTERVAL, repeated here for Numba's cache."""

_LN2 = np.float32(0.6931471805599453)

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
_INDEX = ir.IntType(64)
_LOG2E = 1.4426950408889634
# 2^f on [-0.5, 0.5], relative error 9e-8; the constant term is exact so that slow decays stay slow.
_EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.0013264723820611835)
# log(1 + y) / y on [0, 1], relative error 3e-8.
_LOG1P = (
    0.9999999403953552,
    -0.4999949336051941,
    0.3331909477710724,
    -0.2484297752380371,
    0.1910598874092102,
    -0.1366320699453354,
    0.07822549343109131,
    -0.029504956677556038,
    0.005232623778283596,
)


class _Code:
    """Emits vector code at the builder's position."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    @staticmethod
    def constant(value: float) -> ir.Constant:
        return ir.Constant(_VECTOR, [value] * LANES)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return self.builder.call(function, [a, b, c])

    def total(self, a: ir.Value) -> ir.Value:
        """The sum of the lanes, a float, in any order."""
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _VECTOR])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return self.builder.call(function, [ir.Constant(ir.FloatType(), -0.0), a], fastmath=("reassoc",))

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def polynomial(self, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
        value = self.constant(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            value = self.fma(value, x, self.constant(coefficient))
        return value

    def exp2(self, x: ir.Value) -> ir.Value:
        """2^x, x held within -126 .. 127. Rounds by adding 1.5 * 2^23, whose last bits are then the exponent."""
        build = self.builder
        x = self.minimum(self.maximum(x, self.constant(-126.0)), self.constant(127.0))
        shifted = build.fadd(x, self.constant(12582912.0))
        fraction = build.fsub(x, build.fsub(shifted, self.constant(12582912.0)))
        value = self.polynomial(fraction, _EXP2)
        exponent = build.shl(build.bitcast(shifted, _INTEGERS), ir.Constant(_INTEGERS, [23] * LANES))
        return build.bitcast(build.add(build.bitcast(value, _INTEGERS), exponent), _VECTOR)

    def softplus(self, x: ir.Value) -> ir.Value:
        """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|); above 20 that is x itself in float32."""
        build = self.builder
        zero = self.constant(0.0)
        magnitude = self.maximum(x, build.fsub(zero, x))
        y = self.exp2(build.fmul(magnitude, self.constant(-_LOG2E)))
        return self.fma(y, self.polynomial(y, _LOG1P), self.maximum(x, zero))

    def times(self, stride: ir.Value, factor: int) -> ir.Value:
        return self.builder.mul(stride, ir.Constant(_INDEX, factor))

    def transposed(self, rows: list[ir.Value]) -> list[ir.Value]:
        """LANES vectors, transposed: log2(LANES) rounds that interleave row i with row i + LANES / 2."""
        half = LANES // 2
        low = ir.Constant(_INTEGERS, [j // 2 + LANES * (j % 2) for j in range(LANES)])
        high = ir.Constant(_INTEGERS, [half + j // 2 + LANES * (j % 2) for j in range(LANES)])
        for _ in range(LANES.bit_length() - 1):
            pairs = [(rows[i // 2], rows[i // 2 + half], high if i % 2 else low) for i in range(LANES)]
            rows = [self.builder.shuffle_vector(*pair) for pair in pairs]
        return rows

    def sigmoid(self, x: ir.Value) -> ir.Value:
        e = self.exp2(self.builder.fmul(x, self.constant(-_LOG2E)))
        return self.builder.fdiv(self.constant(1.0), self.builder.fadd(self.constant(1.0), e))


class _Row:
    """An array from an offset on, seen as rows of LANES floats (load, store) or as floats (splat, add_total)."""

    def __init__(self, code: _Code, data: ir.Value, offset: ir.Value) -> None:
        self.code, self.builder = code, code.builder
        self.start = self.builder.gep(data, [offset])

    def _vector(self, index: ir.Value | None) -> ir.Value:
        if index is not None:
            index = self.builder.mul(index, ir.Constant(_INDEX, LANES))
        return self._address(index)

    def _address(self, offset: ir.Value | None) -> ir.Value:
        start = self.start if offset is None else self.builder.gep(self.start, [offset])
        return self.builder.bitcast(start, _VECTOR.as_pointer())

    def load(self, index: ir.Value | None = None) -> ir.Value:
        return self.builder.load(self._vector(index), align=4)

    def load_at(self, offset: ir.Value) -> ir.Value:
        return self.builder.load(self._address(offset), align=4)

    def store(self, value: ir.Value, index: ir.Value | None = None) -> None:
        self.builder.store(value, self._vector(index), align=4)

    def store_at(self, value: ir.Value, offset: ir.Value) -> None:
        self.builder.store(value, self._address(offset), align=4)

    def splat(self, index: ir.Value) -> ir.Value:
        """The float at `index` in every lane."""
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        scalar = self.builder.load(self.builder.gep(self.start, [index]))
        first = self.builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(_INTEGERS, [0] * LANES))

    def add_total(self, value: ir.Value, index: ir.Value) -> None:
        """Adds the sum of the lanes of `value` to the float at `index`."""
        address = self.builder.gep(self.start, [index])
        self.builder.store(self.builder.fadd(self.builder.load(address), self.code.total(value)), address)


class _Accumulator:
    """A vector variable; LLVM keeps it in a register."""

    def __init__(self, code: _Code, value: ir.Value | None = None) -> None:
        self.builder, self.slot = code.builder, cgutils.alloca_once(code.builder, _VECTOR)
        self.set(code.constant(0.0) if value is None else value)

    def get(self) -> ir.Value:
        return self.builder.load(self.slot)

    def set(self, value: ir.Value) -> None:
        self.builder.store(value, self.slot)


# Primitives: `f((array, ...), (offset, ...), n)` with one-dimensional contiguous float32 arrays.


def _primitive(emit: Callable) -> Callable:
    """Makes an intrinsic `f(arrays, offsets, n)`, two tuples and an integer, from the function that emits its code."""

    @intrinsic
    def primitive(typing_context, arrays, offsets, n):
        signature = types.void(arrays, offsets, types.int64)

        def codegen(context, builder, sig, values):
            parts = cgutils.unpack_tuple(builder, values[0])
            data = [context.make_array(t)(context, builder, v).data for t, v in zip(arrays, parts, strict=True)]
            starts = cgutils.unpack_tuple(builder, values[1])
            starts = [context.cast(builder, v, t, types.int64) for t, v in zip(offsets, starts, strict=True)]
            code = _Code(builder)
            emit(code, *[_Row(code, d, o) for d, o in zip(data, starts, strict=True)], values[2])
            return context.get_dummy_value()

        return signature, codegen

    primitive.__name__ = emit.__name__
    return primitive


@_primitive
def scan_step(
    code: _Code, dt: _Row, u: _Row, A: _Row, D: _Row, state: _Row, B: _Row, C: _Row, y: _Row, n: ir.Value
) -> None:
    """One step with n states: state = 2^(dt A) state + dt u B; y = C state + D u.

    dt, u, D, y [LANES]; A (times log2 e), state [n, LANES]; B, C [n].
    """
    build = code.builder
    step, value = dt.load(), u.load()
    increment, output = build.fmul(step, value), _Accumulator(code, build.fmul(D.load(), value))
    with cgutils.for_range(build, n) as loop:
        i = loop.index
        decay = code.exp2(build.fmul(step, A.load(i)))
        new = code.fma(decay, state.load(i), build.fmul(increment, B.splat(i)))
        state.store(new, i)
        output.set(code.fma(C.splat(i), new, output.get()))
    y.store(output.get())


@_primitive
def scan_step_keeping(
    code: _Code, dt: _Row, u: _Row, A: _Row, before: _Row, after: _Row, decays: _Row, B: _Row, n: ir.Value
) -> None:
    """`scan_step` for the backward pass: reads `before`, writes `after` and the decays, all [n, LANES]; no output."""
    build = code.builder
    step = dt.load()
    increment = build.fmul(step, u.load())
    with cgutils.for_range(build, n) as loop:
        i = loop.index
        decay = code.exp2(build.fmul(step, A.load(i)))
        decays.store(decay, i)
        after.store(code.fma(decay, before.load(i), build.fmul(increment, B.splat(i))), i)


@_primitive
def adjoint_step(
    code: _Code,
    dt: _Row,
    u: _Row,
    grad_y: _Row,
    A: _Row,
    before: _Row,
    after: _Row,
    decays: _Row,
    carried: _Row,
    B: _Row,
    C: _Row,
    grad_A: _Row,
    grad_B: _Row,
    grad_C: _Row,
    grad_du: _Row,
    grad_dt: _Row,
    n: ir.Value,
) -> None:
    """One step backwards in time.

    `carried` [n, LANES] holds the decay times the gradient of the state, handed on from the step after. Adds to grad_A
    [n, LANES] and grad_B, grad_C [n]; writes grad_du, the gradient of dt u, and grad_dt [LANES], the gradient of dt
    through the decay alone and times log2 e.
    """
    build = code.builder
    step, gradient = dt.load(), grad_y.load()
    increment = build.fmul(step, u.load())
    through_input, through_decay = _Accumulator(code), _Accumulator(code)
    with cgutils.for_range(build, n) as loop:
        i = loop.index
        grad_C.add_total(build.fmul(gradient, after.load(i)), i)
        grad_state = code.fma(gradient, C.splat(i), carried.load(i))
        grad_B.add_total(build.fmul(grad_state, increment), i)
        through_input.set(code.fma(grad_state, B.splat(i), through_input.get()))
        decayed = build.fmul(grad_state, decays.load(i))
        carried.store(decayed, i)
        grad_log = build.fmul(decayed, before.load(i))
        through_decay.set(code.fma(grad_log, A.load(i), through_decay.get()))
        grad_A.store(code.fma(grad_log, step, grad_A.load(i)), i)
    grad_du.store(through_input.get())
    grad_dt.store(through_decay.get())


@_primitive
def project(
    code: _Code, weight: _Row, bias: _Row, row0: _Row, row1: _Row, row2: _Row, row3: _Row, out: _Row, n: ir.Value
) -> None:
    """out [4, LANES] = bias [LANES] + weight [n, LANES] times each of four rows [n]: four sums hide the latency."""
    rows, start = (row0, row1, row2, row3), bias.load()
    totals = [_Accumulator(code, start) for _ in rows]
    with cgutils.for_range(code.builder, n) as loop:
        factor = weight.load(loop.index)
        for row, total in zip(rows, totals, strict=True):
            total.set(code.fma(factor, row.splat(loop.index), total.get()))
    for i, total in enumerate(totals):
        out.store(total.get(), ir.Constant(_INDEX, i))


@_primitive
def copy(code: _Code, source: _Row, target: _Row, _: ir.Value) -> None:
    """target = source, both [LANES]."""
    target.store(source.load())


@_primitive
def accumulate(code: _Code, source: _Row, target: _Row, _: ir.Value) -> None:
    """target += source, both [LANES]."""
    target.store(code.builder.fadd(target.load(), source.load()))


@_primitive
def add(code: _Code, x: _Row, bias: _Row, n: ir.Value) -> None:
    """x [n, LANES] += bias [LANES]."""
    value = bias.load()
    with cgutils.for_range(code.builder, n) as loop:
        x.store(code.builder.fadd(x.load(loop.index), value), loop.index)


@_primitive
def softplus(code: _Code, x: _Row, out: _Row, n: ir.Value) -> None:
    """out = log(1 + e^x), both [n, LANES]; may be the same array."""
    with cgutils.for_range(code.builder, n) as loop:
        out.store(code.softplus(x.load(loop.index)), loop.index)


@_primitive
def sigmoid(code: _Code, x: _Row, out: _Row, n: ir.Value) -> None:
    """out = 1 / (1 + e^-x), both [n, LANES]; may be the same array."""
    with cgutils.for_range(code.builder, n) as loop:
        out.store(code.sigmoid(x.load(loop.index)), loop.index)


@_primitive
def transpose_in(code: _Code, source: _Row, out: _Row, stride: ir.Value) -> None:
    """out [LANES, LANES], contiguous, becomes the transpose of a block of LANES rows, `stride` floats apart."""
    for i, row in enumerate(code.transposed([source.load_at(code.times(stride, i)) for i in range(LANES)])):
        out.store(row, ir.Constant(_INDEX, i))


@_primitive
def transpose_out(code: _Code, source: _Row, out: _Row, stride: ir.Value) -> None:
    """The other way: a contiguous block into LANES rows, `stride` floats apart."""
    for i, row in enumerate(code.transposed([source.load(ir.Constant(_INDEX, i)) for i in range(LANES)])):
        out.store_at(row, code.times(stride, i))


# Loops: one call does some channels of one image, on one core. Arrays come flattened; parameters of channels (A, D, bias,
# dt weights) packed by `compiled.pack`: per group its blocks of LANES channels, per block [n, LANES], zero where missing.


def _compile(function):
    """njit without the GIL, cached on disk where there is a place for it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that can be written
        return njit(nogil=True)(function)


@_compile
def _load(source, start, stride, lanes, steps, tile):
    """tile [steps, LANES] from `lanes` rows of `source`, `stride` apart; missing lanes become zero."""
    whole = 0
    if lanes == LANES:
        whole = steps - steps % LANES
        for t in range(0, whole, LANES):
            transpose_in((source, tile), (start + t, t * LANES), stride)
    for t in range(whole, steps):
        for lane in range(LANES):
            tile[t * LANES + lane] = source[start + lane * stride + t] if lane < lanes else np.float32(0.0)


@_compile
def _store(tile, lanes, steps, target, start, stride):
    """The other way, without the missing lanes."""
    whole = 0
    if lanes == LANES:
        whole = steps - steps % LANES
        for t in range(0, whole, LANES):
            transpose_out((tile, target), (t * LANES, start + t), stride)
    for lane in range(lanes):
        for t in range(whole, steps):
            target[start + lane * stride + t] = tile[t * LANES + lane]


@_compile
def _load_rows(source, start, stride, n, steps, rows):
    """rows [steps, n] from n rows of `source`, `stride` apart: B or C of some steps."""
    whole = 0
    if n == LANES:
        whole = steps - steps % LANES
        for t in range(0, whole, LANES):
            transpose_in((source, rows), (start + t, t * LANES), stride)
    for i in range(n):
        for t in range(whole, steps):
            rows[t * n + i] = source[start + i * stride + t]


@_compile
def _step_sizes(tile, bias, bias_at, steps, positive):
    add((tile, bias), (0, bias_at), steps)
    if positive:
        softplus((tile, tile), (0, 0), steps)


@_compile
def _copy_state(state, at, n, lanes, target, start):
    """[n, LANES] to `lanes` rows of n."""
    for lane in range(lanes):
        for i in range(n):
            target[start + lane * n + i] = state[at + i * LANES + lane]


@_compile
def scan(u, delta, A, B, C, D, bias, positive, y, last, states, sizes, image, group, first, end):
    """Blocks first..end-1 of one group of one image.

    u, delta, y [batch, dim, L]; B, C [batch, G, n, L]; last [batch, dim, n]; states [batch, intervals, dim, n], where
    intervals may be 0; positive: whether dt goes through softplus. sizes: (G, channels of a group, n, L, intervals).
    """
    groups, width, n, length, intervals = sizes
    dim, blocks = groups * width, -(-width // LANES)
    state = np.zeros((end - first) * n * LANES, np.float32)
    tiles, rows = np.zeros((3, TILE * LANES), np.float32), np.zeros((2, TILE * n), np.float32)
    u_tile, dt, out, B_rows, C_rows = tiles[0], tiles[1], tiles[2], rows[0], rows[1]
    rows_at = (image * groups + group) * n * length
    for start in range(0, length, TILE):
        steps = min(TILE, length - start)
        _load_rows(B, rows_at + start, length, n, steps, B_rows)
        _load_rows(C, rows_at + start, length, n, steps, C_rows)
        for block in range(first, end):
            channel, packed = group * width + block * LANES, group * blocks + block
            lanes, at = min(LANES, width - block * LANES), (image * dim + channel) * length + start
            state_at = (block - first) * n * LANES
            if intervals and start % INTERVAL == 0:
                here = ((image * intervals + start // INTERVAL) * dim + channel) * n
                _copy_state(state, state_at, n, lanes, states, here)
            _load(u, at, length, lanes, steps, u_tile)
            _load(delta, at, length, lanes, steps, dt)
            _step_sizes(dt, bias, packed * LANES, steps, positive)
            for t in range(steps):
                scan_step(
                    (dt, u_tile, A, D, state, B_rows, C_rows, out),
                    (t * LANES, t * LANES, packed * n * LANES, packed * LANES, state_at, t * n, t * n, t * LANES),
                    n,
                )
            _store(out, lanes, steps, y, at, length)
    for block in range(first, end):
        channel, lanes = group * width + block * LANES, min(LANES, width - block * LANES)
        _copy_state(state, (block - first) * n * LANES, n, lanes, last, (image * dim + channel) * n)


@_compile
def adjoint(
    grad_y, states, u, delta, A, B, C, D, bias, positive,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
    sizes, image, group, first, end,
):  # fmt: skip
    """Gradients of the same blocks. grad_A [batch, dim, n], grad_D, grad_bias [batch, dim] are written; to grad_B and
    grad_C, here [batch, G, L, n], the blocks' shares are added."""
    groups, width, n, length, intervals = sizes
    dim, blocks, size = groups * width, -(-width // LANES), n * LANES
    kept, decays = np.zeros((INTERVAL + 1) * size, np.float32), np.zeros(INTERVAL * size, np.float32)
    tiles, rows = np.zeros((7, INTERVAL * LANES), np.float32), np.zeros((2, INTERVAL * n), np.float32)
    u_tile, raw, dt, gy, slope, gdu, gdt = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], tiles[5], tiles[6]
    B_rows, C_rows = rows[0], rows[1]
    carried, sum_A = np.zeros((end - first) * size, np.float32), np.zeros((end - first) * size, np.float32)
    rows_at = (image * groups + group) * n * length
    for index in range(intervals - 1, -1, -1):
        start = index * INTERVAL
        steps = min(INTERVAL, length - start)
        _load_rows(B, rows_at + start, length, n, steps, B_rows)
        _load_rows(C, rows_at + start, length, n, steps, C_rows)
        for block in range(first, end):
            channel, packed = group * width + block * LANES, group * blocks + block
            lanes, at = min(LANES, width - block * LANES), (image * dim + channel) * length + start
            own = (block - first) * size
            _load(u, at, length, lanes, steps, u_tile)
            _load(grad_y, at, length, lanes, steps, gy)
            _load(delta, at, length, lanes, steps, raw)
            add((raw, bias), (0, packed * LANES), steps)
            if positive:
                softplus((raw, dt), (0, 0), steps)
                sigmoid((raw, slope), (0, 0), steps)
            else:
                dt[:] = raw
                slope[:] = np.float32(1.0)
            kept[:size] = np.float32(0.0)
            for lane in range(lanes):
                for i in range(n):
                    kept[i * LANES + lane] = states[((image * intervals + index) * dim + channel + lane) * n + i]
            for t in range(steps):
                scan_step_keeping(
                    (dt, u_tile, A, kept, kept, decays, B_rows),
                    (t * LANES, t * LANES, packed * size, t * size, (t + 1) * size, t * size, t * n),
                    n,
                )
            for t in range(steps - 1, -1, -1):
                row = rows_at + (start + t) * n
                adjoint_step(
                    (dt, u_tile, gy, A, kept, kept, decays, carried, B_rows, C_rows,
                     sum_A, grad_B, grad_C, gdu, gdt),
                    (t * LANES, t * LANES, t * LANES, packed * size, t * size, (t + 1) * size, t * size, own, t * n, t * n,
                     own, row, row, t * LANES, t * LANES),
                    n,
                )  # fmt: skip
            for t in range(steps):
                for lane in range(lanes):
                    i = t * LANES + lane
                    total = gdt[i] * _LN2 + gdu[i] * u_tile[i]
                    if raw[i] <= 20.0:
                        total *= slope[i]
                    grad_D[image * dim + channel + lane] += gy[i] * u_tile[i]
                    grad_bias[image * dim + channel + lane] += total
                    gdu[i] = gdu[i] * dt[i] + D[packed * LANES + lane] * gy[i]
                    gdt[i] = total
            _store(gdu, lanes, steps, grad_u, at, length)
            _store(gdt, lanes, steps, grad_delta, at, length)
    for block in range(first, end):
        channel, lanes = group * width + block * LANES, min(LANES, width - block * LANES)
        _copy_state(sum_A, (block - first) * size, n, lanes, grad_A, (image * dim + channel) * n)


@_compile
def state_space_2d(
    x, projected, order, dt_weight, dt_bias, A, D, prompt, merge, y, sizes, image, direction, directions, first, end
):
    """Blocks first..end-1 along paths direction..direction+directions-1 of one image.

    x [batch, L, width]; projected [batch, L, K, rank + 2n]; order [batch, K, L]; prompt [batch, L, n] or empty;
    y [batch, L, width] if `merge` (then all K paths belong to one call), else [batch, K, L, width].
    sizes: (K, width, n, L, rank).
    """
    paths, width, n, length, rank = sizes
    blocks, row_size = -(-width // LANES), rank + 2 * n
    tiles, C_rows = np.zeros((3, TILE * LANES), np.float32), np.zeros(TILE * n, np.float32)
    u_tile, dt, out = tiles[0], tiles[1], tiles[2]
    pixels, rows = np.zeros(TILE, np.int64), np.zeros(TILE, np.int64)
    for path in range(direction, direction + directions):
        state = np.zeros((end - first) * n * LANES, np.float32)
        for start in range(0, length, TILE):
            steps = min(TILE, length - start)
            for t in range(TILE):  # past the end, the last pixel again: `project` works on four rows at a time
                pixel = image * length + order[(image * paths + path) * length + start + min(t, steps - 1)]
                pixels[t], rows[t] = pixel, (pixel * paths + path) * row_size
            if len(prompt):
                for t in range(steps):
                    source, own = rows[t] + rank + n, (image * length + start + t) * n
                    for i in range(n):
                        C_rows[t * n + i] = projected[source + i] + prompt[own + i]
            for block in range(first, end):
                packed, lanes, state_at = path * blocks + block, min(LANES, width - block * LANES), (block - first) * n
                for t in range(steps):
                    source = pixels[t] * width + block * LANES
                    if source + LANES <= len(x):  # lanes past the width hold the next pixel and are never written
                        copy((x, u_tile), (source, t * LANES), 0)
                    else:
                        for lane in range(lanes):
                            u_tile[t * LANES + lane] = x[source + lane]
                for t in range(0, steps, 4):
                    project(
                        (dt_weight, dt_bias, projected, projected, projected, projected, dt),
                        (packed * rank * LANES, packed * LANES, rows[t], rows[t + 1], rows[t + 2], rows[t + 3],
                         t * LANES),
                        rank,
                    )  # fmt: skip
                softplus((dt, dt), (0, 0), steps)
                for t in range(steps):
                    tile, B_at, C_at = t * LANES, rows[t] + rank, rows[t] + rank + n
                    parameters = packed * n * LANES, packed * LANES, state_at * LANES
                    if len(prompt):
                        scan_step(
                            (dt, u_tile, A, D, state, projected, C_rows, out),
                            (tile, tile, parameters[0], parameters[1], parameters[2], B_at, t * n, tile),
                            n,
                        )
                    else:
                        scan_step(
                            (dt, u_tile, A, D, state, projected, projected, out),
                            (tile, tile, parameters[0], parameters[1], parameters[2], B_at, C_at, tile),
                            n,
                        )
                for t in range(steps):
                    pixel = pixels[t] if merge else pixels[t] + (image * (paths - 1) + path) * length
                    target = pixel * width + block * LANES
                    add = merge and path > 0
                    if lanes == LANES and add:
                        accumulate((out, y), (t * LANES, target), 0)
                    elif lanes == LANES:
                        copy((out, y), (t * LANES, target), 0)
                    else:
                        for lane in range(lanes):
                            y[target + lane] = out[t * LANES + lane] + (y[target + lane] if add else np.float32(0.0))

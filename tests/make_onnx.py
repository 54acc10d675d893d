"""Small ONNX files without the package onnx: the few protocol buffer messages of a network that takes a face.

Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FLOAT, INT, INTS = 1, 2, 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _tensor(name: str, values: np.ndarray) -> bytes:
    dims = b"".join(_number(1, side) for side in values.shape)
    return dims + _number(2, FLOAT) + _bytes(8, name) + _bytes(9, values.astype("<f4").tobytes())


def _whole(name: str, value: int) -> bytes:
    return _bytes(5, _bytes(1, name) + _number(3, value) + _number(20, INT))


def _wholes(name: str, values: list[int]) -> bytes:
    return _bytes(5, _bytes(1, name) + b"".join(_number(8, v) for v in values) + _number(20, INTS))


def _node(kind: str, inputs: list[str], output: str, attributes: bytes = b"") -> bytes:
    wires = b"".join(_bytes(1, name) for name in inputs) + _bytes(2, output)
    return _bytes(1, wires + _bytes(3, f"{kind} {output}") + _bytes(4, kind) + attributes)


def _value(name: str, shape: list[int]) -> bytes:
    sides = b"".join(_bytes(1, _number(1, side)) for side in shape)
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, FLOAT) + _bytes(2, sides)))


def write_recogniser(path: Path, features: int = 8, flat: bool = True) -> Path:
    """Convolution, rectifier, means over four quarters, flattened or not: [1, 3, 112, 112] in 0..255 to 4 `features` numbers."""
    generator = np.random.default_rng(0)
    kernel = generator.standard_normal((features, 3, 8, 8)) / 255
    kernel -= kernel.mean((1, 2, 3), keepdims=True)
    bias = generator.standard_normal(features) / 8
    squares = [_wholes("kernel_shape", [n, n]) + _wholes("strides", [n, n]) for n in (8, 7)]
    shape = [1, 4 * features] if flat else [1, features, 2, 2]
    graph = (
        _node("Conv", ["data", "kernel", "bias"], "edges", squares[0])
        + _node("Relu", ["edges"], "positive")
        + _node("AveragePool", ["positive"], "means", squares[1])
        + (_node("Flatten", ["means"], "vector", _whole("axis", 1)) if flat else b"")
        + _bytes(2, "recogniser")
        + _bytes(5, _tensor("kernel", kernel))
        + _bytes(5, _tensor("bias", bias))
        + _bytes(11, _value("data", [1, 3, 112, 112]))
        + _bytes(12, _value("vector" if flat else "means", shape))
    )
    model = _number(1, 8) + _bytes(2, "mend-tests") + _bytes(7, graph) + _bytes(8, _bytes(1, "") + _number(2, 13))
    path.write_bytes(model)
    return path

"""Scratch memory of the vectorised kernels: the mirror of what their ``accepts_`` functions ask for.

The planner reserves exactly these bytes in the arena, so every figure here must equal the kernel's own, which is the
same for every instruction set. ``tests/native/test_workspace.py`` holds the two together: a kernel must accept a call
with these bytes and refuse it with fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from pockc.ir import TensorType

_FLOAT = 4
_GEMM_DEPTH = 256  # block of the inner dimension
_GEMM_COLUMNS = 384  # block of the columns of the right matrix
_GEMM_ROWS = 16  # most rows of any instruction set's tile
_GEMM_PADDING = 16  # floats between copied rows
_DEPTHWISE_UNITS = 4  # separately summed parts of a depthwise weight gradient
_NORM_UNITS = 4  # separately summed parts of a normalisation's gamma gradient
_SCORE_FLOATS = 32768  # of a block of attention scores, where sequences are long

Types = Sequence[TensorType]
Attributes = Mapping[str, Any]


def workspace_bytes(op: str, input_types: Types, output_types: Types, attrs: Attributes, threads: int) -> int:
    """Bytes of workspace that the vectorised kernel of a call asks for.

    Args:
        op: name in the op table.
        input_types: operand types in the call's order.
        output_types: result types in the call's order.
        attrs: the node's attributes by name.
        threads: most threads that the program may run on, at least 1.

    Returns:
        The byte count, a multiple of 64; 0 for kernels without scratch and for ops that have reference kernels alone.

    Raises:
        ValueError: if ``threads`` is below 1.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    rule = _RULES.get(op)
    if rule is None or any(t.elements == 0 for t in (*input_types, *output_types)):
        return 0
    return rule(input_types, output_types, attrs, threads)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _gemm(columns: int, depth: int) -> int:
    """Bytes that one thread needs for a product with that many columns and that inner dimension."""
    block = min(depth, _GEMM_DEPTH)
    left = _GEMM_ROWS * (block + _GEMM_PADDING)
    right = block * min(_round_up(columns, 16), _GEMM_COLUMNS)
    return _FLOAT * _round_up(left + right, 16)


def _matmul(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    depth = inputs[0].shape[-2 if attrs["transpose_a"] else -1]
    return threads * _gemm(outputs[0].shape[-1], depth)


def _is_depthwise(channels: int, out_channels: int, groups: int) -> bool:
    return groups > 1 and groups == channels == out_channels


def _depthwise(channels: int, kernel: tuple[int, ...]) -> int:
    return _FLOAT * _round_up(prod(kernel) * channels, 16)


def _conv2d(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    channels, weight, groups = inputs[0].shape[3], inputs[1].shape, attrs["groups"]
    if _is_depthwise(channels, weight[0], groups):
        return _depthwise(channels, weight[1:3])
    return threads * _gemm(weight[0] // groups, prod(weight[1:]))


def _conv2d_grad_input(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    channels, weight, groups = outputs[0].shape[3], inputs[1].shape, attrs["groups"]
    if _is_depthwise(channels, weight[0], groups):
        return _depthwise(channels, weight[1:3])
    return threads * _gemm(weight[3], prod(weight[1:3]) * (weight[0] // groups))


def _conv2d_grad_weight(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    channels, weight, groups = inputs[0].shape[3], outputs[0].shape, attrs["groups"]
    if _is_depthwise(channels, weight[0], groups):
        return _DEPTHWISE_UNITS * _depthwise(channels, weight[1:3])
    return threads * _gemm(prod(weight[1:]), prod(inputs[1].shape[:3]))


def _sums_of_units(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    return _FLOAT * _NORM_UNITS * _round_up(inputs[0].shape[-1], 16)


def _batch_norm_grad_input(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    return _FLOAT * 2 * _round_up(inputs[0].shape[-1], 16)


def _cross_entropy(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    return _FLOAT * _round_up(inputs[0].shape[0], 16)


def _score_block(queries: int, keys: int) -> tuple[int, int]:
    """Query rows of one block of attention scores, and its bytes."""
    rows = min(queries, max(8, min(64, _SCORE_FLOATS // keys)))
    return rows, _FLOAT * rows * _round_up(keys, 16)


def _attention(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    queries, depth = inputs[0].shape[2:]
    keys, value_depth = inputs[2].shape[2:]
    _, block = _score_block(queries, keys)
    return threads * (block + max(_gemm(keys, depth), _gemm(value_depth, keys)))


def _attention_grad(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    queries, depth = inputs[1].shape[2:]
    keys, value_depth = inputs[3].shape[2:]
    rows, block = _score_block(queries, keys)
    products = ((keys, depth), (keys, value_depth), (depth, keys), (depth, rows), (value_depth, rows))
    return threads * (2 * block + max(_gemm(columns, inner) for columns, inner in products))


_RULES: dict[str, Callable[[Types, Types, Attributes, int], int]] = {
    "matmul": _matmul,
    "conv2d": _conv2d,
    "conv2d_grad_input": _conv2d_grad_input,
    "conv2d_grad_weight": _conv2d_grad_weight,
    "layer_norm_grad_gamma": _sums_of_units,
    "rms_norm_grad_gamma": _sums_of_units,
    "batch_norm_grad_input": _batch_norm_grad_input,
    "cross_entropy": _cross_entropy,
    "attention": _attention,
    "attention_grad": _attention_grad,
}

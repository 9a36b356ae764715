"""Scratch memory of the vectorised kernels: the mirror of what their ``accepts_`` functions ask for.

The planner reserves exactly these bytes in the arena, so every figure here must equal the kernel's own, which is the
same for every instruction set. ``tests/native/test_workspace.py`` holds the two together: a kernel must accept a call
with these bytes and refuse it with fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from pockc.ir import TensorType

_FLOAT = 4
_GEMM_DEPTH = 256  # block of the inner dimension
_GEMM_WORK = 256 * 1024  # multiply-adds from which on a product uses several threads
_GEMM_ROWS = 16  # most rows of any instruction set's tile
_GEMM_GROUPED_ROWS = 32  # of a transposed left matrix are copied together, where a thread has many of them
_GEMM_PADDING = 16  # floats between copied rows
_SUM_FLOATS = 64 * 1024  # of a result in 16 bits, before it is rounded
_DEPTHWISE_UNITS = 4  # separately summed parts of a depthwise weight gradient
_NORM_UNITS = 4  # separately summed parts of a normalisation's gamma gradient
_SCORE_QUERIES, _SCORE_KEYS = 64, 256  # of a tile of attention scores
_SCORE_PADDING = 16  # floats between its rows
_WINOGRAD_INPUTS = 64 * 1024  # most floats of transformed inputs at a time
_WINOGRAD_WEIGHTS = 128 * 1024  # and of transformed weights
_WINOGRAD_TILES = 64  # that are transformed at a time, at least
_WINOGRAD_COLUMNS = 48  # of the weight, likewise
_WINOGRAD_PADDING = 16  # floats between the places of a tile

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


def _block_columns(rows: int, copied: bool) -> int:
    """Columns of one block of the right matrix where a thread has that many rows of the left one."""
    if copied:
        return 192 if rows <= 192 else 384
    return next((columns for most, columns in ((64, 48), (256, 96), (512, 192)) if rows <= most), 384)


def _part(
    rows: int, columns: int, depth: int, copied: bool, *, transposed: bool = False, narrowed: bool = False
) -> int:
    """Bytes that one thread needs for a product.

    ``copied`` where panels of the left matrix are copied, ``narrowed`` where sums wait to be rounded to 16 bits.
    """
    block, widest = min(depth, _GEMM_DEPTH), _block_columns(rows, copied)
    copied_rows = (_GEMM_GROUPED_ROWS if transposed and widest == 384 else _GEMM_ROWS) if copied else 0
    left, across = copied_rows * (block + _GEMM_PADDING), min(_round_up(columns, 16), widest)
    sums = min(rows, _SUM_FLOATS // across) * across if narrowed else 0
    return _FLOAT * (_round_up(left + block * across, 16) + _round_up(sums, 16))


def _gemm(rows: int, columns: int, depth: int, copied: bool, threads: int, **how: bool) -> int:
    """Bytes for a product on that many threads, or on fewer."""
    alone = _part(rows, columns, depth, copied, **how)
    if rows * columns * depth < _GEMM_WORK:
        return alone
    splits_rows = 2 * rows >= columns
    shares = ((count, -(-rows // count) if splits_rows else rows) for count in range(2, threads + 1))
    return max(alone, *(count * _part(share, columns, depth, copied, **how) for count, share in shares), 0)


def _conflicts(stride: int) -> bool:
    """Whether rows that far apart lie on the same cache sets: such a matrix is copied."""
    return stride % 1024 == 0


def _matmul(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    left, out = inputs[0].shape, outputs[0].shape
    transposed = attrs["transpose_a"]
    rows, columns, depth, batch = out[-2], out[-1], left[-2 if transposed else -1], prod(out[:-2])
    if len(inputs[1].shape) == 2 and len(left) == len(out) and not transposed:
        rows, batch = rows * batch, 1
    copied = transposed or inputs[0].is_half or _conflicts(left[-1])
    how = {"transposed": transposed, "narrowed": outputs[0].is_half}
    whole_items = min(threads, batch) * _part(rows, columns, depth, copied, **how)
    if batch > 1 and batch >= threads:
        return whole_items
    return max(whole_items, _gemm(rows, columns, depth, copied, threads, **how))


def _is_depthwise(channels: int, out_channels: int, groups: int) -> bool:
    return groups > 1 and groups == channels == out_channels


def _depthwise(channels: int, kernel: tuple[int, ...]) -> int:
    return _FLOAT * _round_up(prod(kernel) * channels, 16)


def _is_pointwise(weight: tuple[int, ...], attrs: Attributes) -> bool:
    return prod(weight[1:3]) == 1 and tuple(attrs["stride"]) == (1, 1) and not any(attrs["padding"])


def _conv2d(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    channels, weight, groups = inputs[0].shape[3], inputs[1].shape, attrs["groups"]
    if _is_depthwise(channels, weight[0], groups):
        return _depthwise(channels, weight[1:3])
    copied = not _is_pointwise(weight, attrs) or inputs[0].is_half or _conflicts(channels)
    rows, columns, depth = prod(outputs[0].shape[:3]), weight[0] // groups, prod(weight[1:])
    return _gemm(rows, columns, depth, copied, threads, narrowed=outputs[0].is_half)


def _phases(size: int, weight: tuple[int, ...], attrs: Attributes, axis: int) -> list[tuple[int, int]]:
    """Of one axis, for each remainder of a position by the stride: how many positions, and how many taps reach them."""
    stride, padding, dilation = attrs["stride"][axis], attrs["padding"][2 * axis], attrs["dilation"][axis]
    return [
        (
            -(-(size - phase) // stride),
            sum((phase + padding - r * dilation) % stride == 0 for r in range(weight[1 + axis])),
        )
        for phase in range(min(stride, size))
    ]


def _conv2d_grad_input(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    channels, weight, groups = outputs[0].shape[3], inputs[1].shape, attrs["groups"]
    if _is_depthwise(channels, weight[0], groups):
        return _depthwise(channels, weight[1:3])
    copied = not _is_pointwise(weight, attrs) or inputs[0].is_half or _conflicts(weight[0])
    narrowed = outputs[0].is_half
    batch, height, width, _ = outputs[0].shape
    down, across = (_phases(size, weight, attrs, axis) for axis, size in enumerate((height, width)))
    products = ((batch * h * w, r * s * (weight[0] // groups)) for (h, r), (w, s) in product(down, across) if r * s)
    sizes = (_gemm(rows, weight[3], depth, copied, threads, narrowed=narrowed) for rows, depth in products)
    return max(sizes, default=0)


def _conv2d_grad_weight(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    channels, weight, groups = inputs[0].shape[3], outputs[0].shape, attrs["groups"]
    if _is_depthwise(channels, weight[0], groups):
        return _DEPTHWISE_UNITS * _depthwise(channels, weight[1:3])
    pixels = prod(inputs[1].shape[:3])
    return _gemm(weight[0] // groups, prod(weight[1:]), pixels, True, threads, transposed=True)


def _block_of(count: int, most: int, least: int) -> int:
    """As many of ``count`` at a time, in nearly equal blocks."""
    return _round_up(-(-count // -(-count // max(most, least))), 16)


def _conv2d_winograd(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    depth, (batch, height, width, columns) = inputs[0].shape[3], outputs[0].shape
    size: int = attrs["outputs"]
    places, tiles = (size + 2) ** 2, batch * -(-height // size) * -(-width // size)
    rows = _block_of(tiles, _WINOGRAD_INPUTS // (places * depth), _WINOGRAD_TILES)
    across = _block_of(columns, _WINOGRAD_WEIGHTS // (places * depth), _WINOGRAD_COLUMNS)
    kept = places * (rows * depth + depth * across + rows * across + 3 * _WINOGRAD_PADDING)
    running = threads if places * rows * across * depth >= _GEMM_WORK else 1
    return _FLOAT * kept + running * _part(rows, across, depth, _conflicts(depth))


def _sums_of_units(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    return _FLOAT * _NORM_UNITS * _round_up(inputs[0].shape[-1], 16)


def _batch_norm_grad_input(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    return _FLOAT * 2 * _round_up(inputs[0].shape[-1], 16)


def _cross_entropy(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    return _FLOAT * _round_up(inputs[0].shape[0], 16)


def _score_tile(queries: int, keys: int) -> tuple[int, int, int]:
    """Queries and keys of one tile of attention scores, and its bytes."""
    rows, columns = min(queries, _SCORE_QUERIES), min(keys, _SCORE_KEYS)
    return rows, columns, _FLOAT * rows * (_round_up(columns, 16) + _SCORE_PADDING)


def _attention(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    queries, depth = inputs[0].shape[2:]
    keys, value_depth = inputs[2].shape[2:]
    rows, columns, tile = _score_tile(queries, keys)
    sums = _FLOAT * _round_up(rows * value_depth, 16) if outputs[0].is_half else 0
    products = (_part(rows, columns, depth, copied=True), _part(rows, value_depth, columns, copied=True))
    return threads * (tile + sums + max(products))


def _attention_grad(inputs: Types, outputs: Types, attrs: Attributes, threads: int) -> int:
    queries, depth = inputs[1].shape[2:]
    keys, value_depth = inputs[3].shape[2:]
    rows, columns, tile = _score_tile(queries, keys)
    widest = max(depth, value_depth)
    products = (_part(rows, across, inner, copied=True) for across, inner in ((columns, widest), (depth, columns)))
    scratch = max(*products, _part(columns, widest, rows, copied=True, transposed=True))
    return threads * (2 * tile + scratch)


_RULES: dict[str, Callable[[Types, Types, Attributes, int], int]] = {
    "matmul": _matmul,
    "conv2d": _conv2d,
    "conv2d_grad_input": _conv2d_grad_input,
    "conv2d_grad_input_masked": _conv2d_grad_input,
    "conv2d_grad_weight": _conv2d_grad_weight,
    "conv2d_winograd": _conv2d_winograd,
    "layer_norm_grad_gamma": _sums_of_units,
    "rms_norm_grad_gamma": _sums_of_units,
    "batch_norm_grad_input": _batch_norm_grad_input,
    "cross_entropy": _cross_entropy,
    "attention": _attention,
    "attention_grad": _attention_grad,
}

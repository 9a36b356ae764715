"""Which rows of their operands image operators need for some rows of their result, for the pass that cuts strips.

The *row axis* of a tensor of images is the one that counts lines from top to bottom: axis 1 of N, H, W, C, axis 2 of
the N, C, H, W that many models take. Everything else an operand may be depends on no input, and is read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from pockc.ir import Node, Value

Rows = tuple[int, int]  # the first, and behind the last
Axes = Mapping[Value, int]  # the row axis of each value that has one

UNARY = frozenset(
    {
        "neg", "abs", "sign", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "sigmoid", "erf",
        "softplus", "floor", "silu", "hardswish", "hardsigmoid", "gelu", "leaky_relu", "elu", "pow_scalar", "clip",
        "cast", "copy", "quantize", "dequantize", "lookup_int8",
    }
)  # fmt: skip
BINARY = frozenset({"add", "sub", "mul", "div", "maximum", "minimum", "add_int8"})
WINDOWS = frozenset({"conv2d", "conv2d_int8", "max_pool2d", "max_pool2d_int8", "avg_pool2d"})


@dataclass(frozen=True, slots=True)
class Reading:
    """What a node reads to make a strip: by operand the rows, or None for all of it; and its attributes for that."""

    rows: tuple[Rows | None, ...]
    attrs: Mapping[str, Any]


def row_axis(node: Node, axes: Axes, independent: AbstractSet[Value]) -> int | None:
    """The row axis of a node's results; None for a node that cannot make them strip by strip."""
    if not all(value in axes or value in independent for value in node.inputs):
        return None
    rule = _AXES.get(node.op)
    return rule(node, axes) if rule is not None else None


def reading(node: Node, axes: Axes, rows: Rows) -> Reading:
    """What a node of which `row_axis` is known reads to make these rows of its results."""
    if node.op in WINDOWS:
        return _window(node, rows)
    return Reading(tuple(rows if value in axes else None for value in node.inputs), node.attrs)


def _window(node: Node, rows: Rows) -> Reading:
    """A sliding window: out[i] reads x[i * stride - top + t * dilation] for the taps t = 0 ... kernel - 1."""
    x, *others = node.inputs
    height = x.type.shape[1]
    kernel = _kernel_height(node)
    stride, dilation = node.attrs["stride"][0], node.attrs.get("dilation", (1, 1))[0]
    top, _, left, right = node.attrs["padding"]
    first = rows[0] * stride - top
    end = (rows[1] - 1) * stride - top + (kernel - 1) * dilation + 1
    padding = (max(0, -first), max(0, end - height), left, right)
    return Reading(((max(0, first), min(height, end)), *(None for _ in others)), {**node.attrs, "padding": padding})


def _kernel_height(node: Node) -> int:
    if node.op in ("conv2d", "conv2d_int8"):  # a weight begins with its filters, or with its kernel
        return node.inputs[1].type.shape[1 if node.op == "conv2d" else 0]
    height: int = node.attrs["kernel"][0]
    return height


def _same_axis(node: Node, axes: Axes) -> int | None:
    return axes.get(node.inputs[0])


def _channels_last(node: Node, axes: Axes) -> int | None:
    """Windows slide over axis 1; weights and biases have no rows."""
    known = [axes.get(value) for value in node.inputs]
    return 1 if known == [1, *(None for _ in known[1:])] else None


def _aligned(node: Node, axes: Axes) -> int | None:
    """Operands with the rows of the result, or without any: such as a factor per channel."""
    shape = node.outputs[0].type.shape
    found = {axes[value] for value in node.inputs if value in axes}
    if len(found) != 1:
        return None
    axis = found.pop()
    for value in node.inputs:
        own = axis - (len(shape) - len(value.type.shape))  # operands are aligned at their last axis
        size = value.type.shape[own] if own >= 0 else 1
        if size != (shape[axis] if value in axes else 1):
            return None
    return axis


def _transposed(node: Node, axes: Axes) -> int | None:
    permutation: tuple[int, ...] = node.attrs["permutation"]
    return permutation.index(axes[node.inputs[0]]) if node.inputs[0] in axes else None


_AXES: dict[str, Callable[[Node, Axes], int | None]] = {
    **dict.fromkeys(UNARY, _same_axis),
    **dict.fromkeys(BINARY, _aligned),
    **dict.fromkeys(WINDOWS, _channels_last),
    "transpose": _transposed,
}

"""Reductions and scans. Axes are given sorted, non-negative and non-empty."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import f32, i64, require, require_axis, require_dtype, reshaped, scaled, unary_vjp

if TYPE_CHECKING:
    from pockc.ops import TypeRule


def _reduce_rule(*dtypes: str) -> TypeRule:
    def rule(x: TensorType, *, axes: tuple[int, ...], keepdims: bool = False) -> TensorType:
        require_dtype("x", x, *dtypes)
        require(len(axes) > 0, "there are no axes to reduce over")
        require(list(axes) == sorted(set(axes)), f"the axes {axes} must be distinct and in rising order")
        for axis in axes:
            require_axis(axis, len(x.shape))
        return TensorType(_reduced_shape(x.shape, axes, keepdims), x.dtype)

    return rule


def _reduced_shape(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> tuple[int, ...]:
    if keepdims:
        return tuple(1 if i in axes else size for i, size in enumerate(shape))
    return tuple(size for i, size in enumerate(shape) if i not in axes)


def _with_unit_axes(b: Builder, node: Node, value: Value) -> Value:
    """A value of the output's shape with the reduced axes kept as 1, so that it broadcasts against the input."""
    return reshaped(b, value, _reduced_shape(node.inputs[0].type.shape, node.attrs["axes"], True))


def _sum_gradient(b: Builder, node: Node, ct: Value) -> Value:
    return b("expand", _with_unit_axes(b, node, ct), shape=node.inputs[0].type.shape)


def _mean_gradient(b: Builder, node: Node, ct: Value) -> Value:
    count = prod(node.inputs[0].type.shape[axis] for axis in node.attrs["axes"])
    return _sum_gradient(b, node, scaled(b, ct, 1 / count))


# Every element equal to the maximum takes an equal share of the cotangent, as in torch.amax.
def _max_gradient(b: Builder, node: Node, ct: Value) -> Value:
    x = node.inputs[0]
    is_maximum = b("cast", b("equal", x, _with_unit_axes(b, node, node.outputs[0])), dtype="f32")
    ties = b("reduce_sum", is_maximum, axes=node.attrs["axes"], keepdims=True)
    return b("mul", is_maximum, b("div", _with_unit_axes(b, node, ct), ties))


_SHAPES_AND_AXES = (((3, 5), (0,)), ((2, 3, 4, 5), (0, 1, 2)), ((2, 3, 4), (2,)), ((2, 3, 4), (0, 2)), ((7,), (0,)))
_ATTRS = [(f32(*shape), {"axes": axes, "keepdims": keep}) for shape, axes in _SHAPES_AND_AXES for keep in (False, True)]


def _sum(x: Array, *, axes: tuple[int, ...], keepdims: bool = False) -> Array:
    return np.asarray(np.sum(x, axes, dtype=x.dtype, keepdims=keepdims))


def _mean(x: Array, *, axes: tuple[int, ...], keepdims: bool = False) -> Array:
    return np.asarray(np.mean(x, axes, keepdims=keepdims))


def _max(x: Array, *, axes: tuple[int, ...], keepdims: bool = False) -> Array:
    return np.asarray(np.max(x, axes, keepdims=keepdims))


define(
    "reduce_sum",
    type_rule=_reduce_rule("f32", "i64"),
    reference=_sum,
    vjp=unary_vjp(_sum_gradient),
    samples=[
        *(Sample((x,), a, lambda t, x, a=a: x.sum(a["axes"], a["keepdims"]), (0,)) for x, a in _ATTRS),
        Sample((i64(3, 4),), {"axes": (1,)}, lambda t, x: x.sum(1)),
    ],
)
define(
    "reduce_mean",
    type_rule=_reduce_rule("f32"),
    reference=_mean,
    vjp=unary_vjp(_mean_gradient),
    samples=[Sample((x,), a, lambda t, x, a=a: x.mean(a["axes"], a["keepdims"]), (0,)) for x, a in _ATTRS],
)
define(
    "reduce_max",
    type_rule=_reduce_rule("f32"),
    reference=_max,
    vjp=unary_vjp(_max_gradient),
    samples=[Sample((x,), a, lambda t, x, a=a: x.amax(a["axes"], a["keepdims"]), (0,)) for x, a in _ATTRS],
    saves="x, y",
)


def _argmax_rule(x: TensorType, *, axis: int) -> TensorType:
    require_dtype("x", x, "f32")
    require_axis(axis, len(x.shape))
    return TensorType(_reduced_shape(x.shape, (axis,), False), "i64")


def _argmax(x: Array, *, axis: int) -> Array:
    return np.asarray(np.argmax(x, axis), dtype=np.int64)


define(
    "argmax",
    type_rule=_argmax_rule,
    reference=_argmax,
    samples=[
        Sample((f32(5, 7),), {"axis": 1}, lambda t, x: x.argmax(1)),
        Sample((f32(2, 3, 4),), {"axis": 1}, lambda t, x: x.argmax(1)),
        Sample((np.array([1, 3, 3, 2], np.float32),), {"axis": 0}, lambda t, x: x.argmax(0)),
    ],
)


def _sum_squares_rule(x: TensorType) -> TensorType:
    require_dtype("x", x, "f32")
    return TensorType((), "f32")


def _sum_squares(x: Array) -> Array:
    return np.asarray(np.sum(x * x))


define(
    "sum_squares",
    type_rule=_sum_squares_rule,
    reference=_sum_squares,
    vjp=unary_vjp(lambda b, node, ct: b("mul", node.inputs[0], scaled(b, ct, 2.0))),
    samples=[Sample((x,), {}, lambda t, x: (x * x).sum(), (0,)) for x in (f32(3, 5), f32(100), f32())],
    saves="x",
)


def _cumsum_rule(x: TensorType, *, axis: int) -> TensorType:
    require_dtype("x", x, "f32", "i64")
    require_axis(axis, len(x.shape))
    return x


# y_j = sum_{i <= j} x_i, so dL/dx_i = sum_{j >= i} ct_j: the total, less the running sum, plus ct_i itself.
def _cumsum_gradient(b: Builder, node: Node, ct: Value) -> Value:
    axis = node.attrs["axis"]
    total = b("reduce_sum", ct, axes=(axis,), keepdims=True)
    return b("add", b("sub", total, b("cumsum", ct, axis=axis)), ct)


def _cumsum(x: Array, *, axis: int) -> Array:
    return np.cumsum(x, axis, dtype=x.dtype)


define(
    "cumsum",
    type_rule=_cumsum_rule,
    reference=_cumsum,
    vjp=unary_vjp(_cumsum_gradient),
    samples=[
        Sample((f32(3, 5),), {"axis": 1}, lambda t, x: x.cumsum(1), (0,)),
        Sample((f32(2, 4, 3),), {"axis": 1}, lambda t, x: x.cumsum(1), (0,)),
        Sample((i64(2, 6),), {"axis": 1}, lambda t, x: x.cumsum(1)),
    ],
)

"""Softmax and its logarithm over the last axis."""

from __future__ import annotations

import numpy as np

from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import f32, gradient_rule, require, require_dtype, unary_vjp


def _softmax_rule(x: TensorType) -> TensorType:
    require_dtype("x", x, "f32")
    require(len(x.shape) > 0, "softmax needs at least one axis")
    return x


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    weights = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def log_softmax(x: Array) -> Array:
    """The logarithm of the softmax over the last axis."""
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


# y_i = exp(x_i) / sum_k exp(x_k), so dy_j/dx_i = y_j ([i = j] - y_i) and dL/dx_i = y_i (ct_i - sum_j ct_j y_j).
def _softmax_grad(ct: Array, y: Array) -> Array:
    return np.asarray(y * (ct - (ct * y).sum(-1, keepdims=True)))


# y_j = x_j - log sum_k exp(x_k), so dy_j/dx_i = [i = j] - exp(y_i) and dL/dx_i = ct_i - exp(y_i) sum_j ct_j.
def _log_softmax_grad(ct: Array, y: Array) -> Array:
    return np.asarray(ct - np.exp(y) * ct.sum(-1, keepdims=True))


def _softmax_gradient(b: Builder, node: Node, ct: Value) -> Value:
    return b(f"{node.op}_grad", ct, node.outputs[0])


_SHAPES = (f32(3, 5), f32(2, 3, 17), f32(1), f32(100))

define(
    "softmax",
    type_rule=_softmax_rule,
    reference=softmax,
    vjp=unary_vjp(_softmax_gradient),
    samples=[Sample((x,), {}, lambda t, x: x.softmax(-1), (0,), -8.0, 8.0) for x in _SHAPES],
    in_place=(0,),
    saves="y",
)
define(
    "softmax_grad",
    type_rule=gradient_rule,
    reference=_softmax_grad,
    samples=[
        Sample((x, x), torch=lambda t, ct, y: t.ops.aten._softmax_backward_data(ct, y, -1, y.dtype)) for x in _SHAPES
    ],
    in_place=(0,),
)
define(
    "log_softmax",
    type_rule=_softmax_rule,
    reference=log_softmax,
    vjp=unary_vjp(_softmax_gradient),
    samples=[Sample((x,), {}, lambda t, x: x.log_softmax(-1), (0,), -8.0, 8.0) for x in _SHAPES],
    in_place=(0,),
    saves="y",
)
define(
    "log_softmax_grad",
    type_rule=gradient_rule,
    reference=_log_softmax_grad,
    samples=[
        Sample((x, x), torch=lambda t, ct, y: t.ops.aten._log_softmax_backward_data(ct, y, -1, y.dtype))
        for x in _SHAPES
    ],
    in_place=(0,),
)

"""Matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pockc.errors import InternalError
from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.activation import apply_epilogue, require_epilogue, torch_epilogue
from pockc.ops.common import (
    Cotangents,
    Gradients,
    Need,
    broadcast,
    cotangent_of,
    f32,
    require,
    require_dtype,
    require_type,
    require_weight,
    reshaped,
    unbroadcast,
)


def _matmul_rule(
    a: TensorType,
    b: TensorType,
    bias: TensorType | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    activation: str = "none",
    low: float = 0.0,
    high: float = 0.0,
) -> TensorType:
    require_dtype("a", a, "f32")
    require_weight("b", b)
    require(len(b.shape) == 2 or not b.is_compact, f"a compact b must be one matrix, not {b}")
    require(min(len(a.shape), len(b.shape)) >= 2, f"the operands must have at least two axes, not {a} and {b}")
    rows, inner_a = _matrix_shape(a, transpose_a)
    inner_b, columns = _matrix_shape(b, transpose_b)
    require(inner_a == inner_b, f"the inner sizes {inner_a} and {inner_b} of {a} and {b} differ")
    if bias is not None:
        require_type("the bias", bias, f32(columns))
    require_epilogue(activation, low, high)
    return f32(*broadcast(a.shape[:-2], b.shape[:-2]), rows, columns)


def _matrix_shape(x: TensorType, transposed: bool) -> tuple[int, int]:
    rows, columns = x.shape[-2:]
    return (columns, rows) if transposed else (rows, columns)


def _matmul(
    a: Array,
    b: Array,
    bias: Array | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    activation: str = "none",
    low: float = 0.0,
    high: float = 0.0,
) -> Array:
    y = np.matmul(a.swapaxes(-1, -2) if transpose_a else a, b.swapaxes(-1, -2) if transpose_b else b)
    if bias is not None:
        y = y + bias
    return apply_epilogue(y, activation, low, high)


def _matmul_vjp(builder: Builder, node: Node, cotangents: Cotangents, need: Need) -> Gradients:
    if len(node.inputs) > 2 or node.attrs["activation"] != "none":
        raise InternalError(f"{node.origin}: a fused matmul has no gradient: fuse after differentiation")
    ct = cotangent_of(node, cotangents)
    left = _left_gradient(builder, node, ct) if 0 in need else None
    right = _right_gradient(builder, node, ct) if 1 in need else None
    return left, right


# With y = A B, dL/dA = ct B^T and dL/dB = A^T ct. Where an operand is stored transposed, its gradient is the transpose
# of that: (ct B^T)^T = B ct^T and (A^T ct)^T = ct^T A. So every case is one matmul with the right flags.
def _left_gradient(builder: Builder, node: Node, ct: Value) -> Value:
    a, b = node.inputs
    transpose_a, transpose_b = node.attrs["transpose_a"], node.attrs["transpose_b"]
    if transpose_a:
        gradient = builder("matmul", b, ct, transpose_a=transpose_b, transpose_b=True)
    else:
        gradient = builder("matmul", ct, b, transpose_b=not transpose_b)
    return unbroadcast(builder, gradient, a.type.shape)


def _right_gradient(builder: Builder, node: Node, ct: Value) -> Value:
    a, b = node.inputs
    transpose_a, transpose_b = node.attrs["transpose_a"], node.attrs["transpose_b"]
    # The weight of a linear layer: one product over all rows, instead of one per batch entry and their sum.
    if len(b.type.shape) == 2 and not transpose_a:
        a = reshaped(builder, a, (a.type.elements // a.type.shape[-1], a.type.shape[-1]))
        ct = reshaped(builder, ct, (ct.type.elements // ct.type.shape[-1], ct.type.shape[-1]))
    if transpose_b:
        gradient = builder("matmul", ct, a, transpose_a=True, transpose_b=transpose_a)
    else:
        gradient = builder("matmul", a, ct, transpose_a=not transpose_a)
    return unbroadcast(builder, gradient, b.type.shape)


def _sample(a: TensorType, b: TensorType, *, fused: bool = False, **attrs: Any) -> Sample:
    columns = b.shape[-2 if attrs.get("transpose_b") else -1]
    operands = (a, b, f32(columns)) if fused else (a, b)
    return Sample(operands, attrs, _torch_matmul(attrs), () if fused else (0, 1))


def _torch_matmul(attrs: Mapping[str, Any]) -> Any:
    def run(torch: Any, a: Any, b: Any, bias: Any = None) -> Any:
        a = a.mT if attrs.get("transpose_a") else a
        b = b.mT if attrs.get("transpose_b") else b
        y = torch.matmul(a, b) + (0 if bias is None else bias)
        return torch_epilogue(torch, y, attrs.get("activation", "none"), attrs.get("low", 0.0), attrs.get("high", 0.0))

    return run


define(
    "matmul",
    type_rule=_matmul_rule,
    reference=_matmul,
    vjp=_matmul_vjp,
    samples=[
        _sample(f32(3, 4), f32(4, 5)),
        _sample(f32(4, 3), f32(4, 5), transpose_a=True),
        _sample(f32(3, 4), f32(5, 4), transpose_b=True),
        _sample(f32(4, 3), f32(5, 4), transpose_a=True, transpose_b=True),
        _sample(f32(2, 3, 4), f32(5, 4), transpose_b=True),
        _sample(f32(2, 2, 3, 4), f32(4, 5)),
        _sample(f32(2, 4, 3), f32(4, 5), transpose_a=True),
        _sample(f32(2, 4, 3), f32(5, 4), transpose_a=True, transpose_b=True),
        _sample(f32(3, 4), f32(2, 4, 5)),
        _sample(f32(2, 3, 4), f32(2, 5, 4), transpose_b=True),
        _sample(f32(2, 1, 3, 4), f32(3, 4, 5)),
        _sample(f32(2, 4, 3), f32(2, 4, 5), transpose_a=True),
        _sample(f32(1, 7), f32(1, 7), transpose_b=True),
        _sample(f32(67, 45), f32(45, 33)),
        _sample(f32(3, 4), f32(4, 5), fused=True),
        _sample(f32(2, 3, 4), f32(5, 4), fused=True, transpose_b=True, activation="gelu"),
        _sample(f32(3, 4), f32(5, 4), fused=True, transpose_b=True, activation="gelu_tanh"),
        _sample(f32(3, 4), f32(4, 5), fused=True, activation="clip", low=-0.5, high=6.0),
        _sample(f32(3, 4), f32(4, 5), fused=True, activation="silu"),
        _sample(f32(3, 4), f32(4, 5), fused=True, activation="hardswish"),
    ],
    saves="a if b needs a gradient, b if a does",
    weight=1,
)

"""Elementwise arithmetic, comparison and selection; binary ops broadcast as numpy does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pockc.halves import HALF_DTYPES, is_half
from pockc.ir import NUMPY_DTYPES, Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import (
    Cotangents,
    Gradients,
    Need,
    boolean,
    broadcast,
    cotangent_of,
    f32,
    i64,
    require,
    require_dtype,
    same_type_rule,
    scaled,
    unary_vjp,
    unbroadcast,
)

if TYPE_CHECKING:
    from pockc.ops import Reference, TypeRule

# One operand


def erf(x: Array) -> Array:
    """The error function in the precision of ``x``; numpy has none."""
    values = np.frompyfunc(math.erf, 1, 1)(x)
    return np.asarray(values, dtype=x.dtype)


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))`` without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def softplus(x: Array) -> Array:
    """``log(1 + exp(x))`` without overflow."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _unary(
    name: str,
    reference: Reference,
    gradient: Callable[[Builder, Node, Value], Value | None],
    torch: Callable[..., Any],
    *,
    saves: str = "",
    low: float = -2.0,
    dtypes: tuple[str, ...] = ("f32",),
) -> None:
    shapes = (f32(3, 5), f32(17), f32())
    samples = [Sample((shape,), torch=torch, differentiable=(0,), low=low) for shape in shapes]
    if "i64" in dtypes:
        samples.append(Sample((np.arange(-3, 4),), torch=torch))
    define(
        name,
        type_rule=same_type_rule(*dtypes),
        reference=reference,
        vjp=unary_vjp(gradient),
        samples=samples,
        in_place=(0,),
        saves=saves,
    )


def _exp_gradient(b: Builder, node: Node, ct: Value) -> Value:
    return b("mul", ct, node.outputs[0])


def _sqrt_gradient(b: Builder, node: Node, ct: Value) -> Value:
    return b("div", scaled(b, ct, 0.5), node.outputs[0])


# y = x^(-1/2), so dy/dx = -1/2 x^(-3/2) = -1/2 y^3.
def _rsqrt_gradient(b: Builder, node: Node, ct: Value) -> Value:
    y = node.outputs[0]
    return b("mul", scaled(b, ct, -0.5), b("mul", y, b("mul", y, y)))


# y = 1/x, so dy/dx = -1/x^2 = -y^2.
def _reciprocal_gradient(b: Builder, node: Node, ct: Value) -> Value:
    y = node.outputs[0]
    return b("neg", b("mul", b("mul", ct, y), y))


def _erf_gradient(b: Builder, node: Node, ct: Value) -> Value:
    x = node.inputs[0]
    density = scaled(b, b("exp", b("neg", b("mul", x, x))), 2 / math.sqrt(math.pi))
    return b("mul", ct, density)


def _zero_gradient(b: Builder, node: Node, ct: Value) -> None:
    """Piecewise constant: the gradient is zero almost everywhere, hence absent."""


_unary("neg", np.negative, lambda b, n, ct: b("neg", ct), lambda t, x: -x, dtypes=("f32", "i64"))
_unary(
    "abs",
    np.abs,
    lambda b, n, ct: b("mul", ct, b("sign", n.inputs[0])),
    lambda t, x: x.abs(),
    saves="x",
    dtypes=("f32", "i64"),
)
_unary("sign", np.sign, _zero_gradient, lambda t, x: x.sign())
_unary("floor", np.floor, _zero_gradient, lambda t, x: x.floor())
_unary("exp", np.exp, _exp_gradient, lambda t, x: x.exp(), saves="y")
_unary("log", np.log, lambda b, n, ct: b("div", ct, n.inputs[0]), lambda t, x: x.log(), saves="x", low=0.1)
_unary("sqrt", np.sqrt, _sqrt_gradient, lambda t, x: x.sqrt(), saves="y", low=0.1)
_unary("rsqrt", lambda x: 1 / np.sqrt(x), _rsqrt_gradient, lambda t, x: x.rsqrt(), saves="y", low=0.1)
_unary("reciprocal", lambda x: 1 / x, _reciprocal_gradient, lambda t, x: 1 / x, saves="y", low=0.1)
_unary("sin", np.sin, lambda b, n, ct: b("mul", ct, b("cos", n.inputs[0])), lambda t, x: x.sin(), saves="x")
_unary("cos", np.cos, lambda b, n, ct: b("neg", b("mul", ct, b("sin", n.inputs[0]))), lambda t, x: x.cos(), saves="x")
_unary("erf", erf, _erf_gradient, lambda t, x: x.erf(), saves="x")
_unary(
    "softplus",
    softplus,
    lambda b, n, ct: b("mul", ct, b("sigmoid", n.inputs[0])),
    lambda t, x: t.nn.functional.softplus(x),
    saves="x",
)


def _pow_scalar_rule(x: TensorType, *, exponent: float) -> TensorType:
    require_dtype("x", x, "f32")
    return x


def _pow_scalar_gradient(b: Builder, node: Node, ct: Value) -> Value | None:
    exponent = node.attrs["exponent"]
    if exponent == 0:
        return None  # constant
    if exponent == 1:
        return ct
    x = node.inputs[0]
    power = x if exponent == 2 else b("pow_scalar", x, exponent=exponent - 1.0)
    return b("mul", ct, scaled(b, power, exponent))


define(
    "pow_scalar",
    type_rule=_pow_scalar_rule,
    reference=lambda x, *, exponent: x**exponent,
    vjp=unary_vjp(_pow_scalar_gradient),
    samples=[
        Sample((f32(4, 3),), {"exponent": e}, lambda t, x, e=e: x**e, (0,), low=low)
        for e, low in ((2.0, -2.0), (3.0, -2.0), (0.5, 0.1), (-1.5, 0.1), (1.0, -2.0), (0.0, 0.1))
    ],
    in_place=(0,),
    saves="x",
)


# Two operands


def _binary_rule(*dtypes: str) -> TypeRule:
    def rule(a: TensorType, b: TensorType) -> TensorType:
        require_dtype("a", a, *dtypes)
        require(a.dtype == b.dtype, f"the operands must have one element type, not {a} and {b}")
        return TensorType(broadcast(a.shape, b.shape), a.dtype)

    return rule


def _binary(
    name: str,
    reference: Reference,
    left: Callable[[Builder, Node, Value], Value],
    right: Callable[[Builder, Node, Value], Value],
    torch: Callable[..., Any],
    *,
    saves: str = "",
    low: float = -2.0,
    integers: bool = True,
    linear: bool = False,
) -> None:
    """Define a binary op from the gradients of its operands.

    Those have the shape of the output and are summed to that of the operand; where they read nothing but the cotangent
    (``linear``), that is summed first, so that they have less to do.
    """

    def vjp(builder: Builder, node: Node, cotangents: Cotangents, need: Need) -> Gradients:
        ct = cotangent_of(node, cotangents)
        gradients: list[Value | None] = [None, None]
        for i, rule in enumerate((left, right)):
            shape = node.inputs[i].type.shape
            if i in need and linear:
                gradients[i] = rule(builder, node, unbroadcast(builder, ct, shape))
            elif i in need:
                gradients[i] = unbroadcast(builder, rule(builder, node, ct), shape)
        return gradients

    shapes = [
        (f32(3, 5), f32(3, 5)),
        (f32(2, 3, 5), f32(5)),
        (f32(3, 1), f32(2, 1, 5)),
        (f32(), f32(4)),
        (f32(2, 1, 3), f32(1, 1, 3)),
    ]
    samples = [Sample(operands, torch=torch, differentiable=(0, 1), low=low) for operands in shapes]
    if integers:
        samples += [Sample((i64(2, 3), i64(3)), torch=torch), Sample((TensorType((4,), "i32"),) * 2, torch=torch)]
    define(
        name,
        type_rule=_binary_rule(*(("f32", "i64", "i32") if integers else ("f32",))),
        reference=reference,
        vjp=vjp,
        samples=samples,
        in_place=(0, 1),
        saves=saves,
    )


# y = a/b: dy/da = 1/b, dy/db = -a/b^2 = -y/b.
def _div_left(b: Builder, node: Node, ct: Value) -> Value:
    return b("div", ct, node.inputs[1])


def _div_right(b: Builder, node: Node, ct: Value) -> Value:
    return b("neg", b("div", b("mul", ct, node.outputs[0]), node.inputs[1]))


# y = a^b: dy/da = b a^(b-1), taken as 0 where b = 0 even if a = 0; dy/db = y log a, taken as 0 where a = 0.
def _pow_left(b: Builder, node: Node, ct: Value) -> Value:
    base, exponent = node.inputs
    slope = b("mul", exponent, b("pow", base, b("sub", exponent, b.constant(1.0))))
    constant = b("equal", exponent, b.constant(0.0))
    return b("mul", ct, b("where", constant, b.constant(0.0), slope))


def _pow_right(b: Builder, node: Node, ct: Value) -> Value:
    base = node.inputs[0]
    is_zero = b("equal", base, b.constant(0.0))
    logarithm = b("log", b("where", is_zero, b.constant(1.0), base))
    return b("mul", ct, b("mul", node.outputs[0], logarithm))


# The operand that wins takes the cotangent; where both are equal each takes half, as in torch.
def _extremum_gradient(operand: int, loses: str) -> Callable[[Builder, Node, Value], Value]:
    def rule(b: Builder, node: Node, ct: Value) -> Value:
        mine, other = node.inputs[operand], node.inputs[1 - operand]
        shared = b("where", b("equal", mine, other), scaled(b, ct, 0.5), ct)
        return b("where", b(loses, mine, other), b.constant(0.0), shared)

    return rule


_binary("add", np.add, lambda b, n, ct: ct, lambda b, n, ct: ct, lambda t, x, y: x + y, linear=True)
_binary("sub", np.subtract, lambda b, n, ct: ct, lambda b, n, ct: b("neg", ct), lambda t, x, y: x - y, linear=True)
_binary(
    "mul",
    np.multiply,
    lambda b, n, ct: b("mul", ct, n.inputs[1]),
    lambda b, n, ct: b("mul", ct, n.inputs[0]),
    lambda t, x, y: x * y,
    saves="the other operand of each that needs a gradient",
)
_binary(
    "div",
    np.divide,
    _div_left,
    _div_right,
    lambda t, x, y: x / y,
    saves="b; y if b needs a gradient",
    low=0.2,
    integers=False,
)
_binary(
    "pow",
    np.power,
    _pow_left,
    _pow_right,
    lambda t, x, y: x**y,
    saves="a, b; y if b needs a gradient",
    low=0.2,
    integers=False,
)
_binary(
    "maximum",
    np.maximum,
    _extremum_gradient(0, "less"),
    _extremum_gradient(1, "less"),
    lambda t, x, y: t.maximum(x, y),
    saves="a, b",
)
_binary(
    "minimum",
    np.minimum,
    _extremum_gradient(0, "greater"),
    _extremum_gradient(1, "greater"),
    lambda t, x, y: t.minimum(x, y),
    saves="a, b",
)


# Comparison and logic


def _compare_rule(a: TensorType, b: TensorType) -> TensorType:
    require_dtype("a", a, "f32", "i64", "i32", "bool")
    require(a.dtype == b.dtype, f"the operands must have one element type, not {a} and {b}")
    return TensorType(broadcast(a.shape, b.shape), "bool")


def _compare(name: str, reference: Reference, torch: Callable[..., Any]) -> None:
    operands = [
        (f32(3, 4), f32(3, 4)),
        (f32(2, 1, 3), f32(3)),
        (i64(9), i64(9)),
        (TensorType((9,), "i32"), TensorType((), "i32")),
        (boolean(9), boolean(9)),
    ]
    samples = [Sample(pair, torch=torch) for pair in operands]
    define(name, type_rule=_compare_rule, reference=reference, samples=samples)


_compare("equal", np.equal, lambda t, a, b: a == b)
_compare("not_equal", np.not_equal, lambda t, a, b: a != b)
_compare("less", np.less, lambda t, a, b: a < b)
_compare("less_equal", np.less_equal, lambda t, a, b: a <= b)
_compare("greater", np.greater, lambda t, a, b: a > b)
_compare("greater_equal", np.greater_equal, lambda t, a, b: a >= b)


define(
    "logical_and",
    type_rule=_binary_rule("bool"),
    reference=np.logical_and,
    samples=[Sample((boolean(3, 5), boolean(5)), torch=lambda t, a, b: a & b)],
)
define(
    "logical_or",
    type_rule=_binary_rule("bool"),
    reference=np.logical_or,
    samples=[Sample((boolean(3, 5), boolean(3, 1)), torch=lambda t, a, b: a | b)],
)
define(
    "logical_not",
    type_rule=same_type_rule("bool"),
    reference=np.logical_not,
    samples=[Sample((boolean(3, 5),), torch=lambda t, x: ~x)],
)


# Selection and conversion


def _where_rule(condition: TensorType, a: TensorType, b: TensorType) -> TensorType:
    require_dtype("the condition", condition, "bool")
    require(a.dtype == b.dtype, f"both branches must have one element type, not {a} and {b}")
    return TensorType(broadcast(condition.shape, a.shape, b.shape), a.dtype)


def _where_vjp(builder: Builder, node: Node, cotangents: Cotangents, need: Need) -> Gradients:
    ct = cotangent_of(node, cotangents)
    condition, a, b = node.inputs
    zero = builder.constant(0.0)
    left = right = None
    if 1 in need:
        left = unbroadcast(builder, builder("where", condition, ct, zero), a.type.shape)
    if 2 in need:
        right = unbroadcast(builder, builder("where", condition, zero, ct), b.type.shape)
    return None, left, right


define(
    "where",
    type_rule=_where_rule,
    reference=np.where,
    vjp=_where_vjp,
    samples=[
        Sample((boolean(3, 5), f32(3, 5), f32(3, 5)), {}, lambda t, c, a, b: t.where(c, a, b), (1, 2)),
        Sample((boolean(3, 1), f32(5), f32()), {}, lambda t, c, a, b: t.where(c, a, b), (1, 2)),
        Sample((boolean(5), i64(2, 5), i64()), {}, lambda t, c, a, b: t.where(c, a, b)),
    ],
    saves="the condition",
)


def _cast_rule(x: TensorType, *, dtype: str) -> TensorType:
    require_dtype("x", x, "f32", "i64", "i32", "u8", "bool", *HALF_DTYPES)
    known = (*HALF_DTYPES, "f32", "i64", "i32", "bool") if x.dtype == "f32" else ("f32", "i64", "i32", "bool")
    require(dtype in (("f32",) if x.is_half else known), f"there is no conversion of {x} to {dtype!r}")
    return TensorType(x.shape, dtype)


def _cast_reference(x: Array, *, dtype: str) -> Array:
    if is_half(dtype) or (dtype == "f32" and x.dtype == np.float64):
        return x  # who stores 16-bit results rounds them; gradient checks run in double precision
    return x.astype(NUMPY_DTYPES[dtype])


def _cast_gradient(b: Builder, node: Node, ct: Value) -> Value | None:
    return ct if node.attrs["dtype"] == "f32" else None


define(
    "cast",
    type_rule=_cast_rule,
    reference=_cast_reference,
    vjp=unary_vjp(_cast_gradient),
    samples=[
        Sample((f32(3, 5),), {"dtype": "i64"}, lambda t, x: x.to(t.int64)),
        Sample((f32(7),), {"dtype": "i32"}, lambda t, x: x.to(t.int32)),
        Sample((np.array([0.0, -0.0, 0.5, -3.0], np.float32),), {"dtype": "bool"}, lambda t, x: x.to(t.bool)),
        Sample((i64(7),), {"dtype": "f32"}, lambda t, x: x.to(t.float32)),
        Sample((boolean(7),), {"dtype": "f32"}, lambda t, x: x.to(t.float32)),
        Sample((np.arange(256, dtype=np.uint8),), {"dtype": "f32"}, lambda t, x: x.to(t.float32)),
        Sample((np.array([0, 1, 255], np.uint8),), {"dtype": "bool"}, lambda t, x: x.to(t.bool)),
        Sample((TensorType((7,), "i32"),), {"dtype": "i64"}, lambda t, x: x.to(t.int64)),
        Sample((f32(7),), {"dtype": "f32"}, lambda t, x: x.clone(), (0,)),
    ],
)
define(
    "copy",
    type_rule=same_type_rule("f32", "i64", "i32", "u8", "bool"),
    reference=np.copy,
    vjp=unary_vjp(lambda b, node, ct: ct),
    samples=[
        Sample((f32(3, 5),), {}, lambda t, x: x.clone(), (0,)),
        Sample((i64(3),), {}, lambda t, x: x.clone()),
        Sample((boolean(),), {}, lambda t, x: x.clone()),
    ],
)

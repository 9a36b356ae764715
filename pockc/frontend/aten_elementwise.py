"""Arithmetic, comparisons, logic, casts and activations."""

from __future__ import annotations

import math
from collections.abc import Callable

from pockc.frontend.aten import Call, Operand, handles, refuse, refuse_unless, shape_of
from pockc.ir import Value

_SAME_NAME = (
    "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "sigmoid", "erf", "floor", "silu",
    "hardswish", "hardsigmoid", "sign",
)  # fmt: skip
_INTEGER_UNARY = ("neg", "abs")
_COMPARISONS = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
}  # fmt: skip
_LOGIC = {"and": "logical_and", "or": "logical_or", "xor": "not_equal"}


def _unary(name: str) -> Callable[[Call, Value], Value]:
    def handler(call: Call, x: Value) -> Value:
        if name in _INTEGER_UNARY:
            return call.builder(name, x)
        if name in ("floor", "sign") and x.type.dtype != "f32":
            refuse_unless(name == "floor", "sign of integers", supported="sign of float32")
            return x
        return call.builder(name, call.cast(x, "f32"))

    return handler


for _name in _SAME_NAME:
    handles(f"{_name}.default")(_unary(_name))


def _scaled(call: Call, x: Value, factor: float) -> Value:
    return x if factor == 1 else call.builder("mul", x, call.value(factor, x.type.dtype))


def _arithmetic(call: Call, op: str, x: Operand, y: Operand) -> Value:
    """Both operands in the dtype of the result, as PyTorch promotes them."""
    dtype = call.result.dtype
    refuse_unless(dtype != "bool", f"{op} of booleans", supported="&, | and ~ on booleans")
    left, right = call.value(x, dtype), call.value(y, dtype)
    if not isinstance(y, Value) and _neutral(op, y):
        return left
    return call.builder(op, left, right)


def _neutral(op: str, number: float) -> bool:
    return (op in ("add", "sub") and number == 0) or (op in ("mul", "div") and number == 1)


@handles("add.Tensor", "add.Scalar")
def _add(call: Call, x: Operand, y: Operand, alpha: float = 1) -> Value:
    if call.result.dtype == "bool":
        return call.builder("logical_or", call.value(x, "bool"), call.value(y, "bool"))
    return _arithmetic(call, "add", x, _times(call, y, alpha))


@handles("sub.Tensor", "sub.Scalar")
def _sub(call: Call, x: Operand, y: Operand, alpha: float = 1) -> Value:
    return _arithmetic(call, "sub", x, _times(call, y, alpha))


@handles("rsub.Scalar", "rsub.Tensor")
def _rsub(call: Call, x: Operand, y: Operand, alpha: float = 1) -> Value:
    return _arithmetic(call, "sub", y, _times(call, x, alpha))


def _times(call: Call, y: Operand, alpha: float) -> Operand:
    if alpha == 1:
        return y
    return _scaled(call, call.cast(y, call.result.dtype), alpha) if isinstance(y, Value) else y * alpha


@handles("mul.Tensor", "mul.Scalar")
def _mul(call: Call, x: Operand, y: Operand) -> Value:
    if call.result.dtype == "bool":
        return call.builder("logical_and", call.value(x, "bool"), call.value(y, "bool"))
    return _arithmetic(call, "mul", x, y)


@handles("div.Tensor", "div.Scalar")
def _div(call: Call, x: Operand, y: Operand) -> Value:
    return _arithmetic(call, "div", x, y)


@handles("div.Tensor_mode", "div.Scalar_mode")
def _div_rounded(call: Call, x: Operand, y: Operand, rounding_mode: str | None = None) -> Value:
    refuse_unless(call.result.dtype == "f32", "division of integers with rounding", supported="float32 division")
    quotient = _arithmetic(call, "div", x, y)
    if rounding_mode is None:
        return quotient
    return call.builder("floor", quotient) if rounding_mode == "floor" else _trunc(call, quotient)


@handles("floor_divide.default")
def _floor_divide(call: Call, x: Operand, y: Operand) -> Value:
    return _div_rounded(call, x, y, rounding_mode="floor")


@handles("remainder.Tensor", "remainder.Scalar")
def _remainder(call: Call, x: Operand, y: Operand) -> Value:
    quotient = _div_rounded(call, x, y, rounding_mode="floor")
    return _arithmetic(call, "sub", x, _arithmetic(call, "mul", quotient, y))


@handles("trunc.default")
def _trunc(call: Call, x: Value) -> Value:
    b = call.builder
    return b("mul", b("sign", x), b("floor", b("abs", x)))


@handles("ceil.default")
def _ceil(call: Call, x: Value) -> Value:
    b = call.builder
    return b("neg", b("floor", b("neg", x)))


@handles("maximum.default")
def _maximum(call: Call, x: Value, y: Value) -> Value:
    return _arithmetic(call, "maximum", x, y)


@handles("minimum.default")
def _minimum(call: Call, x: Value, y: Value) -> Value:
    return _arithmetic(call, "minimum", x, y)


@handles("addcmul.default")
def _addcmul(call: Call, x: Value, y: Value, z: Value, value: float = 1) -> Value:
    return call.builder("add", x, _scaled(call, call.builder("mul", y, z), value))


@handles("addcdiv.default")
def _addcdiv(call: Call, x: Value, y: Value, z: Value, value: float = 1) -> Value:
    return call.builder("add", x, _scaled(call, call.builder("div", y, z), value))


@handles("lerp.Scalar", "lerp.Tensor")
def _lerp(call: Call, start: Value, end: Value, weight: Operand) -> Value:
    b = call.builder
    return b("add", start, b("mul", call.value(weight, "f32"), b("sub", end, start)))


@handles("pow.Tensor_Scalar")
def _pow_scalar(call: Call, x: Value, exponent: float) -> Value:
    """Small exponents as the operators that are exact for them, and cheap in the gradient."""
    b, x = call.builder, call.cast(x, call.result.dtype)
    if exponent == 1:
        return x
    if exponent == 2:
        return b("mul", x, x)
    if exponent == 3:
        return b("mul", b("mul", x, x), x)
    refuse_unless(x.type.dtype == "f32", f"integers to the power {exponent}", supported="powers of float32")
    roots = {0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
    if exponent in roots:
        return b(roots[exponent], x)
    return b("pow_scalar", x, exponent=float(exponent))


@handles("pow.Tensor_Tensor", "pow.Scalar")
def _pow(call: Call, x: Operand, exponent: Value) -> Value:
    refuse_unless(call.result.dtype == "f32", "integer powers", supported="powers of float32")
    return _arithmetic(call, "pow", x, exponent)


@handles("log1p.default")
def _log1p(call: Call, x: Value) -> Value:
    return call.builder("log", call.builder("add", x, call.builder.constant(1.0)))


@handles("expm1.default")
def _expm1(call: Call, x: Value) -> Value:
    return call.builder("sub", call.builder("exp", x), call.builder.constant(1.0))


@handles("exp2.default")
def _exp2(call: Call, x: Value) -> Value:
    return call.builder("exp", _scaled(call, x, math.log(2.0)))


@handles("log2.default")
def _log2(call: Call, x: Value) -> Value:
    return _scaled(call, call.builder("log", x), 1 / math.log(2.0))


@handles("log10.default")
def _log10(call: Call, x: Value) -> Value:
    return _scaled(call, call.builder("log", x), 1 / math.log(10.0))


@handles("tan.default")
def _tan(call: Call, x: Value) -> Value:
    return call.builder("div", call.builder("sin", x), call.builder("cos", x))


def _comparison(op: str) -> Callable[[Call, Operand, Operand], Value]:
    def handler(call: Call, x: Operand, y: Operand) -> Value:
        dtype = _common_dtype(x, y)
        return call.builder(op, call.value(x, dtype), call.value(y, dtype))

    return handler


def _common_dtype(*operands: Operand) -> str:
    """PyTorch's promotion: tensors decide; a Python number only raises the kind (bool < integer < float)."""
    order = ("bool", "u8", "i32", "i64", "f32")
    tensors = [operand.type.dtype for operand in operands if isinstance(operand, Value)]
    widest = max(tensors, key=order.index)
    for number in operands:
        if isinstance(number, float):
            widest = "f32"
        elif isinstance(number, int) and not isinstance(number, bool) and widest == "bool":
            widest = "i64"
    return widest


for _aten, _op in _COMPARISONS.items():
    handles(f"{_aten}.Tensor", f"{_aten}.Scalar")(_comparison(_op))


def _logic(op: str) -> Callable[[Call, Value, Operand], Value]:
    def handler(call: Call, x: Value, y: Operand) -> Value:
        refuse_unless(call.result.dtype == "bool", "bitwise logic on integers", supported="logic on booleans")
        left, right = call.value(x, "bool"), call.value(y, "bool")
        if op == "logical_and":
            for mask, other in ((left, right), (right, left)):
                if _all_true(call, mask):
                    return call.expand(other, call.result.shape)
        return call.builder(op, left, right)

    return handler


def _all_true(call: Call, value: Value) -> bool:
    contents = call.constant(value)
    return contents is not None and bool(contents.all())


for _aten, _op in _LOGIC.items():
    handles(f"bitwise_{_aten}.Tensor", f"bitwise_{_aten}.Scalar", f"logical_{_aten}.default")(_logic(_op))


@handles("bitwise_not.default", "logical_not.default")
def _not(call: Call, x: Value) -> Value:
    refuse_unless(call.result.dtype == "bool", "bitwise logic on integers", supported="logic on booleans")
    return call.builder("logical_not", call.cast(x, "bool"))


@handles("isnan.default")
def _isnan(call: Call, x: Value) -> Value:
    return call.builder("not_equal", x, x)


@handles("isinf.default")
def _isinf(call: Call, x: Value) -> Value:
    return call.builder("equal", call.builder("abs", x), call.builder.constant(math.inf))


@handles("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(call: Call, condition: Value, x: Operand, y: Operand) -> Value:
    dtype = call.result.dtype
    return call.builder("where", call.cast(condition, "bool"), call.value(x, dtype), call.value(y, dtype))


@handles("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(call: Call, x: Value, mask: Value, value: Operand) -> Value:
    filled = call.builder("where", mask, call.value(value, x.type.dtype), x)
    return filled


@handles("_to_copy.default")
def _to_copy(call: Call, x: Value, dtype: str | None = None, **_: object) -> Value:
    return call.cast(x, dtype or x.type.dtype)


@handles("clone.default", "alias.default", "detach.default", "lift_fresh_copy.default", "contiguous.default")
def _identity(call: Call, x: Value, **_: object) -> Value:
    return x


@handles("copy.default")
def _copy(call: Call, x: Value, source: Value, non_blocking: bool = False) -> Value:
    return call.expand(call.cast(source, x.type.dtype), shape_of(x))


# ---- activations ----


@handles("relu.default")
def _relu(call: Call, x: Value) -> Value:
    refuse_unless(x.type.dtype == "f32", "relu of integers", supported="float32")
    return call.builder("clip", x, low=0.0, high=math.inf)


@handles("relu6.default")
def _relu6(call: Call, x: Value) -> Value:
    return call.builder("clip", x, low=0.0, high=6.0)


@handles("hardtanh.default")
def _hardtanh(call: Call, x: Value, min_val: float = -1, max_val: float = 1) -> Value:
    return call.builder("clip", x, low=float(min_val), high=float(max_val))


@handles("clamp.default", "clip.default")
def _clamp(call: Call, x: Value, min: float | None = None, max: float | None = None) -> Value:
    if call.result.dtype != "f32":
        return _clamp_integers(call, x, min, max)
    low = -math.inf if min is None else float(min)
    high = math.inf if max is None else float(max)
    # The mask of the gradient, low <= x <= high, is the right one only for ordered bounds.
    refuse_unless(low <= high, f"clamp with min {low} above max {high}")
    return call.builder("clip", call.cast(x, "f32"), low=low, high=high, inclusive=True)


def _clamp_integers(call: Call, x: Value, low: float | None, high: float | None) -> Value:
    if low is not None:
        x = call.builder("maximum", x, call.value(low, x.type.dtype))
    if high is not None:
        x = call.builder("minimum", x, call.value(high, x.type.dtype))
    return x


@handles("clamp_min.default")
def _clamp_min(call: Call, x: Value, min: float) -> Value:
    return _clamp(call, x, min=min)


@handles("clamp_max.default")
def _clamp_max(call: Call, x: Value, max: float) -> Value:
    return _clamp(call, x, max=max)


@handles("clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor")
def _clamp_tensor(call: Call, x: Value, min: Value | None = None, max: Value | None = None) -> Value:
    if call.operator == "aten.clamp_max.Tensor":
        min, max = None, min  # the bound is the second argument there
    if min is not None:
        x = _arithmetic(call, "maximum", x, min)
    if max is not None:
        x = _arithmetic(call, "minimum", x, max)
    return x


@handles("gelu.default")
def _gelu(call: Call, x: Value, approximate: str = "none") -> Value:
    return call.builder("gelu", x, approximate=approximate == "tanh")


@handles("leaky_relu.default")
def _leaky_relu(call: Call, x: Value, negative_slope: float = 0.01) -> Value:
    return call.builder("leaky_relu", x, slope=float(negative_slope))


@handles("elu.default")
def _elu(call: Call, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    # scale*x above 0, scale*alpha*(exp(s*x)-1) below, with s the input scale: scale/s times the elu of s*x whose own
    # alpha is alpha*s. This covers selu (another scale) and celu (another s).
    inner = call.builder("elu", _scaled(call, x, float(input_scale)), alpha=float(alpha) * float(input_scale))
    return _scaled(call, inner, float(scale) / float(input_scale))


@handles("softplus.default")
def _softplus(call: Call, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    # Beyond the threshold (times beta) PyTorch returns x itself: the difference, exp(-threshold), must be rounding.
    refuse_unless(threshold >= 15, f"softplus with threshold {threshold}", supported="thresholds of 15 and more")
    return _scaled(call, call.builder("softplus", _scaled(call, x, float(beta))), 1 / float(beta))


@handles("log_sigmoid_forward.default")
def _log_sigmoid(call: Call, x: Value) -> tuple[Value | None, ...]:
    b = call.builder
    return b("neg", b("softplus", b("neg", x))), None


@handles("mish.default")
def _mish(call: Call, x: Value) -> Value:
    b = call.builder
    return b("mul", x, b("tanh", b("softplus", x)))


@handles("_prelu_kernel.default", "prelu.default")
def _prelu(call: Call, x: Value, weight: Value) -> Value:
    b = call.builder
    if call.operator == "aten.prelu.default" and len(shape_of(x)) > 2:
        weight = call.reshape(weight, (weight.type.elements, *[1] * (len(shape_of(x)) - 2)))
    positive = b("clip", x, low=0.0, high=math.inf)
    negative = b("clip", x, low=-math.inf, high=0.0)
    return b("add", positive, b("mul", weight, negative))


@handles("threshold.default")
def _threshold(call: Call, x: Value, threshold: float, value: float) -> Value:
    b = call.builder
    return b("where", b("greater", x, b.constant(threshold)), x, b.constant(value))


@handles("round.default", "round.decimals")
def _round(call: Call, x: Value, **_: object) -> Value:
    raise refuse(
        "rounding to the nearest integer", supported="floor, ceil and trunc", instead="Use torch.floor(x + 0.5)."
    )

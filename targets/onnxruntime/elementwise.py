"""Elementwise ops, activation functions and their gradients, in whatever order of axes the operands have."""

from __future__ import annotations

import math
from collections.abc import Callable

from pockc.ir import Node
from pockc.targets.onnxruntime.emitter import Emitter, Lowering, broadcast_order

ELEMENT_TYPES = {"f32": 1, "i64": 7, "i32": 6, "u8": 2, "bool": 9}  # TensorProto.DataType

Compose = Callable[..., str]  # (emitter, *tensors, **attributes of the op) -> tensor


def elementwise(compose: Compose) -> Lowering:
    """The lowering of an op of broadcasting operands and one output."""

    def lower(emitter: Emitter, node: Node) -> None:
        output = node.outputs[0]
        order = broadcast_order(emitter, node)
        operands = [emitter.aligned(value, len(output.type.shape), order) for value in node.inputs]
        emitter.write(output, compose(emitter, *operands, **node.attrs), order)

    return lower


def plain(op: str) -> Lowering:
    """The lowering of an op that ONNX has too."""
    return elementwise(lambda e, *operands: e(op, *operands))


def scaled(e: Emitter, tensor: str, factor: float) -> str:
    """``tensor * factor``."""
    return e("Mul", tensor, e.constant(factor))


def comparison(op: str) -> Lowering:
    """Equal takes booleans; the ordering ones take them as numbers."""

    def lower(emitter: Emitter, node: Node) -> None:
        order = broadcast_order(emitter, node)
        operands = [emitter.aligned(value, len(node.outputs[0].type.shape), order) for value in node.inputs]
        if node.inputs[0].type.dtype == "bool" and op != "Equal":
            operands = [emitter("Cast", operand, to=ELEMENT_TYPES["i32"]) for operand in operands]
        emitter.write(node.outputs[0], emitter(op, *operands), order)

    return lower


def _pow_scalar(e: Emitter, x: str, *, exponent: float) -> str:
    if exponent == 2:
        return e("Mul", x, x)
    return e("Pow", x, e.constant(exponent))


def _where(emitter: Emitter, node: Node) -> None:
    # The kernel has no booleans to choose from.
    order = broadcast_order(emitter, node)
    condition, a, b = (emitter.aligned(value, len(node.outputs[0].type.shape), order) for value in node.inputs)
    if node.outputs[0].type.dtype != "bool":
        emitter.write(node.outputs[0], emitter("Where", condition, a, b), order)
        return
    chosen = emitter("And", condition, a), emitter("And", emitter("Not", condition), b)
    emitter.write(node.outputs[0], emitter("Or", *chosen), order)


def _cast(e: Emitter, x: str, *, dtype: str) -> str:
    return e("Cast", x, to=ELEMENT_TYPES[dtype])


# Activations


def clip(e: Emitter, x: str, low: float, high: float) -> str:
    """The tensor within bounds, of which either may be infinite."""
    if (low, high) == (0.0, math.inf):
        return e("Relu", x)
    bounds = [e.constant(low) if low != -math.inf else "", e.constant(high)]
    return e("Clip", x, *(bounds if high != math.inf else bounds[:1]))


def silu(e: Emitter, x: str) -> str:
    """``x * sigmoid(x)``."""
    return e("Mul", x, e("Sigmoid", x))


def _hardsigmoid(e: Emitter, x: str) -> str:
    return e("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def hardswish(e: Emitter, x: str) -> str:
    """``x * hardsigmoid(x)``."""
    return e("Mul", x, _hardsigmoid(e, x))


def gelu(e: Emitter, x: str, *, approximate: bool = False) -> str:
    """ONNX has both forms since opset 20."""
    return e("Gelu", x, approximate="tanh" if approximate else "none")


def epilogue(e: Emitter, y: str, activation: str, low: float, high: float) -> str:
    """What a fused product applies to its result."""
    match activation:
        case "clip":
            return clip(e, y, low, high)
        case "gelu" | "gelu_tanh":
            return gelu(e, y, approximate=activation == "gelu_tanh")
        case "silu":
            return silu(e, y)
        case "hardswish":
            return hardswish(e, y)
    return y


# Gradients; the formulas are derived in pockc/ops/activation.py.


def _tanh_grad(e: Emitter, ct: str, y: str) -> str:
    return e("Mul", ct, e("Sub", e.constant(1.0), e("Mul", y, y)))


def _sigmoid_grad(e: Emitter, ct: str, y: str) -> str:
    return e("Mul", ct, e("Mul", y, e("Sub", e.constant(1.0), y)))


def _silu_grad(e: Emitter, ct: str, x: str) -> str:
    s = e("Sigmoid", x)
    slope = e("Add", e("Mul", x, e("Sub", e.constant(1.0), s)), e.constant(1.0))
    return e("Mul", ct, e("Mul", s, slope))


def _hardswish_grad(e: Emitter, ct: str, x: str) -> str:
    inside = e("Add", scaled(e, x, 1 / 3), e.constant(0.5))
    above = e("Where", e("Less", x, e.constant(3.0)), inside, e.constant(1.0))
    return e("Mul", ct, e("Where", e("Greater", x, e.constant(-3.0)), above, e.constant(0.0)))


def _hardsigmoid_grad(e: Emitter, ct: str, x: str) -> str:
    inside = e("And", e("Greater", x, e.constant(-3.0)), e("Less", x, e.constant(3.0)))
    return e("Where", inside, scaled(e, ct, 1 / 6), e.constant(0.0))


_CUBIC, _SCALE = 0.044715, math.sqrt(2 / math.pi)


def _gelu_grad(e: Emitter, ct: str, x: str, *, approximate: bool = False) -> str:
    square = e("Mul", x, x)
    if approximate:
        u = e("Mul", x, e("Add", scaled(e, square, _SCALE * _CUBIC), e.constant(_SCALE)))
        t = e("Tanh", u)
        slope = e("Add", scaled(e, square, 1.5 * _SCALE * _CUBIC), e.constant(0.5 * _SCALE))
        through_tanh = e("Mul", e("Mul", x, slope), e("Sub", e.constant(1.0), e("Mul", t, t)))
        return e("Mul", ct, e("Add", e("Add", scaled(e, t, 0.5), e.constant(0.5)), through_tanh))
    distribution = e("Add", scaled(e, e("Erf", scaled(e, x, math.sqrt(0.5))), 0.5), e.constant(0.5))
    density = scaled(e, e("Exp", scaled(e, square, -0.5)), 1 / math.sqrt(2 * math.pi))
    return e("Mul", ct, e("Add", distribution, e("Mul", x, density)))


def _leaky_relu_grad(e: Emitter, ct: str, x: str, *, slope: float) -> str:
    return e("Where", e("Greater", x, e.constant(0.0)), ct, scaled(e, ct, slope))


def _elu_grad(e: Emitter, ct: str, x: str, *, alpha: float) -> str:
    below = e("Mul", scaled(e, ct, alpha), e("Exp", e("Min", x, e.constant(0.0))))
    return e("Where", e("Greater", x, e.constant(0.0)), ct, below)


def _clip(e: Emitter, x: str, *, low: float, high: float, inclusive: bool) -> str:
    return clip(e, x, low, high)


OPS: dict[str, Lowering] = {
    "neg": plain("Neg"),
    "abs": plain("Abs"),
    "sign": plain("Sign"),
    "exp": plain("Exp"),
    "log": plain("Log"),
    "sqrt": plain("Sqrt"),
    "rsqrt": elementwise(lambda e, x: e("Reciprocal", e("Sqrt", x))),
    "reciprocal": plain("Reciprocal"),
    "sin": plain("Sin"),
    "cos": plain("Cos"),
    "tanh": plain("Tanh"),
    "sigmoid": plain("Sigmoid"),
    "erf": plain("Erf"),
    "softplus": plain("Softplus"),
    "floor": plain("Floor"),
    "silu": elementwise(silu),
    "hardswish": elementwise(hardswish),
    "hardsigmoid": elementwise(_hardsigmoid),
    "gelu": elementwise(gelu),
    "leaky_relu": elementwise(lambda e, x, *, slope: e("LeakyRelu", x, alpha=slope)),
    "elu": elementwise(lambda e, x, *, alpha: e("Elu", x, alpha=alpha)),
    "pow_scalar": elementwise(_pow_scalar),
    "clip": elementwise(_clip),
    "tanh_grad": elementwise(_tanh_grad),
    "sigmoid_grad": elementwise(_sigmoid_grad),
    "gelu_grad": elementwise(_gelu_grad),
    "silu_grad": elementwise(_silu_grad),
    "hardswish_grad": elementwise(_hardswish_grad),
    "hardsigmoid_grad": elementwise(_hardsigmoid_grad),
    "leaky_relu_grad": elementwise(_leaky_relu_grad),
    "elu_grad": elementwise(_elu_grad),
    "add": plain("Add"),
    "sub": plain("Sub"),
    "mul": plain("Mul"),
    "div": plain("Div"),
    "pow": plain("Pow"),
    "maximum": plain("Max"),
    "minimum": plain("Min"),
    "equal": comparison("Equal"),
    "not_equal": elementwise(lambda e, a, b: e("Not", e("Equal", a, b))),
    "less": comparison("Less"),
    "less_equal": comparison("LessOrEqual"),
    "greater": comparison("Greater"),
    "greater_equal": comparison("GreaterOrEqual"),
    "logical_and": plain("And"),
    "logical_or": plain("Or"),
    "logical_not": plain("Not"),
    "where": _where,
    "cast": elementwise(_cast),
    "copy": plain("Identity"),
}

"""Activation functions and their elementwise gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import f32, gradient_rule, require, require_dtype, same_type_rule, torch_gradient, unary_vjp
from pockc.ops.elementwise import erf, sigmoid

if TYPE_CHECKING:
    from pockc.ops import Reference, TypeRule

# What a matmul or conv2d can apply to its result before storing it; a prefix of ENUM_VALUES.
EPILOGUES = ("none", "clip", "gelu", "gelu_tanh", "silu", "hardswish")


def _activation(
    name: str,
    reference: Reference,
    gradient: Reference,
    torch: Callable[..., Any],
    *,
    saves: Literal["x", "y"],
    type_rule: TypeRule | None = None,
    grad_type_rule: TypeRule = gradient_rule,
    attrs: tuple[Mapping[str, Any], ...] = ({},),
    torch_on_saved: Callable[..., Any] | None = None,
    low: float = -4.0,
    high: float = 4.0,
) -> None:
    """Define ``name(x; attrs)`` and ``name_grad(ct, saved; attrs)``.

    ``torch_on_saved`` is the torch counterpart of the gradient where that is a function of the output.
    """

    def emit(builder: Builder, node: Node, ct: Value) -> Value:
        saved = node.inputs[0] if saves == "x" else node.outputs[0]
        return builder(f"{name}_grad", ct, saved, **node.attrs)

    def samples(grad: bool) -> list[Sample]:
        found = []
        for given in attrs:
            for shape in (f32(3, 7), f32(33), f32()):
                forward = lambda t, x, given=given: torch(t, x, **given)  # noqa: E731
                backward = torch_on_saved or torch_gradient(forward, 0)
                if grad:
                    found.append(Sample((shape, shape), given, backward, low=low, high=high))
                else:
                    found.append(Sample((shape,), given, forward, (0,), low, high))
        return found

    define(
        name,
        type_rule=type_rule or same_type_rule("f32"),
        reference=reference,
        vjp=unary_vjp(emit),
        samples=samples(grad=False),
        in_place=(0,),
        saves=saves,
    )
    define(f"{name}_grad", type_rule=grad_type_rule, reference=gradient, samples=samples(grad=True), in_place=(0,))


_activation(
    "tanh",
    np.tanh,
    lambda ct, y: ct * (1 - y * y),
    lambda t, x: x.tanh(),
    saves="y",
    torch_on_saved=lambda t, ct, y: t.ops.aten.tanh_backward(ct, y),
    low=-2.0,
    high=2.0,
)
_activation(
    "sigmoid",
    sigmoid,
    lambda ct, y: ct * y * (1 - y),
    lambda t, x: x.sigmoid(),
    saves="y",
    torch_on_saved=lambda t, ct, y: t.ops.aten.sigmoid_backward(ct, y),
    low=-2.0,
    high=2.0,
)


# y = x s(x) with s the sigmoid, s' = s (1 - s): dy/dx = s + x s (1 - s) = s (1 + x (1 - s)).
def _silu_grad(ct: Array, x: Array) -> Array:
    s = sigmoid(x)
    return np.asarray(ct * (s * (1 + x * (1 - s))))


_activation("silu", lambda x: x * sigmoid(x), _silu_grad, lambda t, x: t.nn.functional.silu(x), saves="x")


def _hardsigmoid(x: Array) -> Array:
    return np.asarray(np.clip(x + 3, 0, 6) / 6)


# y = x clip(x + 3, 0, 6) / 6: 0 below -3, x (x + 3) / 6 with slope x / 3 + 1 / 2 inside, x above 3.
def _hardswish_grad(ct: Array, x: Array) -> Array:
    return np.asarray(ct * np.where(x <= -3, 0, np.where(x < 3, x / 3 + 0.5, 1)).astype(x.dtype))


def _hardsigmoid_grad(ct: Array, x: Array) -> Array:
    return np.where((x > -3) & (x < 3), ct / 6, np.zeros_like(ct))


_activation(
    "hardswish", lambda x: x * _hardsigmoid(x), _hardswish_grad, lambda t, x: t.nn.functional.hardswish(x), saves="x"
)
_activation("hardsigmoid", _hardsigmoid, _hardsigmoid_grad, lambda t, x: t.nn.functional.hardsigmoid(x), saves="x")


# gelu


def _gelu_rule(x: TensorType, *, approximate: bool = False) -> TensorType:
    require_dtype("x", x, "f32")
    return x


def _gelu_grad_rule(ct: TensorType, x: TensorType, *, approximate: bool = False) -> TensorType:
    return gradient_rule(ct, x)


_CUBIC = 0.044715
_SCALE = math.sqrt(2 / math.pi)


def _gelu(x: Array, *, approximate: bool = False) -> Array:
    if approximate:
        return np.asarray(0.5 * x * (1 + np.tanh(_SCALE * (x + _CUBIC * x * x * x))))
    return np.asarray(0.5 * x * (1 + erf(x * math.sqrt(0.5))))


# Exact: y = x P(x) with the normal distribution P and its density p, so dy/dx = P + x p.
# Approximate: y = x (1 + t) / 2 with t = tanh(u), u = c (x + a x^3), u' = c (1 + 3 a x^2):
# dy/dx = (1 + t) / 2 + x (1 - t^2) u' / 2.
def _gelu_grad(ct: Array, x: Array, *, approximate: bool = False) -> Array:
    if approximate:
        t = np.tanh(_SCALE * (x + _CUBIC * x * x * x))
        slope = _SCALE * (1 + 3 * _CUBIC * x * x)
        return np.asarray(ct * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope))
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return np.asarray(ct * (0.5 * (1 + erf(x * math.sqrt(0.5))) + x * density))


_activation(
    "gelu",
    _gelu,
    _gelu_grad,
    lambda t, x, approximate: t.nn.functional.gelu(x, approximate="tanh" if approximate else "none"),
    saves="x",
    type_rule=_gelu_rule,
    grad_type_rule=_gelu_grad_rule,
    attrs=({"approximate": False}, {"approximate": True}),
)


# leaky_relu, elu


def _leaky_relu_rule(x: TensorType, *, slope: float) -> TensorType:
    require_dtype("x", x, "f32")
    return x


def _leaky_relu_grad_rule(ct: TensorType, x: TensorType, *, slope: float) -> TensorType:
    return gradient_rule(ct, x)


_activation(
    "leaky_relu",
    lambda x, *, slope: np.where(x > 0, x, x * slope),
    lambda ct, x, *, slope: np.where(x > 0, ct, ct * slope),
    lambda t, x, slope: t.nn.functional.leaky_relu(x, slope),
    saves="x",
    type_rule=_leaky_relu_rule,
    grad_type_rule=_leaky_relu_grad_rule,
    attrs=({"slope": 0.01}, {"slope": 0.2}),
)


def _elu_rule(x: TensorType, *, alpha: float) -> TensorType:
    require_dtype("x", x, "f32")
    return x


def _elu_grad_rule(ct: TensorType, x: TensorType, *, alpha: float) -> TensorType:
    return gradient_rule(ct, x)


_activation(
    "elu",
    lambda x, *, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
    lambda ct, x, *, alpha: np.where(x > 0, ct, ct * alpha * np.exp(np.minimum(x, 0))),
    lambda t, x, alpha: t.nn.functional.elu(x, alpha),
    saves="x",
    type_rule=_elu_rule,
    grad_type_rule=_elu_grad_rule,
    attrs=({"alpha": 1.0}, {"alpha": 0.5}),
)


# clip: relu is clip(0, inf), relu6 clip(0, 6)


def _clip_rule(x: TensorType, *, low: float, high: float, inclusive: bool = False) -> TensorType:
    require_dtype("x", x, "f32")
    require(low <= high, f"the lower bound {low} is above the upper bound {high}")
    return x


# The gradient passes where x lies inside the bounds. With open bounds the output tells: low < y < high iff
# low < x < high. With closed bounds (torch.clamp) it does not, since y = low also where x < low; there the mask
# is taken from the input, before that dies. Either way one bit per element is kept.
def _clip_gradient(b: Builder, node: Node, ct: Value) -> Value:
    inclusive = node.attrs["inclusive"]
    source = node.inputs[0] if inclusive else node.outputs[0]
    mask = b("range_mask", source, low=node.attrs["low"], high=node.attrs["high"], inclusive=inclusive)
    return b("apply_mask", ct, mask)


def _clip(x: Array, *, low: float, high: float, inclusive: bool = False) -> Array:
    return np.clip(x, low, high)


define(
    "clip",
    type_rule=_clip_rule,
    reference=_clip,
    vjp=unary_vjp(_clip_gradient),
    samples=[
        Sample((f32(3, 5),), {"low": 0.0, "high": math.inf}, lambda t, x: x.relu(), (0,)),
        Sample((f32(37),), {"low": 0.0, "high": 6.0}, lambda t, x: t.nn.functional.relu6(x), (0,), -8.0, 8.0),
        Sample(
            (np.array([-2, -1, 0, 1, 2], np.float32),),
            {"low": -1.0, "high": 1.0, "inclusive": True},
            lambda t, x: x.clamp(-1, 1),
        ),
        Sample((f32(9),), {"low": -math.inf, "high": 0.5, "inclusive": True}, lambda t, x: x.clamp(max=0.5), (0,)),
        Sample((f32(),), {"low": -1.0, "high": 1.0}, lambda t, x: t.nn.functional.hardtanh(x), (0,)),
    ],
    in_place=(0,),
    saves="1-bit mask, from y (inclusive: from x)",
)


# Epilogues of matmul and conv2d


def require_epilogue(activation: str, low: float, high: float) -> None:
    """Raise ValueError unless this is an epilogue that kernels know."""
    require(activation in EPILOGUES, f"activation {activation!r} is not one of {', '.join(EPILOGUES)}")
    require(activation != "clip" or low <= high, f"the lower bound {low} is above the upper bound {high}")


def apply_epilogue(y: Array, activation: str, low: float, high: float) -> Array:
    """The activation that a matmul or conv2d applies to its result."""
    match activation:
        case "clip":
            return np.clip(y, low, high)
        case "gelu" | "gelu_tanh":
            return _gelu(y, approximate=activation == "gelu_tanh")
        case "silu":
            return y * sigmoid(y)
        case "hardswish":
            return y * _hardsigmoid(y)
    return y


def torch_epilogue(torch: Any, y: Any, activation: str, low: float = 0.0, high: float = 0.0) -> Any:
    """The same on torch tensors, for samples."""
    functional = torch.nn.functional
    match activation:
        case "clip":
            return y.clamp(low, high)
        case "gelu" | "gelu_tanh":
            return functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
        case "silu" | "hardswish":
            return getattr(functional, activation)(y)
    return y

"""What the op families share: shape rules, helpers of gradient rules, and the operands of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from pockc.errors import InternalError
from pockc.ir import NUMPY_DTYPES, Array, Builder, Node, TensorType, Value
from pockc.ops import Sample

if TYPE_CHECKING:
    from pockc.ops import TypeRule, Vjp

Cotangents = tuple[Value | None, ...]
Need = frozenset[int]
Gradients = Sequence[Value | None]


def f32(*shape: int) -> TensorType:
    """A float tensor type, for samples and type rules."""
    return TensorType(shape, "f32")


def i64(*shape: int) -> TensorType:
    """An index tensor type."""
    return TensorType(shape, "i64")


def boolean(*shape: int) -> TensorType:
    """A bool tensor type."""
    return TensorType(shape, "bool")


# Type rules


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_dtype(name: str, type_: TensorType, *dtypes: str) -> None:
    """Raise ValueError unless the operand ``name`` has one of these element types."""
    require(type_.dtype in dtypes, f"{name} must be {' or '.join(dtypes)}, not {type_}")


def require_weight(name: str, type_: TensorType) -> None:
    """Raise ValueError unless the operand ``name`` is f32, or a compact frozen weight."""
    require(type_.dtype == "f32" or type_.is_compact, f"{name} must be f32, not {type_}")


def require_type(name: str, found: TensorType, expected: TensorType) -> None:
    """Raise ValueError unless the operand ``name`` has exactly this type."""
    require(found == expected, f"{name} must be {expected}, not {found}")


def require_axis(axis: int, rank: int) -> None:
    """Raise ValueError unless ``axis`` is a non-negative axis of a tensor of this rank."""
    require(0 <= axis < rank, f"axis {axis} is outside a tensor of rank {rank}")


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape under numpy's broadcasting; ValueError if there is none."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        listed = " and ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"shapes {listed} do not broadcast") from None


def same_type_rule(*dtypes: str) -> TypeRule:
    """The type rule of a function of one tensor that keeps its type."""

    def rule(x: TensorType) -> TensorType:
        require_dtype("x", x, *dtypes)
        return x

    return rule


def gradient_rule(ct: TensorType, saved: TensorType) -> TensorType:
    """The type rule of an elementwise gradient op: cotangent and saved tensor have one type."""
    require_dtype("ct", ct, "f32")
    require_type("the saved tensor", saved, ct)
    return ct


# Gradient rules


def cotangent_of(node: Node, cotangents: Cotangents) -> Value:
    """The cotangent of the first output, the only one through which a gradient may flow."""
    first, *rest = cotangents
    if first is None or any(ct is not None for ct in rest):
        raise InternalError(f"{node.origin}: {node.op} is differentiable in its first output only")
    return first


def unary_vjp(rule: Callable[[Builder, Node, Value], Value | None]) -> Vjp:
    """The vjp of an op of which only input 0 has a gradient: ``rule(builder, node, ct)``."""

    def vjp(builder: Builder, node: Node, cotangents: Cotangents, need: Need) -> Gradients:
        gradient = rule(builder, node, cotangent_of(node, cotangents)) if 0 in need else None
        return (gradient, *(None for _ in node.inputs[1:]))

    return vjp


def reshaped(builder: Builder, value: Value, shape: tuple[int, ...]) -> Value:
    """The value in another shape; itself if it has that shape already."""
    return value if value.type.shape == shape else builder("reshape", value, shape=shape)


def unbroadcast(builder: Builder, gradient: Value, shape: tuple[int, ...]) -> Value:
    """The gradient of an operand of this shape that was broadcast: its sum over the axes that were stretched."""
    if gradient.type.shape == shape:
        return gradient
    found = gradient.type.shape
    extra = len(found) - len(shape)
    stretched = (i for i, size in enumerate(shape, start=extra) if size == 1 and found[i] != 1)
    axes = (*range(extra), *stretched)
    return reshaped(builder, builder("reduce_sum", gradient, axes=axes) if axes else gradient, shape)


def scaled(builder: Builder, value: Value, factor: float) -> Value:
    """``value * factor``."""
    return builder("mul", value, builder.constant(factor))


# Numpy references


def pack_bits(bits: Array) -> Array:
    """A flat bit mask, bit i in byte i // 8, least significant first; padding bits are zero."""
    return np.packbits(bits.reshape(-1), bitorder="little")


def unpack_bits(mask: Array, shape: tuple[int, ...]) -> Array:
    """The bool tensor of this shape that ``pack_bits`` packed."""
    return np.unpackbits(mask, count=prod(shape), bitorder="little").astype(np.bool_).reshape(shape)


# Samples


def sample_operands(sample: Sample, seed: int = 0) -> list[Array]:
    """The operand arrays of a sample: given arrays as they are, the others at random.

    f32 is uniform in [low, high), bool a fair coin, integers are uniform in [0, 5).
    """
    random = np.random.default_rng(seed)

    def fill(operand: TensorType | Array) -> Array:
        if not isinstance(operand, TensorType):
            return np.asarray(operand)
        if operand.dtype == "f32":
            return random.uniform(sample.low, sample.high, operand.shape).astype(np.float32)
        high = 2 if operand.dtype == "bool" else 5
        return random.integers(0, high, operand.shape).astype(NUMPY_DTYPES[operand.dtype])

    return [fill(operand) for operand in sample.inputs]


def torch_gradient(function: Callable[..., Any], *wrt: int) -> Callable[..., Any]:
    """The torch counterpart of a gradient op: ``(torch, ct, *operands)`` -> gradients of operands ``wrt`` by autograd.

    ``function(torch, *operands)`` is the forward op on torch tensors.
    """

    def gradient(torch: Any, ct: Any, *operands: Any) -> Any:
        leaves = [x.detach().requires_grad_(i in wrt) for i, x in enumerate(operands)]
        found = torch.autograd.grad(function(torch, *leaves), [leaves[i] for i in wrt], ct)
        return found if len(wrt) > 1 else found[0]

    return gradient

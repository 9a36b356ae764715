"""Which ops take numbers in 16 bits, and what they make of them: as runtime/kernels/halves.inc has it.

An op on 16-bit operands is the op on the float32 numbers that they are; its first result is rounded to 16 bits, or
stays float32 where it is a sum over samples, such as the gradient of a weight, or no number. So no op has a type rule,
or a reference, of its own for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pockc.ir import TensorType

Positions = tuple[int, ...]


def _table(positions: Positions, *ops: str) -> dict[str, Positions]:
    return dict.fromkeys(ops, positions)


# By op, the operands that may have 16 bits; the first result has them then.
NARROWS: Mapping[str, Positions] = {
    **_table((0, 1), "matmul"),
    **_table((0,), "conv2d", "conv2d_grad_input"),
    **_table((0, 1, 2), "attention"),
    **_table((1,), "cross_entropy_grad_tile"),
    **_table(
        (0,),
        "neg", "abs", "exp", "sqrt", "rsqrt", "reciprocal", "tanh", "erf", "sigmoid", "silu", "hardswish",
        "hardsigmoid", "gelu", "clip", "apply_mask", "max_pool2d", "max_pool2d_grad", "avg_pool2d", "layer_norm",
        "rms_norm",
    ),
    **_table(
        (0, 1),
        "tanh_grad", "sigmoid_grad", "silu_grad", "hardswish_grad", "gelu_grad", "add", "sub", "mul", "div", "maximum",
        "minimum", "layer_norm_grad_input", "rms_norm_grad_input",
    ),
}  # fmt: skip
# The same of ops whose results are those of float32.
SUMS: Mapping[str, Positions] = {
    **_table((0,), "range_mask", "reduce_sum", "reduce_mean", "cross_entropy_tile"),
    **_table((0, 1), "conv2d_grad_weight", "layer_norm_grad_gamma", "rms_norm_grad_gamma"),
    **_table((0, 1, 2, 3, 4), "attention_grad"),  # whose gradients of keys and values are sums over queries
}
# These move elements without looking at them. Their reference kernels do it for any size.
MOVES = frozenset({"copy", "reshape", "transpose", "expand", "slice", "insert", "concat", "take"})


def half_types(
    rule: Callable[..., TensorType | tuple[TensorType, ...]],
    op: str,
    types: Sequence[TensorType],
    attrs: Mapping[str, Any],
) -> TensorType | tuple[TensorType, ...]:
    """What the type rule of an op gives, also for operands of 16 bits. Raises ValueError where it refuses them."""
    dtypes = {type_.dtype for type_ in types if type_.is_half}
    if not dtypes or op == "cast":
        return rule(*types, **attrs)
    positions = {i for i, type_ in enumerate(types) if type_.is_half}
    taken = NARROWS.get(op, SUMS.get(op, tuple(range(len(types))) if op in MOVES else ()))
    if not positions <= set(taken) or len(dtypes) > 1:
        raise ValueError(f"it does not take operands of {' and '.join(map(str, types))}")
    result = rule(*(replace(type_, dtype="f32") if type_.is_half else type_ for type_ in types), **attrs)
    if op in SUMS or is_weight_gradient(op, attrs, types):
        return result
    first, *rest = result if isinstance(result, tuple) else (result,)
    narrowed = replace(first, dtype=dtypes.pop())
    return (narrowed, *rest) if rest else narrowed


def is_weight_gradient(op: str, attrs: Mapping[str, Any], types: Sequence[TensorType]) -> bool:
    """Whether a node is the product x^T ct of all samples: the gradient of a linear layer's weight, which stays f32."""
    return op == "matmul" and attrs["transpose_a"] and len(types[0].shape) == len(types[1].shape) == 2

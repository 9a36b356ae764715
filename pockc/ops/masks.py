"""1-bit masks: bit i of byte i // 8, least significant first, over the flat index; padding bits are zero."""

from __future__ import annotations

import math

import numpy as np

from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import f32, pack_bits, require, require_dtype, require_type, unary_vjp, unpack_bits


def mask_type(elements: int) -> TensorType:
    """The type of a bit mask over this many elements."""
    return TensorType(((elements + 7) // 8,), "u8")


def _range_mask_rule(x: TensorType, *, low: float, high: float, inclusive: bool = False) -> TensorType:
    require_dtype("x", x, "f32")
    require(low <= high, f"the lower bound {low} is above the upper bound {high}")
    return mask_type(x.elements)


def in_range(x: Array, low: float, high: float, inclusive: bool) -> Array:
    """Where x lies between the bounds; an infinite one always holds."""
    above = x >= low if inclusive or low == -math.inf else x > low
    below = x <= high if inclusive or high == math.inf else x < high
    return above & below


def _range_mask(x: Array, *, low: float, high: float, inclusive: bool = False) -> Array:
    return pack_bits(in_range(x, low, high, inclusive))


define(
    "range_mask",
    type_rule=_range_mask_rule,
    reference=_range_mask,
    samples=[
        Sample((f32(3, 7),), {"low": 0.0, "high": math.inf}),
        Sample((f32(16),), {"low": -1.0, "high": 1.0}),
        Sample((np.array([-1, -0.5, 0, 1, 2], np.float32),), {"low": -1.0, "high": 1.0}),
        Sample((np.array([-1, -0.5, 0, 1, 2], np.float32),), {"low": -1.0, "high": 1.0, "inclusive": True}),
        Sample((f32(9),), {"low": -math.inf, "high": 0.5, "inclusive": True}),
        Sample((f32(),), {"low": -math.inf, "high": math.inf}),
    ],
)


def _apply_mask_rule(x: TensorType, mask: TensorType, *, scale: float = 1.0) -> TensorType:
    require_dtype("x", x, "f32")
    require_type("the mask", mask, mask_type(x.elements))
    return x


def _apply_mask(x: Array, mask: Array, *, scale: float = 1.0) -> Array:
    return np.where(unpack_bits(mask, x.shape), x * scale, np.zeros_like(x))


def _apply_mask_gradient(b: Builder, node: Node, ct: Value) -> Value:
    return b("apply_mask", ct, node.inputs[1], scale=node.attrs["scale"])


def _bits(elements: int) -> Array:
    return pack_bits(np.random.default_rng(elements).integers(0, 2, elements).astype(np.bool_))


define(
    "apply_mask",
    type_rule=_apply_mask_rule,
    reference=_apply_mask,
    vjp=unary_vjp(_apply_mask_gradient),
    samples=[
        Sample((f32(3, 7), _bits(21)), differentiable=(0,)),
        Sample((f32(2, 4, 8), _bits(64)), {"scale": 1.25}, differentiable=(0,)),
        Sample((f32(), _bits(1)), {"scale": 2.0}, differentiable=(0,)),
    ],
    in_place=(0,),
    saves="the mask",
)

"""What a dynamic loss scale needs: whether gradients are finite, and a gate that stops a step where they are not."""

from __future__ import annotations

import numpy as np

from pockc.ir import Array, TensorType
from pockc.ops import Sample, define
from pockc.ops.common import boolean, f32, i64, require, require_dtype, require_type


def _all_finite_rule(*tensors: TensorType) -> TensorType:
    require(len(tensors) > 0, "there is nothing to look at")
    for tensor in tensors:
        require_dtype("a tensor", tensor, "f32")
    return boolean()


def _all_finite(*tensors: Array) -> Array:
    return np.asarray(all(np.isfinite(tensor).all() for tensor in tensors))


def _with(value: float, *shape: int) -> Array:
    """Ones, but for the last element."""
    array = np.ones(shape, np.float32)
    array.flat[-1] = value
    return array


define(
    "all_finite",
    type_rule=_all_finite_rule,
    reference=_all_finite,
    samples=[
        Sample(operands, torch=lambda t, *xs: t.stack([t.isfinite(x).all() for x in xs]).all())
        for operands in (
            (f32(3, 5),),
            (f32(), f32(100), f32(7, 3)),
            (np.array([1e-45, -3e38, 0.0, -0.0], np.float32), f32(5000)),
            (f32(5), _with(np.nan, 4099)),
            (_with(np.inf, 17, 3), f32(5)),
            (_with(-np.inf, 1), f32(5)),
        )
    ],
)


def _gate_rule(is_open: TensorType, *before: TensorType) -> TensorType:
    require_type("what opens the gate", is_open, boolean())
    for value in before:
        require_dtype("what comes before the gate", value, "f32", "i64", "i32", "u8", "bool")
    return f32()


# Not a pure function: where the gate is shut, no node behind it runs, and states keep what they have. The interpreter
# and the runtime look at the result, 1 or 0, and end the entry there. `before` are values that exist in either case.
def _gate(is_open: Array, *before: Array) -> Array:
    return np.asarray(is_open, np.float32)


define(
    "gate",
    type_rule=_gate_rule,
    reference=_gate,
    samples=[  # of open ones: the kernel of a shut one says so by its status
        Sample((np.array(True),), torch=lambda t, is_open: is_open.float()),
        Sample((np.array(True), f32(), i64(3), boolean()), torch=lambda t, is_open, *before: is_open.float()),
    ],
)

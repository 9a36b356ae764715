"""Convolutions of 3x3 taps and stride 1, and their input gradients, by Winograd's algorithm.

Not another function than `conv2d` and `conv2d_grad_input`, only another way to compute them: the reference is theirs.
The place pass puts these ops where they are faster; nothing earlier in the pipeline knows them. ``outputs`` is the
number of results per axis that one tile computes at once, 2 or 4.

With ``transposed``, w is used from its output side: ``x`` is the cotangent of a convolution with w, and the result that
of its input. That is the convolution of x with the taps in reverse order, so ``padding`` is 2 minus that of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pockc.ir import Array, TensorType
from pockc.ops import Sample, define
from pockc.ops.activation import apply_epilogue, require_epilogue, torch_epilogue
from pockc.ops.common import f32, require, require_dtype, require_type, require_weight
from pockc.ops.conv import Padding, padded, taps, window_output

TAPS = 3
TILES = (2, 4)  # what `outputs` may be


def _rule(
    x: TensorType,
    w: TensorType,
    bias: TensorType | None = None,
    *,
    outputs: int,
    padding: Padding = (0, 0, 0, 0),
    transposed: bool = False,
    activation: str = "none",
    low: float = 0.0,
    high: float = 0.0,
) -> TensorType:
    require_dtype("x", x, "f32")
    require_weight("w", w)
    require(len(x.shape) == 4 and len(w.shape) == 4, f"x and w must have four axes, not {x} and {w}")
    require(outputs in TILES, f"tiles must have {' or '.join(map(str, TILES))} outputs per axis, not {outputs}")
    depth, filters = x.shape[3], w.shape[3 if transposed else 0]
    rows, columns = (depth, filters) if transposed else (filters, depth)
    require_type("w", w, TensorType((rows, TAPS, TAPS, columns), w.dtype))
    if bias is not None:
        require_type("the bias", bias, f32(filters))
    require_epilogue(activation, low, high)
    height, width = window_output((x.shape[1], x.shape[2]), (TAPS, TAPS), (1, 1), padding, (1, 1))
    return f32(x.shape[0], height, width, filters)


def _reference(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    outputs: int,
    padding: Padding = (0, 0, 0, 0),
    transposed: bool = False,
    activation: str = "none",
    low: float = 0.0,
    high: float = 0.0,
) -> Array:
    weight = np.flip(w, (1, 2)).transpose(3, 1, 2, 0) if transposed else w
    size = window_output((x.shape[1], x.shape[2]), (TAPS, TAPS), (1, 1), padding, (1, 1))
    y = np.zeros((x.shape[0], *size, weight.shape[0]), x.dtype)
    for i, j, seen in taps(padded(x, padding), (TAPS, TAPS), (1, 1), (1, 1), size):
        y += seen @ weight[:, i, j, :].T
    return apply_epilogue(y if bias is None else y + bias, activation, low, high)


def _torch(attrs: Mapping[str, Any]) -> Any:
    top, bottom, left, right = attrs.get("padding", (0, 0, 0, 0))

    def run(torch: Any, x: Any, w: Any, bias: Any = None) -> Any:
        x = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
        weight = w.flip(1, 2).permute(3, 0, 1, 2) if attrs.get("transposed") else w.permute(0, 3, 1, 2)
        y = torch.nn.functional.conv2d(x, weight, bias).permute(0, 2, 3, 1)
        return torch_epilogue(torch, y, attrs.get("activation", "none"), attrs.get("low", 0.0), attrs.get("high", 0.0))

    return run


# x [N,H,W,C], w, attributes: sizes with and without tiles that reach over the edge, and every epilogue.
_CASES: tuple[tuple[TensorType, TensorType, Mapping[str, Any]], ...] = (
    (f32(1, 6, 6, 3), f32(4, 3, 3, 3), {}),
    (f32(2, 5, 7, 5), f32(6, 3, 3, 5), {"padding": (1, 1, 1, 1)}),
    (f32(1, 4, 3, 17), f32(18, 3, 3, 17), {"padding": (0, 1, 2, 0), "activation": "clip", "low": -0.5, "high": 6.0}),
    (f32(1, 1, 1, 2), f32(3, 3, 3, 2), {"padding": (1, 1, 1, 1), "activation": "silu"}),
    (f32(2, 9, 4, 2), f32(5, 3, 3, 2), {"padding": (2, 2, 2, 2), "activation": "hardswish"}),
    (f32(1, 8, 8, 4), f32(4, 3, 3, 4), {"padding": (1, 1, 1, 1), "activation": "gelu"}),
    (f32(2, 5, 6, 4), f32(4, 3, 3, 3), {"padding": (1, 1, 1, 1), "transposed": True}),
    (f32(1, 7, 3, 18), f32(18, 3, 3, 17), {"padding": (2, 1, 0, 2), "transposed": True}),
)


def _sample(x: TensorType, w: TensorType, attrs: Mapping[str, Any], outputs: int) -> Sample:
    bias = () if attrs.get("activation", "none") == "none" else (f32(w.shape[0]),)
    return Sample((x, w, *bias), {"outputs": outputs, **attrs}, _torch(attrs))


define(
    "conv2d_winograd",
    type_rule=_rule,
    reference=_reference,
    samples=[_sample(x, w, attrs, outputs) for x, w, attrs in _CASES for outputs in TILES],
    weight=1,
)

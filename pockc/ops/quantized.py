"""Eight-bit inference: tensors of one byte per element, which stand for ``(code - zero_point) * scale``.

Codes are u8, with one scale and zero point for all of a tensor. Weights are u8 too: code - 128 is a signed number of 8
bits, in units of a scale of its output channel. A kernel sums products of integers exactly, and brings the sum to the
scale of its result with one f32 product and one f32 sum, each rounded, and one rounding to the nearest code, even where
two are as near. Every kernel gives the same codes, whatever its order of summation.

These ops have no gradients: they are for what runs in front of everything that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pockc.ir import Array, TensorType
from pockc.ops import OPS, Sample, define
from pockc.ops.common import f32, require, require_dtype, require_type
from pockc.ops.conv import Padding, Pair, padded, require_groups, taps, window_output
from pockc.ops.pool import MOST_TAPS, require_no_empty_window

CODES = 256
LARGEST_CODE = CODES - 1
WEIGHT_ZERO = 128  # the code of a weight of 0
MOST_PRODUCTS = 1 << 16  # of one sum, which then fits into 32 bits


def u8(*shape: int) -> TensorType:
    """The type of a tensor of codes."""
    return TensorType(shape, "u8")


def _require_zero_point(zero_point: int) -> None:
    require(0 <= zero_point <= LARGEST_CODE, f"the zero point must be a code, not {zero_point}")


def _require_bounds(low: int, high: int) -> None:
    require(0 <= low <= high <= LARGEST_CODE, f"the bounds must be codes in order, not {low} and {high}")


def to_codes(x: Array, low: int, high: int) -> Array:
    """The nearest codes between two bounds; ``low`` for what is no number."""
    bounded = np.where(x > low, x, np.asarray(low, x.dtype))
    return np.rint(np.where(bounded < high, bounded, np.asarray(high, x.dtype))).astype(np.uint8)


# Between f32 and codes


def _quantize_rule(x: TensorType, *, scale: float, zero_point: int) -> TensorType:
    require_dtype("x", x, "f32")
    require(scale > 0, f"the scale must be above 0, not {scale}")
    _require_zero_point(zero_point)
    return u8(*x.shape)


def quantize(x: Array, *, scale: float, zero_point: int) -> Array:
    """The codes of f32 numbers: ``x / scale + zero_point``, rounded and bounded."""
    return to_codes(x.astype(np.float32) / np.float32(scale) + np.float32(zero_point), 0, LARGEST_CODE)


def _dequantize_rule(x: TensorType, *, scale: float, zero_point: int) -> TensorType:
    require_dtype("x", x, "u8")
    require(scale > 0, f"the scale must be above 0, not {scale}")
    _require_zero_point(zero_point)
    return f32(*x.shape)


def dequantize(x: Array, *, scale: float, zero_point: int) -> Array:
    """The f32 numbers that codes stand for."""
    return (x.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)


def _codes(*shape: int) -> Array:
    """Seeded codes over the whole range, for samples."""
    return np.random.default_rng(sum(shape)).integers(0, CODES, shape).astype(np.uint8)


_HALVES = np.array([-1.25, -0.75, 0.25, 0.75, 1.25, np.nan, np.inf, -np.inf, 1e9], np.float32)

define(
    "quantize",
    type_rule=_quantize_rule,
    reference=quantize,
    samples=[
        Sample((f32(3, 37),), {"scale": 0.0123, "zero_point": 131}),
        Sample((f32(2, 3, 5, 16),), {"scale": 0.01, "zero_point": 0}),
        Sample((_HALVES,), {"scale": 0.5, "zero_point": 100}),
        Sample((f32(),), {"scale": 1.0, "zero_point": 255}),
    ],
)
define(
    "dequantize",
    type_rule=_dequantize_rule,
    reference=dequantize,
    samples=[
        Sample((_codes(3, 37),), {"scale": 0.0123, "zero_point": 131}, tolerance=0.0),
        Sample((_codes(2, 3, 5, 16),), {"scale": 0.7, "zero_point": 0}, tolerance=0.0),
        Sample((_codes(),), {"scale": 3.0, "zero_point": 255}, tolerance=0.0),
    ],
)


# Elementwise


def _lookup_rule(x: TensorType, table: TensorType) -> TensorType:
    require_dtype("x", x, "u8")
    require_type("the table", table, u8(CODES))
    return x


def _lookup(x: Array, table: Array) -> Array:
    return np.take(table, x)


define(
    "lookup_int8",  # any function of one code
    type_rule=_lookup_rule,
    reference=_lookup,
    samples=[Sample((_codes(3, 70), _codes(CODES))), Sample((_codes(), _codes(CODES)))],
    in_place=(0,),
)


def _add_rule(
    a: TensorType,
    b: TensorType,
    *,
    a_factor: float,
    a_zero_point: int,
    b_factor: float,
    b_zero_point: int,
    zero_point: int,
    low: int = 0,
    high: int = LARGEST_CODE,
) -> TensorType:
    require_dtype("a", a, "u8")
    require_type("b", b, a)
    for zero in (a_zero_point, b_zero_point, zero_point):
        _require_zero_point(zero)
    _require_bounds(low, high)
    return a


def _add(
    a: Array,
    b: Array,
    *,
    a_factor: float,
    a_zero_point: int,
    b_factor: float,
    b_zero_point: int,
    zero_point: int,
    low: int = 0,
    high: int = LARGEST_CODE,
) -> Array:
    """Factors are scales in units of the result's."""
    left = dequantize(a, scale=a_factor, zero_point=a_zero_point)
    right = dequantize(b, scale=b_factor, zero_point=b_zero_point)
    return to_codes(left + right + np.float32(zero_point), low, high)


_FACTORS = {"a_factor": 0.81, "a_zero_point": 120, "b_factor": 0.37, "b_zero_point": 3, "zero_point": 90}

define(
    "add_int8",
    type_rule=_add_rule,
    reference=_add,
    samples=[
        Sample((_codes(2, 5, 5, 24), _codes(2, 5, 5, 24)[::-1].copy()), _FACTORS),
        Sample((_codes(33), _codes(33)[::-1].copy()), {**_FACTORS, "low": 90, "high": 200}),
        Sample((_codes(), _codes()), _FACTORS),
    ],
    in_place=(0, 1),
)


# Convolution


def _conv2d_rule(
    x: TensorType,
    w: TensorType,
    factor: TensorType,
    offset: TensorType,
    *,
    zero_point: int,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    low: int = 0,
    high: int = LARGEST_CODE,
) -> TensorType:
    require_dtype("x", x, "u8")
    require(len(x.shape) == 4 and len(w.shape) == 4, f"x and w must have four axes, not {x} and {w}")
    batch, *size, channels = x.shape
    *kernel, depth, filters = w.shape
    require_groups(channels, filters, groups)
    require_type("w", w, u8(*kernel, channels // groups, filters))
    require_type("the factor", factor, f32(filters))
    require_type("the offset", offset, f32(filters))
    require(kernel[0] * kernel[1] * depth <= MOST_PRODUCTS, f"a sum of {kernel} times {depth} products is too long")
    _require_zero_point(zero_point)
    _require_bounds(low, high)
    height, width = window_output((size[0], size[1]), (kernel[0], kernel[1]), stride, padding, dilation)
    return u8(batch, height, width, filters)


def _conv2d(
    x: Array,
    w: Array,
    factor: Array,
    offset: Array,
    *,
    zero_point: int,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    low: int = 0,
    high: int = LARGEST_CODE,
) -> Array:
    """``code(factor * sum((x - zero_point) * (w - 128)) + offset)``; padding is x = zero_point.

    With scales sx, sw, sy, a bias b, and zero point z of the result, the factor is sx * sw / sy, the offset b / sy + z.
    The sums are integers, which f64 products add up exactly.
    """
    numbers = x.astype(np.float64) - zero_point
    weights = w.transpose(3, 0, 1, 2).astype(np.float64) - WEIGHT_ZERO
    window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    sums = OPS["conv2d"].reference(numbers, weights, **window)
    return to_codes(np.asarray(sums, np.float32) * factor + offset, low, high)


# x [N,H,W,C], w [kh,kw,C/groups,O], attributes: as those of conv2d, and sizes around the blocks of fast kernels.
_CASES: tuple[tuple[tuple[int, ...], tuple[int, ...], Mapping[str, Any]], ...] = (
    ((2, 5, 6, 3), (3, 3, 3, 4), {"zero_point": 128}),
    ((2, 5, 6, 3), (1, 1, 3, 4), {"zero_point": 0}),
    ((1, 7, 5, 40), (1, 1, 40, 72), {"zero_point": 17, "low": 5, "high": 250}),
    ((1, 3, 5, 1154), (1, 1, 1154, 33), {"zero_point": 255}),
    ((1, 6, 6, 130), (3, 3, 130, 17), {"zero_point": 3, "padding": (1, 1, 1, 1)}),
    ((1, 6, 6, 3), (1, 1, 3, 4), {"zero_point": 9, "stride": (2, 2)}),
    ((2, 7, 6, 3), (3, 3, 3, 16), {"zero_point": 77, "stride": (2, 2), "padding": (1, 1, 1, 1)}),
    ((1, 7, 9, 2), (3, 2, 2, 3), {"zero_point": 200, "dilation": (2, 3), "padding": (2, 1, 0, 3)}),
    ((2, 5, 5, 4), (3, 3, 2, 6), {"zero_point": 1, "groups": 2, "padding": (1, 1, 1, 1)}),
    ((2, 6, 6, 5), (3, 3, 1, 5), {"zero_point": 99, "groups": 5, "padding": (1, 1, 1, 1)}),
    ((1, 7, 7, 18), (5, 5, 1, 18), {"zero_point": 0, "groups": 18, "stride": (2, 2), "padding": (2, 2, 2, 2)}),
    ((1, 9, 8, 40), (3, 3, 1, 40), {"zero_point": 255, "groups": 40, "padding": (1, 0, 1, 0), "high": 99}),
    ((1, 4, 17, 20), (3, 3, 1, 20), {"zero_point": 31, "groups": 20, "padding": (1, 1, 1, 1)}),
    ((1, 5, 5, 3), (3, 3, 1, 6), {"zero_point": 5, "groups": 3, "stride": (2, 1), "padding": (1, 0, 1, 0)}),
)


def _conv_sample(x: tuple[int, ...], w: tuple[int, ...], attrs: Mapping[str, Any]) -> Sample:
    random = np.random.default_rng(w[-1])
    spread = 40 / np.sqrt(w[0] * w[1] * w[2]) / 127 / 64  # so that results reach over the codes
    factor = random.uniform(0.2 * spread, 2 * spread, w[-1]).astype(np.float32)
    return Sample((_codes(*x), _codes(*w), factor, random.uniform(0, CODES, w[-1]).astype(np.float32)), attrs)


define(
    "conv2d_int8",
    type_rule=_conv2d_rule,
    reference=_conv2d,
    samples=[_conv_sample(*case) for case in _CASES],
)


# Pooling


def _max_pool2d_rule(
    x: TensorType, *, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair = (1, 1)
) -> TensorType:
    require_dtype("x", x, "u8")
    require(len(x.shape) == 4, f"x must be u8[N,H,W,C], not {x}")
    batch, height, width, channels = x.shape
    output = window_output((height, width), kernel, stride, padding, dilation)
    require(kernel[0] * kernel[1] <= MOST_TAPS, f"a window of {kernel} has more than {MOST_TAPS} positions")
    require_no_empty_window((height, width), kernel, stride, padding, dilation)
    return u8(batch, *output, channels)


def _max_pool2d(x: Array, *, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair = (1, 1)) -> Array:
    """The largest code of each window; padding, being 0, never wins over what is there."""
    output = window_output((x.shape[1], x.shape[2]), kernel, stride, padding, dilation)
    seen = [tap for _, _, tap in taps(padded(x, padding, 0), kernel, stride, dilation, output)]
    return np.asarray(np.stack(seen).max(0))


define(
    "max_pool2d_int8",
    type_rule=_max_pool2d_rule,
    reference=_max_pool2d,
    samples=[
        Sample((_codes(2, 6, 6, 3),), {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0)}),
        Sample((_codes(1, 7, 8, 20),), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1)}),
        Sample(
            (_codes(1, 9, 9, 2),),
            {"kernel": (2, 3), "stride": (2, 1), "padding": (1, 0, 1, 2), "dilation": (2, 3)},
        ),
    ],
)

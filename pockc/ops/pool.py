"""Two-dimensional pooling, NHWC; pooling over the whole image is a reduce_mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import f32, require, require_dtype, require_type, torch_gradient, unary_vjp
from pockc.ops.conv import Padding, Pair, cropped, padded, padded_zeros, taps, window_output

MOST_TAPS = 255  # of a window, whose positions are numbered in one byte


def _require_image(x: TensorType) -> None:
    require_dtype("x", x, "f32")
    require(len(x.shape) == 4, f"x must be f32[N,H,W,C], not {x}")


def require_no_empty_window(size: Pair, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair) -> None:
    """Every window must see at least one element that is not padding."""
    output = window_output(size, kernel, stride, padding, dilation)
    inside = padded(np.ones((1, *size, 1), np.bool_), padding, 0)
    seen = np.logical_or.reduce([tap for _, _, tap in taps(inside, kernel, stride, dilation, output)])
    require(bool(seen.all()), f"the padding {padding} leaves a window of {kernel} without any element of the input")


# max_pool2d


def _max_pool2d_rule(
    x: TensorType, *, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair = (1, 1)
) -> tuple[TensorType, TensorType]:
    _require_image(x)
    batch, height, width, channels = x.shape
    output = window_output((height, width), kernel, stride, padding, dilation)
    require(kernel[0] * kernel[1] <= MOST_TAPS, f"a window of {kernel} has more than {MOST_TAPS} positions")
    require_no_empty_window((height, width), kernel, stride, padding, dilation)
    shape = (batch, *output, channels)
    return f32(*shape), TensorType(shape, "u8")


def _max_pool2d(
    x: Array, *, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair = (1, 1)
) -> tuple[Array, Array]:
    output = window_output((x.shape[1], x.shape[2]), kernel, stride, padding, dilation)
    windows = np.stack([tap for _, _, tap in taps(padded(x, padding, -np.inf), kernel, stride, dilation, output)])
    return windows.max(0), windows.argmax(0).astype(np.uint8)


def _max_pool2d_gradient(b: Builder, node: Node, ct: Value) -> Value:
    return b("max_pool2d_grad", ct, node.outputs[1], size=node.inputs[0].type.shape[1:3], **node.attrs)


def _max_pool2d_grad_rule(
    ct: TensorType,
    indices: TensorType,
    *,
    size: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair = (1, 1),
) -> TensorType:
    require(len(ct.shape) == 4, f"ct must be f32[N,H,W,C], not {ct}")
    x = f32(ct.shape[0], *size, ct.shape[3])
    y, positions = _max_pool2d_rule(x, kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    require_type("ct", ct, y)
    require_type("the indices", indices, positions)
    return x


def _max_pool2d_grad(
    ct: Array,
    indices: Array,
    *,
    size: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair = (1, 1),
) -> Array:
    gradient = padded_zeros((ct.shape[0], *size, ct.shape[3]), padding, ct.dtype)
    for i, j, seen in taps(gradient, kernel, stride, dilation, (ct.shape[1], ct.shape[2])):
        seen += np.where(indices == i * kernel[1] + j, ct, np.zeros_like(ct))
    return cropped(gradient, padding)


_MAX_CASES: tuple[tuple[TensorType, Mapping[str, Any]], ...] = (
    (f32(2, 6, 6, 3), {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0)}),
    (f32(1, 7, 8, 5), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1)}),
    (f32(1, 7, 6, 2), {"kernel": (3, 2), "stride": (1, 2), "padding": (0, 1, 1, 0)}),
    (f32(1, 9, 9, 2), {"kernel": (2, 3), "stride": (2, 1), "padding": (1, 0, 1, 2), "dilation": (2, 3)}),
)


def _torch_max_pool2d(attrs: Mapping[str, Any]) -> Any:
    top, bottom, left, right = attrs["padding"]
    (stride_y, stride_x), (dilation_y, dilation_x) = attrs["stride"], attrs.get("dilation", (1, 1))

    def run(torch: Any, x: Any) -> Any:
        x = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom), value=-torch.inf)
        window = (attrs["kernel"], attrs["stride"], 0, (dilation_y, dilation_x))
        y, flat = torch.nn.functional.max_pool2d(x, *window, return_indices=True)
        # torch gives positions in the padded image, we give positions in the window.
        row = (flat // x.shape[3] - stride_y * torch.arange(y.shape[2])[:, None]) // dilation_y
        column = (flat % x.shape[3] - stride_x * torch.arange(y.shape[3])) // dilation_x
        positions = (row * attrs["kernel"][1] + column).to(torch.uint8)
        return y.permute(0, 2, 3, 1), positions.permute(0, 2, 3, 1)

    return run


def _max_grad_samples() -> list[Sample]:
    """The indices come from pooling a random input, so that they never point into the padding."""
    samples = []
    for x, attrs in _MAX_CASES:
        random = np.random.default_rng(x.elements).standard_normal(x.shape).astype(np.float32)
        y, indices = _max_pool2d(random, **attrs)
        forward = _torch_max_pool2d(attrs)
        torch = _torch_gradient_at(lambda t, x, forward=forward: forward(t, x)[0], random)
        samples.append(Sample((f32(*y.shape), indices), {"size": x.shape[1:3], **attrs}, torch))
    return samples


def _torch_gradient_at(forward: Any, x: Array) -> Any:
    gradient = torch_gradient(forward, 0)
    return lambda torch, ct, indices: gradient(torch, ct, torch.from_numpy(x).to(ct.dtype))


define(
    "max_pool2d",
    type_rule=_max_pool2d_rule,
    reference=_max_pool2d,
    vjp=unary_vjp(_max_pool2d_gradient),
    samples=[Sample((x,), attrs, _torch_max_pool2d(attrs), (0,)) for x, attrs in _MAX_CASES],
    saves="u8 position of the maximum in each window",
)
define("max_pool2d_grad", type_rule=_max_pool2d_grad_rule, reference=_max_pool2d_grad, samples=_max_grad_samples())


# avg_pool2d


def _avg_pool2d_rule(
    x: TensorType, *, kernel: Pair, stride: Pair, padding: Padding, count_include_pad: bool = True
) -> TensorType:
    _require_image(x)
    batch, height, width, channels = x.shape
    output = window_output((height, width), kernel, stride, padding, (1, 1))
    if not count_include_pad:
        require_no_empty_window((height, width), kernel, stride, padding, (1, 1))
    return f32(batch, *output, channels)


def _divisor(size: Pair, kernel: Pair, stride: Pair, padding: Padding, count_include_pad: bool, dtype: Any) -> Array:
    """How many elements each window averages, [1, Ho, Wo, 1]."""
    output = window_output(size, kernel, stride, padding, (1, 1))
    if count_include_pad:
        return np.full((1, *output, 1), kernel[0] * kernel[1], dtype)
    inside = padded(np.ones((1, *size, 1), dtype), padding)
    return np.asarray(sum(tap for _, _, tap in taps(inside, kernel, stride, (1, 1), output)))


def _avg_pool2d(x: Array, *, kernel: Pair, stride: Pair, padding: Padding, count_include_pad: bool = True) -> Array:
    size = (x.shape[1], x.shape[2])
    output = window_output(size, kernel, stride, padding, (1, 1))
    total = np.sum([tap for _, _, tap in taps(padded(x, padding), kernel, stride, (1, 1), output)], axis=0)
    return np.asarray(total / _divisor(size, kernel, stride, padding, count_include_pad, x.dtype))


def _avg_pool2d_gradient(b: Builder, node: Node, ct: Value) -> Value:
    return b("avg_pool2d_grad", ct, size=node.inputs[0].type.shape[1:3], **node.attrs)


def _avg_pool2d_grad_rule(
    ct: TensorType, *, size: Pair, kernel: Pair, stride: Pair, padding: Padding, count_include_pad: bool = True
) -> TensorType:
    require(len(ct.shape) == 4, f"ct must be f32[N,H,W,C], not {ct}")
    x = f32(ct.shape[0], *size, ct.shape[3])
    forward = _avg_pool2d_rule(x, kernel=kernel, stride=stride, padding=padding, count_include_pad=count_include_pad)
    require_type("ct", ct, forward)
    return x


def _avg_pool2d_grad(
    ct: Array, *, size: Pair, kernel: Pair, stride: Pair, padding: Padding, count_include_pad: bool = True
) -> Array:
    gradient = padded_zeros((ct.shape[0], *size, ct.shape[3]), padding, ct.dtype)
    share = ct / _divisor(size, kernel, stride, padding, count_include_pad, ct.dtype)
    for _, _, seen in taps(gradient, kernel, stride, (1, 1), (ct.shape[1], ct.shape[2])):
        seen += share
    return cropped(gradient, padding)


# With torch's symmetric padding, then asymmetric, which torch has only with the padding counted.
_AVG_CASES: tuple[tuple[TensorType, Mapping[str, Any]], ...] = (
    (f32(2, 6, 6, 3), {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0)}),
    (f32(1, 7, 8, 5), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1)}),
    (f32(1, 7, 8, 5), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1), "count_include_pad": False}),
    (f32(1, 5, 6, 2), {"kernel": (3, 2), "stride": (1, 2), "padding": (0, 1, 1, 0)}),
    (f32(1, 5, 6, 2), {"kernel": (3, 2), "stride": (1, 2), "padding": (0, 1, 1, 0), "count_include_pad": False}),
)


def _torch_avg_pool2d(attrs: Mapping[str, Any]) -> Any:
    """Sums of windows over counts of windows, both by torch's pool on input that is padded explicitly."""
    top, bottom, left, right = attrs["padding"]

    def run(torch: Any, x: Any) -> Any:
        def pool(image: Any) -> Any:
            image = torch.nn.functional.pad(image.permute(0, 3, 1, 2), (left, right, top, bottom))
            return torch.nn.functional.avg_pool2d(image, attrs["kernel"], attrs["stride"]).permute(0, 2, 3, 1)

        return pool(x) if attrs.get("count_include_pad", True) else pool(x) / pool(torch.ones_like(x))

    return run


define(
    "avg_pool2d",
    type_rule=_avg_pool2d_rule,
    reference=_avg_pool2d,
    vjp=unary_vjp(_avg_pool2d_gradient),
    samples=[Sample((x,), attrs, _torch_avg_pool2d(attrs), (0,)) for x, attrs in _AVG_CASES],
)


def _avg_grad_sample(x: TensorType, attrs: Mapping[str, Any]) -> Sample:
    """Pooling is linear, so its gradient may be taken at zero."""
    at_zero = _torch_gradient_at(_torch_avg_pool2d(attrs), np.zeros(x.shape, np.float32))
    y = _avg_pool2d_rule(x, **attrs)
    return Sample((y,), {"size": x.shape[1:3], **attrs}, lambda torch, ct: at_zero(torch, ct, None))


define(
    "avg_pool2d_grad",
    type_rule=_avg_pool2d_grad_rule,
    reference=_avg_pool2d_grad,
    samples=[_avg_grad_sample(x, attrs) for x, attrs in _AVG_CASES],
)

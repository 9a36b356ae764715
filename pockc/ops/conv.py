"""Two-dimensional convolution and its gradients: activations NHWC, weights OHWI with I = C / groups.

Written as a sum over the taps of the kernel: tap (i, j) sees the padded input shifted by (i, j) times the dilation and
strided, a tensor of the output's height and width. The gradients are the transposes of that, tap by tap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pockc.errors import InternalError
from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.activation import apply_epilogue, require_epilogue, torch_epilogue
from pockc.ops.common import (
    Cotangents,
    Gradients,
    Need,
    cotangent_of,
    f32,
    require,
    require_dtype,
    require_type,
    require_weight,
    unpack_bits,
)
from pockc.ops.masks import in_range, mask_type

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]  # top, bottom, left, right


# Geometry, shared with the pools


def require_window(kernel: Pair, stride: Pair, padding: Padding, dilation: Pair) -> None:
    """Raise ValueError unless these describe a sliding window."""
    for name, pair in (("kernel", kernel), ("stride", stride), ("dilation", dilation)):
        require(len(pair) == 2 and min(pair) > 0, f"the {name} must be two positive sizes, not {pair}")
    require(len(padding) == 4 and min(padding) >= 0, f"the padding must be four sizes of at least 0, not {padding}")


def window_output(size: Pair, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair) -> Pair:
    """Output height and width; ValueError if the window is larger than the padded input."""
    require_window(kernel, stride, padding, dilation)
    top, bottom, left, right = padding
    height = _output_size(size[0] + top + bottom, kernel[0], stride[0], dilation[0])
    width = _output_size(size[1] + left + right, kernel[1], stride[1], dilation[1])
    return height, width


def _output_size(padded: int, kernel: int, stride: int, dilation: int) -> int:
    extent = (kernel - 1) * dilation + 1
    require(extent <= padded, f"a window of {extent} does not fit a padded input of {padded}")
    return (padded - extent) // stride + 1


def padded(x: Array, padding: Padding, value: float = 0.0) -> Array:
    """The NHWC tensor with constant padding."""
    top, bottom, left, right = padding
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=value)


def taps(x: Array, kernel: Pair, stride: Pair, dilation: Pair, output: Pair) -> Iterator[tuple[int, int, Array]]:
    """For each tap (i, j), in row-major order, the view [N, Ho, Wo, C] of the padded input that it sees."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            y, x_ = i * dilation[0], j * dilation[1]
            rows = slice(y, y + (output[0] - 1) * stride[0] + 1, stride[0])
            columns = slice(x_, x_ + (output[1] - 1) * stride[1] + 1, stride[1])
            yield i, j, x[:, rows, columns, :]


def cropped(x: Array, padding: Padding) -> Array:
    """The inverse of ``padded``."""
    top, bottom, left, right = padding
    return np.ascontiguousarray(x[:, top : x.shape[1] - bottom, left : x.shape[2] - right, :])


def padded_zeros(shape: tuple[int, ...], padding: Padding, dtype: Any) -> Array:
    """Zeros of an NHWC shape grown by the padding."""
    batch, height, width, channels = shape
    top, bottom, left, right = padding
    return np.zeros((batch, height + top + bottom, width + left + right, channels), dtype)


# conv2d


def _conv2d_rule(
    x: TensorType,
    w: TensorType,
    bias: TensorType | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    activation: str = "none",
    low: float = 0.0,
    high: float = 0.0,
) -> TensorType:
    require_dtype("x", x, "f32")
    require_weight("w", w)
    require(len(x.shape) == 4 and len(w.shape) == 4, f"x and w must have four axes, not {x} and {w}")
    batch, *size, channels = x.shape
    filters, *kernel, _ = w.shape
    require_groups(channels, filters, groups)
    expected = TensorType((filters, *kernel, channels // groups), w.dtype)
    require_type("w", w, expected)
    if bias is not None:
        require_type("the bias", bias, f32(filters))
    require_epilogue(activation, low, high)
    height, width = window_output((size[0], size[1]), (kernel[0], kernel[1]), stride, padding, dilation)
    return f32(batch, height, width, filters)


def require_groups(channels: int, filters: int, groups: int) -> None:
    """Raise ValueError unless a convolution between that many channels can have that many groups."""
    divides = groups > 0 and channels % groups == 0 and filters % groups == 0
    require(divides, f"{groups} groups do not divide {channels} input and {filters} output channels")


def _grouped(x: Array, groups: int) -> Array:
    """[..., C] as [groups, pixels, C / groups]: the batch of matrices of a grouped product."""
    return np.moveaxis(x.reshape(-1, groups, x.shape[-1] // groups), 1, 0)


def _ungrouped(x: Array, shape: tuple[int, ...]) -> Array:
    return np.moveaxis(x, 0, 1).reshape(shape)


def _tap_weight(w: Array, i: int, j: int, groups: int) -> Array:
    """The weight of one tap as [groups, O / groups, I]."""
    return w[:, i, j, :].reshape(groups, w.shape[0] // groups, w.shape[3])


def _conv2d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    activation: str = "none",
    low: float = 0.0,
    high: float = 0.0,
) -> Array:
    kernel: Pair = (w.shape[1], w.shape[2])
    output = window_output((x.shape[1], x.shape[2]), kernel, stride, padding, dilation)
    shape = (x.shape[0], *output, w.shape[0])
    y = np.zeros(shape, x.dtype)
    for i, j, seen in taps(padded(x, padding), kernel, stride, dilation, output):
        product = _grouped(seen, groups) @ _tap_weight(w, i, j, groups).swapaxes(1, 2)
        y += _ungrouped(product, shape)
    if bias is not None:
        y += bias
    return apply_epilogue(y, activation, low, high)


def _conv2d_vjp(builder: Builder, node: Node, cotangents: Cotangents, need: Need) -> Gradients:
    if len(node.inputs) > 2 or node.attrs["activation"] != "none":
        raise InternalError(f"{node.origin}: a fused conv2d has no gradient: fuse after differentiation")
    ct = cotangent_of(node, cotangents)
    x, w = node.inputs
    window = {name: node.attrs[name] for name in ("stride", "padding", "dilation", "groups")}
    left: Value | None = None
    right: Value | None = None
    if 0 in need:
        left = builder("conv2d_grad_input", ct, w, size=x.type.shape[1:3], **window)
    if 1 in need:
        right = builder("conv2d_grad_weight", x, ct, kernel=w.type.shape[1:3], **window)
    return left, right


# Sizes, kernels and windows that between them cover each attribute: kernel (kh, kw, groups), and in order
# x [N,H,W,C], w [O,kh,kw,C/groups], attributes.
_CASES: tuple[tuple[TensorType, TensorType, Mapping[str, Any]], ...] = (
    (f32(2, 5, 6, 3), f32(4, 3, 3, 3), {}),
    (f32(2, 5, 6, 3), f32(4, 1, 1, 3), {}),
    (f32(1, 6, 6, 3), f32(4, 1, 1, 3), {"stride": (2, 2)}),
    (f32(2, 7, 6, 3), f32(4, 3, 3, 3), {"stride": (2, 2), "padding": (1, 1, 1, 1)}),
    (f32(1, 8, 8, 3), f32(2, 3, 3, 3), {"stride": (2, 2), "padding": (0, 1, 0, 1)}),
    (f32(1, 7, 9, 2), f32(3, 3, 2, 2), {"dilation": (2, 3), "padding": (2, 1, 0, 3)}),
    (f32(2, 5, 5, 4), f32(6, 3, 3, 2), {"groups": 2, "padding": (1, 1, 1, 1)}),
    (f32(2, 6, 6, 5), f32(5, 3, 3, 1), {"groups": 5, "padding": (1, 1, 1, 1)}),
    (f32(1, 7, 7, 18), f32(18, 5, 5, 1), {"groups": 18, "stride": (2, 2), "padding": (2, 2, 2, 2)}),
    (f32(1, 5, 5, 3), f32(6, 3, 3, 1), {"groups": 3, "stride": (2, 1), "padding": (1, 0, 1, 0)}),
    (f32(2, 4, 4, 3), f32(5, 4, 4, 3), {"stride": (4, 4)}),
)


def _torch_conv2d(attrs: Mapping[str, Any]) -> Any:
    top, bottom, left, right = attrs.get("padding", (0, 0, 0, 0))

    def run(torch: Any, x: Any, w: Any, bias: Any = None) -> Any:
        x = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
        window = {name: attrs[name] for name in ("stride", "dilation", "groups") if name in attrs}
        y = torch.nn.functional.conv2d(x, w.permute(0, 3, 1, 2), bias, **window).permute(0, 2, 3, 1)
        return torch_epilogue(torch, y, attrs.get("activation", "none"), attrs.get("low", 0.0), attrs.get("high", 0.0))

    return run


_FUSED: tuple[Mapping[str, Any], ...] = (
    {"activation": "none"},
    {"activation": "clip", "low": -0.5, "high": 6.0},
    {"activation": "silu"},
    {"activation": "hardswish"},
    {"activation": "gelu"},
)

define(
    "conv2d",
    type_rule=_conv2d_rule,
    reference=_conv2d,
    vjp=_conv2d_vjp,
    samples=[
        *(Sample((x, w), attrs, _torch_conv2d(attrs), (0, 1)) for x, w, attrs in _CASES),
        *(
            Sample((x, w, f32(w.shape[0])), {**attrs, **fused}, _torch_conv2d({**attrs, **fused}))
            for (x, w, attrs), fused in zip(_CASES[3:8], _FUSED, strict=True)
        ),
    ],
    saves="x if w needs a gradient, w if x does",
    weight=1,
)


# Gradients


def _conv2d_grad_input_rule(
    ct: TensorType,
    w: TensorType,
    *,
    size: Pair,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> TensorType:
    require(len(ct.shape) == 4 and len(w.shape) == 4, f"ct and w must have four axes, not {ct} and {w}")
    x = f32(ct.shape[0], *size, w.shape[3] * groups)
    forward = _conv2d_rule(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    require_type("ct", ct, forward)
    return x


def _conv2d_grad_input(
    ct: Array,
    w: Array,
    *,
    size: Pair,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Array:
    shape = (ct.shape[0], *size, w.shape[3] * groups)
    gradient = padded_zeros(shape, padding, ct.dtype)
    cts = _grouped(ct, groups)
    for i, j, seen in taps(gradient, (w.shape[1], w.shape[2]), stride, dilation, (ct.shape[1], ct.shape[2])):
        seen += _ungrouped(cts @ _tap_weight(w, i, j, groups), seen.shape)
    return cropped(gradient, padding)


def _masked_rule(
    ct: TensorType,
    w: TensorType,
    gate: TensorType,
    *,
    size: Pair,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    low: float = 0.0,
    high: float = 0.0,
    inclusive: bool = False,
) -> TensorType:
    x = _conv2d_grad_input_rule(ct, w, size=size, stride=stride, padding=padding, dilation=dilation, groups=groups)
    require(low <= high, f"the lower bound {low} is above the upper bound {high}")
    require_type("the gate", gate, mask_type(x.elements) if gate.dtype == "u8" else x)
    return x


def _masked(
    ct: Array, w: Array, gate: Array, *, low: float = 0.0, high: float = 0.0, inclusive: bool = False, **window: Any
) -> Array:
    gradient = _conv2d_grad_input(ct, w, **window)
    passes = unpack_bits(gate, gradient.shape) if gate.dtype == np.uint8 else in_range(gate, low, high, inclusive)
    return np.where(passes, gradient, np.zeros_like(gradient))


def _conv2d_grad_weight_rule(
    x: TensorType,
    ct: TensorType,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> TensorType:
    require(len(x.shape) == 4 and len(ct.shape) == 4, f"x and ct must have four axes, not {x} and {ct}")
    require_groups(x.shape[3], ct.shape[3], groups)
    w = f32(ct.shape[3], *kernel, x.shape[3] // groups)
    require_type("ct", ct, _conv2d_rule(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups))
    return w


def _conv2d_grad_weight(
    x: Array,
    ct: Array,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Array:
    gradient = np.empty((ct.shape[3], *kernel, x.shape[3] // groups), ct.dtype)
    cts = _grouped(ct, groups).swapaxes(1, 2)
    for i, j, seen in taps(padded(x, padding), kernel, stride, dilation, (ct.shape[1], ct.shape[2])):
        gradient[:, i, j, :] = (cts @ _grouped(seen, groups)).reshape(ct.shape[3], -1)
    return gradient


def _grad_samples(input_gradient: bool) -> list[Sample]:
    samples = []
    for x, w, attrs in _CASES:
        y = _conv2d_rule(x, w, **attrs)
        if input_gradient:
            given, operands = {"size": x.shape[1:3]}, (y, w)
        else:
            given, operands = {"kernel": w.shape[1:3]}, (x, y)
        torch = _torch_grad(_torch_conv2d(attrs), x if input_gradient else w, input_gradient)
        samples.append(Sample(operands, {**given, **attrs}, torch))
    return samples


def _torch_grad(forward: Any, missing: TensorType, input_gradient: bool) -> Any:
    """By autograd. Convolution is bilinear: the operand whose gradient is asked does not matter, so it is zero."""

    def run(torch: Any, first: Any, second: Any) -> Any:
        leaf = torch.zeros(missing.shape, dtype=first.dtype, requires_grad=True)
        ct, x, w = (first, leaf, second) if input_gradient else (second, first, leaf)
        return torch.autograd.grad(forward(torch, x, w), leaf, ct)[0]

    return run


define(
    "conv2d_grad_input",
    type_rule=_conv2d_grad_input_rule,
    reference=_conv2d_grad_input,
    samples=_grad_samples(input_gradient=True),
    weight=1,
)


def _torch_masked(sample: Sample, *, low: float, high: float, inclusive: bool) -> Any:
    def run(torch: Any, ct: Any, w: Any, gate: Any) -> Any:
        assert sample.torch is not None
        inside = (gate >= low) & (gate <= high) if inclusive else (gate > low) & (gate < high)
        return torch.where(inside, sample.torch(torch, ct, w), 0.0)

    return run


def _masked_samples() -> Iterator[Sample]:
    """The gate as x, and as bits."""
    bits = np.random.default_rng(0)
    for count, sample in enumerate(_grad_samples(input_gradient=True)):
        x = _conv2d_grad_input_rule(*sample.inputs, **sample.attrs)
        gate = bits.integers(0, 256, mask_type(x.elements).shape).astype(np.uint8)
        bounds: dict[str, Any] = {"low": -1.0, "high": 1.0, "inclusive": count % 2 == 0}
        yield Sample((*sample.inputs, x), {**sample.attrs, **bounds}, _torch_masked(sample, **bounds))
        yield Sample((*sample.inputs, gate), sample.attrs)
    wide = bits.integers(0, 256, mask_type(6 * 6 * 40).shape).astype(np.uint8)  # rows of whole vectors
    yield Sample((f32(1, 6, 6, 5), f32(5, 1, 1, 40), wide), {"size": (6, 6)})


# The gradient with respect to x, where x is what an activation made: zero where x was not inside its range, which the
# gate tells, x itself or a bit for each of its elements.
define(
    "conv2d_grad_input_masked",
    type_rule=_masked_rule,
    reference=_masked,
    samples=[*_masked_samples()],
    weight=1,
)
define(
    "conv2d_grad_weight",
    type_rule=_conv2d_grad_weight_rule,
    reference=_conv2d_grad_weight,
    samples=_grad_samples(input_gradient=False),
)

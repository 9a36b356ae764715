"""Convolutions and pools. Each becomes: to channels-last, the operator, back; the layout pass removes what cancels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pockc.frontend.aten import Call, handles, pair, refuse, refuse_unless, shape_of
from pockc.ir import Value

Numbers = int | Sequence[int]


@handles("conv2d.default", "conv2d.padding")
def _conv2d(
    call: Call,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Value:
    kernel, dilations = pair(shape_of(weight)[2:]), pair(dilation)
    batched = call.reshape(x, (1, *shape_of(x))) if len(shape_of(x)) == 3 else x
    y = call.builder(
        "conv2d",
        call.transpose(batched, (0, 2, 3, 1)),
        call.transpose(weight, (0, 2, 3, 1)),
        stride=pair(stride),
        padding=_four_sides(padding, kernel, dilations),
        dilation=dilations,
        groups=groups,
    )
    if bias is not None:
        y = call.builder("add", y, bias)
    return call.reshape(call.transpose(y, (0, 3, 1, 2)), call.result.shape)


def _four_sides(padding: Numbers | str, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, ...]:
    """(top, bottom, left, right). "same" puts the odd element behind, as PyTorch does."""
    if padding == "valid":
        return 0, 0, 0, 0
    if isinstance(padding, str):
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return height // 2, height - height // 2, width // 2, width - width // 2
    vertical, horizontal = pair(padding)
    return vertical, vertical, horizontal, horizontal


@handles("conv1d.default", "conv1d.padding")
def _conv1d(
    call: Call,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Value:
    """A convolution of images that are one pixel high."""
    outputs, inputs, kernel = shape_of(weight)
    batch, length = shape_of(x)[0] if len(shape_of(x)) == 3 else 1, shape_of(x)[-1]
    channels = shape_of(x)[-2]
    rows = call.transpose(call.reshape(x, (batch, channels, length)), (0, 2, 1))
    kernels = call.transpose(weight, (0, 2, 1))
    dilations = (1, pair(dilation)[0])
    sides = padding if isinstance(padding, str) else (0, pair(padding)[0])
    y = call.builder(
        "conv2d",
        call.reshape(rows, (batch, 1, length, channels)),
        call.reshape(kernels, (outputs, 1, kernel, inputs)),
        stride=(1, pair(stride)[0]),
        padding=_four_sides(sides, (1, kernel), dilations),
        dilation=dilations,
        groups=groups,
    )
    if bias is not None:
        y = call.builder("add", y, bias)
    y = call.reshape(y, (batch, shape_of(y)[2], outputs))
    return call.reshape(call.transpose(y, (0, 2, 1)), call.result.shape)


@handles("convolution.default")
def _convolution(
    call: Call, x: Value, weight: Value, bias: Value | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    rank = len(shape_of(weight)) - 2
    refuse_unless(
        not transposed,
        "a transposed convolution",
        supported="conv1d and conv2d",
        instead="Use nearest-neighbour upsampling followed by a convolution.",
    )
    refuse_unless(rank <= 2, f"a convolution over {rank} axes", supported="conv1d and conv2d")
    convolve = _conv2d if rank == 2 else _conv1d
    return convolve(call, x, weight, bias, stride, padding, dilation, groups)


def _pool(call: Call, op: str, x: Value, **attrs: Any) -> Value:
    batched = call.reshape(x, (1, *shape_of(x))) if len(shape_of(x)) == 3 else x
    y = call.builder.multi(op, call.transpose(batched, (0, 2, 3, 1)), **attrs)[0]
    return call.reshape(call.transpose(y, (0, 3, 1, 2)), call.result.shape)


def _overhang(call: Call, x: Value, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int] = (1, 1)) -> tuple[int, int]:  # fmt: skip
    """Elements below and to the right of the padded image that the last windows reach in ceil mode."""
    reach = []
    for axis in range(2):
        windows = call.result.shape[-2 + axis]
        needed = (windows - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        reach.append(max(0, needed - shape_of(x)[-2 + axis] - 2 * padding[axis]))
    return reach[0], reach[1]


@handles("max_pool2d_with_indices.default", "max_pool2d.default")
def _max_pool2d(
    call: Call,
    x: Value,
    kernel_size: Numbers,
    stride: Numbers = (),
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
) -> Value | tuple[Value | None, ...]:
    kernel, (vertical, horizontal) = pair(kernel_size), pair(padding)
    strides = pair(stride or kernel)
    refuse_unless(
        math.prod(kernel) <= 255, f"max pooling over {kernel[0]}x{kernel[1]}", supported="windows up to 255 elements"
    )
    below, right = _overhang(call, x, kernel, strides, (vertical, horizontal), pair(dilation))
    y = _pool(
        call,
        "max_pool2d",
        x,
        kernel=kernel,
        stride=strides,
        padding=(vertical, vertical + below, horizontal, horizontal + right),
        dilation=pair(dilation),
    )
    # The indices of PyTorch are positions in the image, ours in the window: they are not offered.
    return (y, None) if len(call.results) > 1 else y


@handles("avg_pool2d.default")
def _avg_pool2d(
    call: Call,
    x: Value,
    kernel_size: Numbers,
    stride: Numbers = (),
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    kernel, (vertical, horizontal) = pair(kernel_size), pair(padding)
    strides = pair(stride or kernel)
    below, right = _overhang(call, x, kernel, strides, (vertical, horizontal))
    if (below or right) and count_include_pad:
        # PyTorch counts the padding, but not what windows overhang beyond it: only without padding is that our op.
        if vertical or horizontal or divisor_override:
            raise refuse(
                "average pooling with padding, ceil_mode and count_include_pad", instead="Set ceil_mode=False."
            )
        count_include_pad = False
    refuse_unless(not divisor_override or count_include_pad, "this use of divisor_override")
    y = _pool(
        call,
        "avg_pool2d",
        x,
        kernel=kernel,
        stride=strides,
        padding=(vertical, vertical + below, horizontal, horizontal + right),
        count_include_pad=count_include_pad,
    )
    if divisor_override:
        y = call.builder("mul", y, call.builder.constant(math.prod(kernel) / divisor_override))
    return y


def _even_windows(call: Call, x: Value) -> tuple[int, int]:
    sizes, outputs = shape_of(x)[-2:], call.result.shape[-2:]
    refuse_unless(
        all(size % output == 0 for size, output in zip(sizes, outputs, strict=True)),
        f"adaptive pooling of {sizes[0]}x{sizes[1]} to {outputs[0]}x{outputs[1]}",
        supported="output sizes that divide the input size",
        instead="Choose another image size or pooling size.",
    )
    return sizes[0] // outputs[0], sizes[1] // outputs[1]


@handles("adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default")
def _adaptive_avg_pool2d(call: Call, x: Value, output_size: Sequence[int]) -> Value:
    window = _even_windows(call, x)
    if window == (1, 1):
        return x
    if window != tuple(shape_of(x)[-2:]):
        return _pool(call, "avg_pool2d", x, kernel=window, stride=window, padding=(0, 0, 0, 0), count_include_pad=True)
    batched = call.reshape(x, (1, *shape_of(x))) if len(shape_of(x)) == 3 else x
    mean = call.builder("reduce_mean", call.transpose(batched, (0, 2, 3, 1)), axes=(1, 2), keepdims=True)
    return call.reshape(call.transpose(mean, (0, 3, 1, 2)), call.result.shape)


@handles("adaptive_max_pool2d.default")
def _adaptive_max_pool2d(call: Call, x: Value, output_size: Sequence[int]) -> tuple[Value | None, ...]:
    window = _even_windows(call, x)
    if math.prod(window) <= 255:
        y = _pool(call, "max_pool2d", x, kernel=window, stride=window, padding=(0, 0, 0, 0), dilation=(1, 1))
        return y, None
    refuse_unless(window == tuple(shape_of(x)[-2:]), f"adaptive max pooling over windows of {window[0]}x{window[1]}")
    rank = len(shape_of(x))
    return call.builder("reduce_max", x, axes=(rank - 2, rank - 1), keepdims=True), None


@handles("adaptive_avg_pool1d.default")
def _adaptive_avg_pool1d(call: Call, x: Value, output_size: Sequence[int]) -> Value:
    length, outputs = shape_of(x)[-1], call.result.shape[-1]
    refuse_unless(
        length % outputs == 0,
        f"adaptive pooling of {length} to {outputs}",
        supported="output sizes that divide the input size",
    )
    split = call.reshape(x, (*shape_of(x)[:-1], outputs, length // outputs))
    return call.builder("reduce_mean", split, axes=(len(shape_of(x)),), keepdims=False)


@handles("upsample_nearest2d.vec", "upsample_nearest2d.default")
def _upsample_nearest2d(call: Call, x: Value, *_: object, **__: object) -> Value:
    """Every pixel as a block of equal ones."""
    batch, channels, height, width = shape_of(x)
    rows, columns = call.result.shape[2:]
    refuse_unless(
        rows % height == 0 and columns % width == 0, "upsampling by a fraction", supported="upsampling by whole factors"
    )
    blocks = (batch, channels, height, rows // height, width, columns // width)
    wide = call.expand(call.reshape(x, (batch, channels, height, 1, width, 1)), blocks)
    return call.reshape(wide, call.result.shape)

"""Pooling. Maxima keep ONNX's flat positions for their gradient; the IR's positions in the window on request."""

from __future__ import annotations

from math import prod

import numpy as np

from pockc.ir import Array, Node, Value
from pockc.ops.conv import Pair, padded, taps, window_output
from pockc.targets.onnxruntime.conv import Window, transposed_convolution
from pockc.targets.onnxruntime.elementwise import ELEMENT_TYPES
from pockc.targets.onnxruntime.emitter import CHANNELS_FIRST, Emitter, Lowering, in_order


def _window(node: Node, channels: int) -> Window:
    attrs = node.attrs
    return Window(attrs["kernel"], attrs["stride"], attrs["padding"], attrs.get("dilation", (1, 1)), channels)


def _max_pool2d(e: Emitter, node: Node) -> None:
    (x,), (y, positions) = node.inputs, node.outputs
    window = _window(node, 1)
    pooled, flat = e.multi(
        "MaxPool", 2, e.read(x, CHANNELS_FIRST),
        kernel_shape=window.kernel, strides=window.stride, pads=window.pads, dilations=window.dilation,
    )  # fmt: skip
    e.write(y, pooled, CHANNELS_FIRST)
    e.notes["flat positions", positions] = flat
    e.later[positions] = lambda: _in_window(e, flat, x, y, window)


def _corners(shape: tuple[int, ...], window: Window) -> tuple[Array, Array]:
    """Row and column in the image of the first tap of each window: negative in the padding; shaped to broadcast."""
    top, _, left, _ = window.padding
    rows = np.arange(shape[1], dtype=np.int64) * window.stride[0] - top
    columns = np.arange(shape[2], dtype=np.int64) * window.stride[1] - left
    return rows.reshape(1, 1, -1, 1), columns.reshape(1, 1, 1, -1)


def _planes(x_shape: tuple[int, ...]) -> Array:
    """The flat position of the first element of each image and channel."""
    batch, height, width, channels = x_shape
    planes = np.arange(batch * channels, dtype=np.int64).reshape(batch, channels, 1, 1)
    return np.asarray(planes * (height * width))


# ONNX: a position in the whole [N,C,H,W]. The IR: row-major among the taps of the window.
def _in_window(e: Emitter, flat: str, x: Value, y: Value, window: Window) -> str:
    width = x.type.shape[2]
    rows, columns = _corners(y.type.shape, window)
    local = e("Sub", flat, e.constant(_planes(x.type.shape), np.int64))
    row, column = e("Div", local, e.constant(width, np.int64)), e("Mod", local, e.constant(width, np.int64))
    tap_row = e("Div", e("Sub", row, e.constant(rows, np.int64)), e.constant(window.dilation[0], np.int64))
    tap_column = e("Div", e("Sub", column, e.constant(columns, np.int64)), e.constant(window.dilation[1], np.int64))
    position = e("Add", e("Mul", tap_row, e.constant(window.kernel[1], np.int64)), tap_column)
    order = tuple(CHANNELS_FIRST.index(axis) for axis in range(4))
    return e("Cast", e("Transpose", position, perm=order), to=ELEMENT_TYPES["u8"])


def _flat(e: Emitter, positions: Value, x_shape: tuple[int, ...], window: Window) -> str:
    tap = e("Cast", e.read(positions, CHANNELS_FIRST), to=ELEMENT_TYPES["i64"])
    rows, columns = _corners(positions.type.shape, window)
    width = e.constant(window.kernel[1], np.int64)
    down = e("Mul", e("Div", tap, width), e.constant(window.dilation[0] * x_shape[2], np.int64))
    right = e("Mul", e("Mod", tap, width), e.constant(window.dilation[1], np.int64))
    corners = e.constant(_planes(x_shape) + rows * x_shape[2] + columns, np.int64)
    return e("Add", e("Add", down, right), corners)


def _max_pool2d_grad(e: Emitter, node: Node) -> None:
    (ct, positions), (output,) = node.inputs, node.outputs
    shape, window = output.type.shape, _window(node, 1)
    flat = e.notes.get(("flat positions", positions)) or _flat(e, positions, shape, window)
    zeros = e("Expand", e.constant(0.0), e.ints(prod(shape)))
    row = (prod(ct.type.shape),)
    sums = e(
        "ScatterElements", zeros, e.reshaped(flat, row), e.reshaped(e.read(ct, CHANNELS_FIRST), row),
        axis=0, reduction="add",
    )  # fmt: skip
    e.write(output, e.reshaped(sums, in_order(shape, CHANNELS_FIRST)), CHANNELS_FIRST)


def _avg_pool2d(e: Emitter, node: Node) -> None:
    x = node.inputs[0]
    window = _window(node, 1)
    found = e(
        "AveragePool", e.read(x, CHANNELS_FIRST), kernel_shape=window.kernel, strides=window.stride, pads=window.pads,
        count_include_pad=int(node.attrs["count_include_pad"]),
    )  # fmt: skip
    e.write(node.outputs[0], found, CHANNELS_FIRST)


def _divisor(size: Pair, window: Window, count_include_pad: bool) -> Array:
    """How many elements each window averages, to broadcast against [N,C,H,W]."""
    if count_include_pad:
        return np.asarray(prod(window.kernel), np.float32)
    output = window_output(size, window.kernel, window.stride, window.padding, (1, 1))
    inside = padded(np.ones((1, *size, 1), np.float32), window.padding)
    counts = sum(tap for _, _, tap in taps(inside, window.kernel, window.stride, (1, 1), output))
    return np.asarray(counts).transpose(CHANNELS_FIRST)


def _avg_pool2d_grad(e: Emitter, node: Node) -> None:
    (ct,), (output,), size = node.inputs, node.outputs, node.attrs["size"]
    channels = ct.type.shape[3]
    window = _window(node, channels)
    divisor = _divisor(size, window, node.attrs["count_include_pad"])
    share = e("Div", e.read(ct, CHANNELS_FIRST), e.constant(divisor))
    ones = e.constant(np.ones((channels, 1, *window.kernel), np.float32))
    found = transposed_convolution(e, share, ones, ct.type.shape[1:3], size, window)
    e.write(output, found, CHANNELS_FIRST)


OPS: dict[str, Lowering] = {
    "max_pool2d": _max_pool2d,
    "max_pool2d_grad": _max_pool2d_grad,
    "avg_pool2d": _avg_pool2d,
    "avg_pool2d_grad": _avg_pool2d_grad,
}

"""Convolution and its gradients, channels first.

Which composition is fastest was measured: a stride of one turns the input's gradient into another convolution, with the
kernel flipped; weights' gradients are matrix products, one for each tap of the kernel, which is several times faster
than the textbook's convolution with strides and dilations swapped.
"""

from __future__ import annotations

from typing import NamedTuple

from pockc.ir import Node, TensorType, Value
from pockc.ops.conv import Padding, Pair
from pockc.targets.onnxruntime.elementwise import epilogue
from pockc.targets.onnxruntime.emitter import CHANNELS_FIRST, Emitter, Lowering
from pockc.targets.onnxruntime.shape import sliced


class Window(NamedTuple):
    """A sliding window as the IR's attributes have it."""

    kernel: Pair
    stride: Pair
    padding: Padding  # top, bottom, left, right
    dilation: Pair
    groups: int

    @property
    def pads(self) -> list[int]:
        """As ONNX has them: top, left, bottom, right."""
        top, bottom, left, right = self.padding
        return [top, left, bottom, right]

    @property
    def extent(self) -> Pair:
        """Rows and columns between the first and the last tap."""
        return (self.kernel[0] - 1) * self.dilation[0], (self.kernel[1] - 1) * self.dilation[1]

    @property
    def is_point(self) -> bool:
        """Whether each output sees the one input at its place."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding)


def window_of(node: Node, kernel: Pair) -> Window:
    """The window of a convolution or one of its gradients."""
    attrs = node.attrs
    return Window(kernel, attrs["stride"], attrs["padding"], attrs["dilation"], attrs["groups"])


def _kernel(weight: TensorType) -> Pair:
    return weight.shape[1], weight.shape[2]


def _conv2d(e: Emitter, node: Node) -> None:
    x, w, *bias = node.inputs
    window = window_of(node, _kernel(w.type))
    operands = [e.read(x, CHANNELS_FIRST), e.read(w, CHANNELS_FIRST), *map(e.read, bias)]
    y = convolved(e, operands, window)
    y = epilogue(e, y, *(node.attrs[name] for name in ("activation", "low", "high")))
    e.write(node.outputs[0], y, CHANNELS_FIRST)


def convolved(e: Emitter, operands: list[str], window: Window) -> str:
    """The Conv node of this window."""
    return e(
        "Conv", *operands, kernel_shape=window.kernel, strides=window.stride, pads=window.pads,
        dilations=window.dilation, group=window.groups,
    )  # fmt: skip


# --- Gradient of the input ----------------------------------------------------------------------------------------


def _conv2d_grad_input(e: Emitter, node: Node) -> None:
    ct, w = node.inputs
    window, size = window_of(node, _kernel(w.type)), node.attrs["size"]
    flipped = _flipped_window(window)
    if window.stride == (1, 1) and flipped is not None:
        weight = e.note(("flipped", w, window.groups), lambda: _flipped(e, w, window.groups))
        found = convolved(e, [e.read(ct, CHANNELS_FIRST), weight], flipped)
    else:
        found = transposed_convolution(
            e, e.read(ct, CHANNELS_FIRST), e.read(w, CHANNELS_FIRST), ct.type.shape[1:3], size, window
        )
    e.write(node.outputs[0], found, CHANNELS_FIRST)


# With stride 1, dx[i] = sum_k ct[i + p - k d] w[k]: a correlation of ct with the flipped kernel, padded by (K-1) d - p.
def _flipped_window(window: Window) -> Window | None:
    """The window of that correlation; None where its padding would be negative."""
    top, bottom, left, right = window.padding
    rows, columns = window.extent
    padding = (rows - top, rows - bottom, columns - left, columns - right)
    return window._replace(padding=padding) if min(padding) >= 0 else None


def _flipped(e: Emitter, w: Value, groups: int) -> str:
    """The kernel of the gradient: taps in reverse, and within each group inputs and outputs exchanged; OIHW."""
    filters, height, width, channels = w.type.shape
    tensor = e.read(w, CHANNELS_FIRST)
    grouped = e.reshaped(tensor, (groups, filters // groups, channels, height, width))
    exchanged = e.transposed(grouped, (groups, filters // groups, channels, height, width), (0, 2, 1, 3, 4))
    kernel = e.reshaped(exchanged, (groups * channels, filters // groups, height, width))
    if (height, width) == (1, 1):
        return kernel
    if kernel in e.constants:
        return e.constant(e.constants[kernel][:, :, ::-1, ::-1], name=f"{w.name}.flipped")
    ends = e.ints(-1, -1), e.ints(-height - 1, -width - 1)
    return e("Slice", kernel, *ends, e.ints(2, 3), e.ints(-1, -1))


def transposed_convolution(e: Emitter, ct: str, weight: str, found: tuple[int, ...], size: Pair, window: Window) -> str:
    """The gradient of the input for any window: ``found`` is the size of ct, ``size`` that of the result."""
    top, bottom, left, right = window.padding
    covered = [
        (found[axis] - 1) * window.stride[axis] + window.extent[axis] + 1 - sides
        for axis, sides in enumerate((top + bottom, left + right))
    ]
    return e(
        "ConvTranspose", ct, weight, kernel_shape=window.kernel, strides=window.stride, pads=window.pads,
        dilations=window.dilation, group=window.groups,
        output_padding=[size[0] - covered[0], size[1] - covered[1]],
    )  # fmt: skip


# --- Gradient of the weight ---------------------------------------------------------------------------------------


def _conv2d_grad_weight(e: Emitter, node: Node) -> None:
    x, ct = node.inputs
    window = window_of(node, node.attrs["kernel"])
    if window.groups == 1:
        gradient = _dense(e, x, ct, window)
    elif window.groups == x.type.shape[3] == ct.type.shape[3]:
        gradient = _depthwise(e, x, ct, window)
    else:
        gradient = _grouped(e, x, ct, window)
    e.write(node.outputs[0], gradient, CHANNELS_FIRST)


def _channel_rows(e: Emitter, tensor: str, shape: tuple[int, ...]) -> str:
    """[N,C,H,W] as the matrix [C, N H W]."""
    batch, channels, height, width = shape
    rows = tensor if batch == 1 else e("Transpose", tensor, perm=(1, 0, 2, 3))
    return e.reshaped(rows, (channels, batch * height * width))


def _padded(e: Emitter, x: Value, window: Window) -> str:
    tensor = e.read(x, CHANNELS_FIRST)
    if not any(window.padding):
        return tensor
    top, left, bottom, right = window.pads
    return e("Pad", tensor, e.ints(0, 0, top, left, 0, 0, bottom, right))


def _tap(e: Emitter, padded: str, row: int, column: int, output: Pair, window: Window) -> str:
    """What one tap of the kernel sees, in the size of the output."""
    starts = row * window.dilation[0], column * window.dilation[1]
    stops = [start + (size - 1) * stride + 1 for start, size, stride in zip(starts, output, window.stride, strict=True)]
    return e("Slice", padded, e.ints(*starts), e.ints(*stops), e.ints(2, 3), e.ints(*window.stride))


# dw[o, (k), i] = sum over samples and positions of ct[o] x_k[i], with x_k what tap k sees: a product for each tap.
def _dense(e: Emitter, x: Value, ct: Value, window: Window) -> str:
    batch, *size, channels = x.type.shape
    height, width, filters = ct.type.shape[1:]
    cts = e.note(
        ("channel rows", ct),
        lambda: _channel_rows(e, e.read(ct, CHANNELS_FIRST), (batch, filters, height, width)),
    )
    if window.is_point:
        xs = _channel_rows(e, e.read(x, CHANNELS_FIRST), (batch, channels, size[0], size[1]))
        return e.reshaped(e("Gemm", cts, xs, transB=1), (filters, channels, 1, 1))
    padded = _padded(e, x, window)
    taps = []
    for row in range(window.kernel[0]):
        for column in range(window.kernel[1]):
            seen = _tap(e, padded, row, column, (height, width), window)
            product = e("Gemm", cts, _channel_rows(e, seen, (batch, channels, height, width)), transB=1)
            taps.append(e.reshaped(product, (filters, channels, 1)))
    return e.reshaped(e("Concat", *taps, axis=2), (filters, channels, *window.kernel))


def _depthwise(e: Emitter, x: Value, ct: Value, window: Window) -> str:
    channels, output = ct.type.shape[3], (ct.type.shape[1], ct.type.shape[2])
    padded, cts = _padded(e, x, window), e.read(ct, CHANNELS_FIRST)
    taps = []
    for row in range(window.kernel[0]):
        for column in range(window.kernel[1]):
            products = e("Mul", _tap(e, padded, row, column, output, window), cts)
            total = e("ReduceSum", products, e.ints(0, 2, 3), keepdims=0)
            taps.append(e.reshaped(total, (channels, 1)))
    return e.reshaped(e("Concat", *taps, axis=1), (channels, 1, *window.kernel))


# The textbook's form, for windows over some of the channels: samples and channels exchange their roles, strides and
# dilations theirs. Where the stride leaves rows over at the end, the result is larger than the kernel.
def _grouped(e: Emitter, x: Value, ct: Value, window: Window) -> str:
    groups, (batch, *size, channels) = window.groups, x.type.shape
    height, width = ct.type.shape[1:3]
    own = channels // groups
    grouped = e.reshaped(e.read(x, CHANNELS_FIRST), (batch, groups, own, *size))
    samples = e.reshaped(e("Transpose", grouped, perm=(2, 1, 0, 3, 4)), (own, groups * batch, *size))
    kernel = e("Transpose", e.read(ct, CHANNELS_FIRST), perm=(1, 0, 2, 3))
    swapped = window._replace(kernel=(height, width), stride=window.dilation, dilation=window.stride)
    found = convolved(e, [samples, kernel], swapped)
    for axis in (0, 1):
        found = sliced(e, found, axis + 2, 0, window.kernel[axis])
    return e("Transpose", found, perm=(1, 0, 2, 3))


OPS: dict[str, Lowering] = {
    "conv2d": _conv2d,
    "conv2d_grad_input": _conv2d_grad_input,
    "conv2d_grad_weight": _conv2d_grad_weight,
}

"""The kernels that the roofline measures, in the shapes of models of the zoo, with PyTorch's counterparts.

Operands are those of the op's kernel: images [N, H, W, C], weights [O, kernel height, kernel width, C / groups].
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pockc.ops.winograd import TILES

Array = NDArray[Any]

# Of the peak of multiply-adds, per group of kernels: geometric mean.
LEAST_SHARE = {"gemm": 0.80, "dense 3x3 forward": 0.70, "dense 3x3 input gradient": 0.70,
               "dense 3x3 weight gradient": 0.60}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A call of a kernel. ``work`` is in floating-point operations or in bytes, as the unit says.

    ``pytorch`` takes the operands and returns a function that does the same once. ``share`` maps outputs to the
    operands whose memory they take in a program.
    """

    group: str
    title: str
    op: str
    operands: Callable[[], list[Array]]
    work: float
    unit: str = "GF/s"
    attrs: Mapping[str, Any] = field(default_factory=dict)
    pytorch: Callable[..., Callable[[], object]] | None = None
    share: Mapping[int, int] = field(default_factory=dict)


def _made(*shapes: tuple[int, ...]) -> Callable[[], list[Array]]:
    def make() -> list[Array]:
        random = np.random.default_rng(0)
        return [random.standard_normal(shape, np.float32) for shape in shapes]

    return make


# --- products ---------------------------------------------------------------------------------------------------------


def _gemm(title: str, m: int, n: int, k: int, *, transposed: str = "", group: str = "gemm") -> KernelCase:
    a = (k, m) if "a" in transposed else (m, k)
    b = (n, k) if "b" in transposed else (k, n)

    def pytorch(x: Array, y: Array) -> Callable[[], object]:
        left, right = torch.from_numpy(x), torch.from_numpy(y)
        left = left.T if "a" in transposed else left
        right = right.T if "b" in transposed else right
        return lambda: torch.mm(left, right)

    attrs = {"transpose_a": "a" in transposed, "transpose_b": "b" in transposed}
    return KernelCase(group, title, "matmul", _made(a, b), 2.0 * m * n * k, attrs=attrs, pytorch=pytorch)


# --- convolutions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """A convolution with a square image and kernel, padded by half a kernel."""

    batch: int
    size: int
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def out_size(self) -> int:
        """Pixels along an axis of the result."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def work(self) -> float:
        """Floating-point operations of the forward pass and of each gradient."""
        pixels = self.batch * self.out_size**2
        return 2.0 * pixels * self.outputs * self.kernel**2 * (self.inputs // self.groups)

    @property
    def title(self) -> str:
        """Channels and size."""
        channels = str(self.inputs) if self.groups > 1 else f"{self.inputs}>{self.outputs}"
        return f"{channels} {self.size}px {self.kernel}x{self.kernel}/{self.stride} b{self.batch}"

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Image, weight, result."""
        x = (self.batch, self.size, self.size, self.inputs)
        w = (self.outputs, self.kernel, self.kernel, self.inputs // self.groups)
        return x, w, (self.batch, self.out_size, self.out_size, self.outputs)

    def attrs(self) -> dict[str, Any]:
        """Of the three ops."""
        padding = (self.kernel // 2,) * 4
        return {"stride": (self.stride,) * 2, "padding": padding, "dilation": (1, 1), "groups": self.groups}


def _channels_last(x: Array) -> Tensor:
    """A view with PyTorch's order of axes and the array's order of memory."""
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def _convolutions(kind: str, window: Window) -> Iterator[KernelCase]:
    """The forward pass and both gradients."""
    x_shape, w_shape, y_shape = window.shapes()
    half = window.kernel // 2

    def forward(x: Array, w: Array) -> Callable[[], object]:
        image, weight = _channels_last(x), _channels_last(w)
        return lambda: F.conv2d(image, weight, None, window.stride, half, 1, window.groups)

    def backward(image: Tensor, weight: Tensor, ct: Tensor, wanted: list[bool]) -> Callable[[], object]:
        sizes = ([window.stride] * 2, [half] * 2, [1, 1], False, [0, 0], window.groups)
        return lambda: torch.ops.aten.convolution_backward(ct, image, weight, None, *sizes, wanted)

    def grad_input(ct: Array, w: Array) -> Callable[[], object]:
        image = _channels_last(np.zeros(x_shape, np.float32))
        return backward(image, _channels_last(w), _channels_last(ct), [True, False, False])

    def grad_weight(x: Array, ct: Array) -> Callable[[], object]:
        weight = _channels_last(np.zeros(w_shape, np.float32))
        return backward(_channels_last(x), weight, _channels_last(ct), [False, True, False])

    attrs, work, title = window.attrs(), window.work, window.title
    size, kernel = (window.size,) * 2, (window.kernel,) * 2
    yield KernelCase(f"{kind} forward", title, "conv2d", _made(x_shape, w_shape), work, attrs=attrs, pytorch=forward)
    yield KernelCase(f"{kind} input gradient", title, "conv2d_grad_input", _made(y_shape, w_shape), work,
                     attrs={"size": size, **attrs}, pytorch=grad_input)  # fmt: skip
    yield KernelCase(f"{kind} weight gradient", title, "conv2d_grad_weight", _made(x_shape, y_shape), work,
                     attrs={"kernel": kernel, **attrs}, pytorch=grad_weight)  # fmt: skip


def _frozen(window: Window) -> Iterator[KernelCase]:
    """The ways to compute a frozen 3x3 convolution; all are credited with the operations of the direct one."""
    direct = replace(next(_convolutions("dense 3x3", window)), group="frozen 3x3")
    yield replace(direct, title=f"{window.title} direct")
    for outputs in TILES:
        yield replace(
            direct,
            title=f"{window.title} F({outputs}x{outputs},3x3)",
            op="conv2d_winograd",
            attrs={"outputs": outputs, "padding": (1,) * 4},
        )


_DENSE = (Window(1, 56, 64, 64, 3), Window(1, 28, 128, 128, 3), Window(1, 14, 256, 256, 3), Window(8, 7, 512, 512, 3))
_FROZEN = tuple(
    Window(batch, size, channels, channels, 3)
    for batch in (1, 8)
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7))
)
_STEMS = (Window(1, 224, 3, 64, 7, 2), Window(1, 224, 3, 32, 3, 2))
_POINTWISE = (Window(1, 112, 32, 16, 1), Window(1, 56, 24, 144, 1), Window(1, 56, 144, 24, 1),
              Window(8, 14, 96, 576, 1),
              Window(8, 14, 576, 96, 1), Window(8, 7, 320, 1280, 1), Window(1, 56, 256, 64, 1))  # fmt: skip
_DEPTHWISE = tuple(
    Window(batch, size, channels, channels, kernel, stride, channels)
    for batch, size, channels, kernel, stride in (
        (1, 112, 32, 3, 1), (1, 112, 96, 3, 2), (1, 56, 144, 3, 1), (1, 56, 144, 3, 2), (8, 14, 384, 3, 1),
        (8, 14, 576, 3, 2), (8, 7, 960, 3, 1), (8, 12, 240, 5, 1), (8, 12, 480, 5, 2),
    )
)  # fmt: skip


# --- attention, norms, losses, optimizers -----------------------------------------------------------------------------


def _attention(title: str, batch: int, heads: int, length: int, depth: int, *, causal: bool) -> Iterator[KernelCase]:
    shape = (batch, heads, length, depth)
    attrs = {"scale": depth**-0.5, "causal": causal}
    work = 4.0 * batch * heads * length * length * depth

    def forward(*operands: Array) -> Callable[[], object]:
        q, k, v = map(torch.from_numpy, operands)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def backward(ct: Array, *operands: Array) -> Callable[[], object]:
        leaves = [torch.from_numpy(x).requires_grad_() for x in operands[:3]]
        y = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=causal)
        cotangent = torch.from_numpy(ct)
        return lambda: torch.autograd.grad(y, leaves, cotangent, retain_graph=True)

    def operands() -> list[Array]:
        ct, q, k, v = _made(shape, shape, shape, shape)()
        scores = torch.einsum("bhid,bhjd->bhij", torch.from_numpy(q), torch.from_numpy(k)) * depth**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        out = scores.softmax(-1) @ torch.from_numpy(v)
        return [ct, q, k, v, out.numpy(), scores.logsumexp(-1).numpy()]

    yield KernelCase("attention", title, "attention", _made(shape, shape, shape), work, attrs=attrs, pytorch=forward)
    yield KernelCase("attention gradient", title, "attention_grad", operands, 2.5 * work, attrs=attrs, pytorch=backward)


def _rows(rows: int, width: int) -> Iterator[KernelCase]:
    shape, nbytes = (rows, width), 4.0 * rows * width
    gamma, attrs, title = (width,), {"epsilon": 1e-6}, f"{rows}x{width}"

    def normed(x: Array, *weights: Array) -> Callable[[], object]:
        tensors = [torch.from_numpy(array) for array in (x, *weights)]
        return lambda: F.layer_norm(tensors[0], (width,), tensors[1], tensors[2], 1e-6)

    def gradient(wanted: list[bool]) -> Callable[..., Callable[[], object]]:
        def make(ct: Array, x: Array, *weights: Array) -> Callable[[], object]:
            image, cotangent = torch.from_numpy(x), torch.from_numpy(ct)
            weight = torch.ones(width)
            _, mean, scale = torch.native_layer_norm(image, [width], weight, weight, 1e-6)
            arguments = (cotangent, image, [width], mean, scale, weight, weight, wanted)
            return lambda: torch.ops.aten.native_layer_norm_backward(*arguments)

        return make

    def memory(name: str, op: str, operands: Callable[[], list[Array]], passes: int, **rest: Any) -> KernelCase:
        return KernelCase(name, title, op, operands, passes * nbytes, "GB/s", **rest)

    yield memory("layer norm", "layer_norm", _made(shape, gamma, gamma), 2, attrs=attrs, pytorch=normed)
    yield memory("layer norm input gradient", "layer_norm_grad_input", _made(shape, shape, gamma), 3, attrs=attrs,
                 pytorch=gradient([True, False, False]))  # fmt: skip
    yield memory("layer norm gamma gradient", "layer_norm_grad_gamma", _made(shape, shape), 2, attrs=attrs,
                 pytorch=gradient([False, True, False]))  # fmt: skip
    yield memory("RMS norm", "rms_norm", _made(shape, gamma), 2, attrs=attrs,
                 pytorch=_on_tensors(lambda x, weight: F.rms_norm(x, (width,), weight, 1e-6)))  # fmt: skip
    yield memory("softmax", "softmax", _made(shape), 2, pytorch=_on_tensors(lambda x: x.softmax(1)))
    yield memory("GELU", "gelu", _made(shape), 2, pytorch=_on_tensors(F.gelu))
    yield memory("GELU gradient", "gelu_grad", _made(shape, shape), 3,
                 pytorch=_on_tensors(torch.ops.aten.gelu_backward))  # fmt: skip
    yield memory("sum of rows", "reduce_sum", _made(shape), 1, attrs={"axes": (0,)},
                 pytorch=_on_tensors(lambda x: x.sum(0)))  # fmt: skip
    yield memory("add", "add", _made(shape, shape), 3, pytorch=_on_tensors(torch.add))


def _on_tensors(function: Callable[..., object]) -> Callable[..., Callable[[], object]]:
    def make(*operands: Array) -> Callable[[], object]:
        tensors = [torch.from_numpy(x) for x in operands]
        return lambda: function(*tensors)

    return make


def _cross_entropy(rows: int, classes: int) -> KernelCase:
    def operands() -> list[Array]:
        return [*_made((rows, classes))(), np.arange(rows, dtype=np.int64) % classes]

    title = f"{rows}x{classes}"
    return KernelCase("cross entropy", title, "cross_entropy", operands, 4.0 * rows * classes, "GB/s",
                      pytorch=_on_tensors(F.cross_entropy))  # fmt: skip


def _adam(elements: int) -> KernelCase:
    shape = (elements,)

    def operands() -> list[Array]:
        p, g, m, v = _made(shape, shape, shape, shape)()
        return [p, g, m, abs(v), np.asarray(1e-3, np.float32), np.asarray(5, np.int64)]

    def pytorch(p: Array, g: Array, *_: Array) -> Callable[[], object]:
        parameter = torch.nn.Parameter(torch.from_numpy(p.copy()))
        parameter.grad = torch.from_numpy(g.copy())
        return torch.optim.Adam([parameter], fused=True).step

    return KernelCase("Adam", str(elements), "adam", operands, 7 * 4.0 * elements, "GB/s",
                      {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}, pytorch, {0: 0, 1: 2, 2: 3})  # fmt: skip


CASES: tuple[KernelCase, ...] = (
    _gemm("512", 512, 512, 512),
    _gemm("1024", 1024, 1024, 1024),
    _gemm("1024x768x768 linear", 1024, 768, 768, transposed="b", group="linear"),
    _gemm("1024x768x768 input gradient", 1024, 768, 768, group="linear"),
    _gemm("768x768x1024 weight gradient", 768, 768, 1024, transposed="a", group="linear"),
    _gemm("1024x768x3072 linear", 1024, 768, 3072, transposed="b", group="linear"),
    _gemm("1024x3072x768 linear", 1024, 3072, 768, transposed="b", group="linear"),
    _gemm("1024x768x3072 input gradient", 1024, 768, 3072, group="linear"),
    _gemm("3072x768x1024 weight gradient", 3072, 768, 1024, transposed="a", group="linear"),
    _gemm("768x3072x1024 weight gradient", 768, 3072, 1024, transposed="a", group="linear"),
    *(case for window in _DENSE for case in _convolutions("dense 3x3", window)),
    *(case for window in _FROZEN for case in _frozen(window)),
    *(case for window in _STEMS for case in _convolutions("stem", window)),
    *(case for window in _POINTWISE for case in _convolutions("pointwise", window)),
    *(case for window in _DEPTHWISE for case in _convolutions("depthwise", window)),
    *_attention("BERT b8 12x128x64", 8, 12, 128, 64, causal=False),
    *_attention("MiniLM b8 12x128x32", 8, 12, 128, 32, causal=False),
    *_attention("Llama b4 8x128x64", 4, 8, 128, 64, causal=True),
    *_rows(1024, 768),
    _cross_entropy(508, 32000),
    _adam(1 << 20),
)

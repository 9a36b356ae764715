"""Reductions and scans."""

from __future__ import annotations

from pockc.ir import Node
from pockc.targets.onnxruntime.emitter import Emitter, Lowering, Permutation


def kept_axes(order: Permutation, axes: tuple[int, ...]) -> Permutation:
    """The order of what a reduction leaves, in terms of its own axes, where the operand was in ``order``."""
    left = [axis for axis in order if axis not in axes]
    return tuple(sorted(left).index(axis) for axis in left)


def moved_axes(order: Permutation, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Where the axes of a value are in a tensor that holds it in ``order``."""
    return tuple(sorted(order.index(axis) for axis in axes))


def reduction(op: str) -> Lowering:
    """The lowering of a reduction over given axes."""

    def lower(e: Emitter, node: Node) -> None:
        (x,), axes, keepdims = node.inputs, node.attrs["axes"], node.attrs["keepdims"]
        order = e.order(x)
        found = e(op, e.read(x, order), e.ints(*moved_axes(order, axes)), keepdims=int(keepdims))
        e.write(node.outputs[0], found, order if keepdims else kept_axes(order, axes))

    return lower


def _argmax(e: Emitter, node: Node) -> None:
    e.write(node.outputs[0], e("ArgMax", e.read(node.inputs[0]), axis=node.attrs["axis"], keepdims=0))


def _sum_squares(e: Emitter, node: Node) -> None:
    x = node.inputs[0]
    tensor = e.read(x, e.order(x))
    if not x.type.shape:
        e.write(node.outputs[0], e("Mul", tensor, tensor))
        return
    # One product of a row with itself: ReduceSumSquare goes through its input without vector instructions.
    flat = e.reshaped(tensor, (1, x.type.elements))
    product = e("MatMul", flat, e.reshaped(tensor, (x.type.elements, 1)))
    e.write(node.outputs[0], e.reshaped(product, ()))


def _cumsum(e: Emitter, node: Node) -> None:
    axis = e.constant(node.attrs["axis"], "int64", "axis")
    e.write(node.outputs[0], e("CumSum", e.read(node.inputs[0]), axis))


OPS: dict[str, Lowering] = {
    "reduce_sum": reduction("ReduceSum"),
    "reduce_mean": reduction("ReduceMean"),
    "reduce_max": reduction("ReduceMax"),
    "argmax": _argmax,
    "sum_squares": _sum_squares,
    "cumsum": _cumsum,
}

"""Ops that move elements. A transpose makes no node: its result is the operand's tensor in another order of axes."""

from __future__ import annotations

import numpy as np

from pockc.ir import Array, Node, Value
from pockc.targets.onnxruntime.emitter import Emitter, Lowering, identity, in_order


def _reshape(e: Emitter, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    e.write(y, e.reshaped(e.read(x), y.type.shape))


# y = x.transpose(p). A tensor x.transpose(q) is y.transpose(t) with p[t[i]] = q[i].
def _transpose(e: Emitter, node: Node) -> None:
    x, permutation = node.inputs[0], node.attrs["permutation"]
    e.order(x)  # makes a value that is known but was not needed so far
    for order, tensor in list(e.orders[x].items()):
        e.write(node.outputs[0], tensor, tuple(permutation.index(axis) for axis in order))


def sliced(e: Emitter, tensor: str, axis: int, start: int, stop: int, step: int = 1) -> str:
    """Some elements along one axis."""
    return e("Slice", tensor, e.ints(start), e.ints(stop), e.ints(axis), e.ints(step))


def _slice(e: Emitter, node: Node) -> None:
    x = node.inputs[0]
    order = e.order(x)
    axis = order.index(node.attrs["axis"])
    found = sliced(e, e.read(x, order), axis, *(node.attrs[name] for name in ("start", "stop", "step")))
    e.write(node.outputs[0], found, order)


def _slice_grad(e: Emitter, node: Node) -> None:
    (ct,), (output,) = node.inputs, node.outputs
    axis, start, step, size = (node.attrs[name] for name in ("axis", "start", "step", "size"))
    if step != 1:
        rows = np.arange(ct.type.shape[axis], dtype=np.int64) * step + start
        _scatter(e, ct, e.constant(rows, np.int64, "rows"), axis, output)
        return
    order = e.order(ct)
    pads = [0] * (2 * len(order))
    pads[order.index(axis)] = start
    pads[len(order) + order.index(axis)] = size - start - ct.type.shape[axis]
    e.write(output, e("Pad", e.read(ct, order), e.ints(*pads)), order)


def _scatter(e: Emitter, ct: Value, rows: str, axis: int, output: Value) -> None:
    """Add what belongs to each index to zeros of the output's shape."""
    order = (axis, *(i for i in identity(ct) if i != axis))
    zeros = e("Expand", e.constant(0.0), e.ints(*in_order(output.type.shape, order)))
    indices = e.reshaped(rows, (ct.type.shape[axis], 1))
    e.write(output, e("ScatterND", zeros, indices, e.read(ct, order), reduction="add"), order)


def _insert(e: Emitter, node: Node) -> None:
    base, part = node.inputs
    axis, start = node.attrs["axis"], node.attrs["start"]
    stop, size = start + part.type.shape[axis], base.type.shape[axis]
    parts = [e.read(part)]
    if start > 0:
        parts.insert(0, sliced(e, e.read(base), axis, 0, start))
    if stop < size:
        parts.append(sliced(e, e.read(base), axis, stop, size))
    e.write(node.outputs[0], e("Concat", *parts, axis=axis))


def _concat(e: Emitter, node: Node) -> None:
    order = e.order(*node.inputs)
    parts = [e.read(value, order) for value in node.inputs]
    e.write(node.outputs[0], e("Concat", *parts, axis=order.index(node.attrs["axis"])), order)


def _expand(e: Emitter, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    same_rank = len(x.type.shape) == len(y.type.shape)
    order = e.order(x) if same_rank else identity(y)
    tensor = e.aligned(x, len(y.type.shape), order)
    e.write(y, e("Expand", tensor, e.ints(*in_order(y.type.shape, order))), order)


def _pad(e: Emitter, node: Node) -> None:
    x = node.inputs[0]
    if not x.type.shape:
        e.write(node.outputs[0], e.read(x))
        return
    order = e.order(x)
    pads = [node.attrs[side][axis] for side in ("before", "after") for axis in order]
    found = e("Pad", e.read(x, order), e.ints(*pads), e.constant(node.attrs["value"]))
    e.write(node.outputs[0], found, order)


def _take(e: Emitter, node: Node) -> None:
    x, indices = node.inputs
    order = e.order(x)
    found = e("Gather", e.read(x, order), e.read(indices), axis=order.index(node.attrs["axis"]))
    e.write(node.outputs[0], found, order)


def as_i64(e: Emitter, indices: Value) -> str:
    """Indices of 32 bits as the 64 that scattering wants; at once where they are constants."""
    tensor = e.read(indices)
    if tensor not in e.constants:
        return e("Cast", tensor, to=7)
    array: Array = e.constants[tensor]
    return e.constant(array, np.int64, tensor)


def _take_grad(e: Emitter, node: Node) -> None:
    ct, indices = node.inputs
    _scatter(e, ct, as_i64(e, indices), node.attrs["axis"], node.outputs[0])


OPS: dict[str, Lowering] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "slice_grad": _slice_grad,
    "insert": _insert,
    "concat": _concat,
    "expand": _expand,
    "pad": _pad,
    "take": _take,
    "take_grad": _take_grad,
}

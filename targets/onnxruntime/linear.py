"""Matrix products, embeddings, softmax and attention."""

from __future__ import annotations

import numpy as np

from pockc.ir import Node, Value
from pockc.targets.onnxruntime.elementwise import epilogue
from pockc.targets.onnxruntime.emitter import Emitter, Lowering, Permutation, identity


def _matmul(e: Emitter, node: Node) -> None:
    a, b, *bias = node.inputs
    transpose_a, transpose_b = node.attrs["transpose_a"], node.attrs["transpose_b"]
    if len(b.type.shape) == 2 and (len(a.type.shape) == 2 or not transpose_a):
        y = _gemm(e, node, a, b, bias)
    else:
        y = e("MatMul", _matrices(e, a, transpose_a), _matrices(e, b, transpose_b))
        y = e("Add", y, e.read(bias[0])) if bias else y
    e.write(node.outputs[0], epilogue(e, y, *(node.attrs[name] for name in ("activation", "low", "high"))))


# The rows of all matrices of `a` in one product: Gemm multiplies by a transposed matrix without making it.
def _gemm(e: Emitter, node: Node, a: Value, b: Value, bias: list[Value]) -> str:
    transpose_a, transpose_b = int(node.attrs["transpose_a"]), int(node.attrs["transpose_b"])
    inner = a.type.shape[-1]
    rows = e.read(a) if len(a.type.shape) == 2 else e.reshaped(e.read(a), (a.type.elements // inner, inner))
    y = e("Gemm", rows, e.read(b), *map(e.read, bias), transA=transpose_a, transB=transpose_b)
    return y if len(a.type.shape) == 2 else e.reshaped(y, node.outputs[0].type.shape)


def swapped(value: Value) -> Permutation:
    """The order with the last two axes exchanged."""
    *rest, row, column = identity(value)
    return (*rest, column, row)


def _matrices(e: Emitter, value: Value, transpose: bool) -> str:
    return e.read(value, swapped(value) if transpose else None)


# --- Embedding ----------------------------------------------------------------------------------------------------


def _embedding(e: Emitter, node: Node) -> None:
    weight, ids = node.inputs
    e.write(node.outputs[0], e("Gather", e.read(weight), e.read(ids), axis=0))


def _embedding_grad(e: Emitter, node: Node) -> None:
    (ct, ids, *base), (output,) = node.inputs, node.outputs
    width, padding = ct.type.shape[-1], node.attrs["padding_index"]
    rows = e.reshaped(e.read(ct), (ids.type.elements, width))
    indices = e.reshaped(e.read(ids), (ids.type.elements, 1))
    if padding >= 0:
        rows = e("Where", e("Equal", indices, e.constant(padding, np.int64)), e.constant(0.0), rows)
    start = e.read(base[0]) if base else e("Expand", e.constant(0.0), e.ints(*output.type.shape))
    e.write(output, e("ScatterND", start, indices, rows, reduction="add"))


# --- Softmax ------------------------------------------------------------------------------------------------------


def _softmax(op: str) -> Lowering:
    def lower(e: Emitter, node: Node) -> None:
        e.write(node.outputs[0], e(op, e.read(node.inputs[0]), axis=-1))

    return lower


def softmax_gradient(e: Emitter, ct: str, y: str) -> str:
    """``y (ct - sum(ct y))``, over the last axis."""
    products = e("Mul", ct, y)
    return e("Sub", products, e("Mul", y, e("ReduceSum", products, e.ints(-1), keepdims=1)))


def _softmax_grad(e: Emitter, node: Node) -> None:
    ct, y = map(e.read, node.inputs)
    e.write(node.outputs[0], softmax_gradient(e, ct, y))


def _log_softmax_grad(e: Emitter, node: Node) -> None:
    ct, y = map(e.read, node.inputs)
    total = e("ReduceSum", ct, e.ints(-1), keepdims=1)
    e.write(node.outputs[0], e("Sub", ct, e("Mul", e("Exp", y), total)))


OPS: dict[str, Lowering] = {
    "matmul": _matmul,
    "embedding": _embedding,
    "embedding_grad": _embedding_grad,
    "softmax": _softmax("Softmax"),
    "softmax_grad": _softmax_grad,
    "log_softmax": _softmax("LogSoftmax"),
    "log_softmax_grad": _log_softmax_grad,
}

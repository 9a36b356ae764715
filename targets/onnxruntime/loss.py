"""Cross entropy and its gradient, which share the logarithms of the probabilities; counting what is right."""

from __future__ import annotations

import numpy as np

from pockc.ir import Node, Value
from pockc.targets.onnxruntime.elementwise import ELEMENT_TYPES, scaled
from pockc.targets.onnxruntime.emitter import Emitter, Lowering
from pockc.targets.onnxruntime.shape import sliced


def _is_valid(e: Emitter, labels: Value, ignore_index: int) -> str:
    """Which labels count."""

    def make() -> str:
        return e("Not", e("Equal", e.read(labels), e.constant(ignore_index, np.int64)))

    return str(e.note(("valid", labels, ignore_index), make))


def _known(e: Emitter, labels: Value, ignore_index: int) -> str:
    """The labels, with 0 for those that do not count."""

    def make() -> str:
        return e("Where", _is_valid(e, labels, ignore_index), e.read(labels), e.constant(0, np.int64))

    return str(e.note(("known", labels, ignore_index), make))


def _count(e: Emitter, labels: Value, ignore_index: int) -> str:
    """How many labels count, as a float."""

    def make() -> str:
        valid = e("Cast", _is_valid(e, labels, ignore_index), to=ELEMENT_TYPES["f32"])
        return e("ReduceSum", valid, e.ints(0), keepdims=0)

    return str(e.note(("count", labels, ignore_index), make))


def _part(e: Emitter, tensor: str, logits: Value, labels: Value, first_row: int) -> str:
    """Of a vector over all labels, the elements that belong to the rows of these logits."""
    start, rows = max(0, first_row), logits.type.shape[0]
    whole = (start, rows) == (0, labels.type.shape[0])
    return tensor if whole else sliced(e, tensor, 0, start, start + rows)


def _log_p(e: Emitter, logits: Value) -> str:
    return str(e.note(("log p", logits), lambda: e("LogSoftmax", e.read(logits), axis=-1)))


def _column(e: Emitter, vector: str, logits: Value) -> str:
    return e.reshaped(vector, (logits.type.shape[0], 1))


# Derived in pockc/ops/loss.py.
def _cross_entropy(e: Emitter, node: Node) -> None:
    logits, labels = node.inputs
    ignore, smoothing, first = (node.attrs[name] for name in ("ignore_index", "label_smoothing", "first_row"))
    known = _part(e, _known(e, labels, ignore), logits, labels, first)
    valid = _part(e, _is_valid(e, labels, ignore), logits, labels, first)
    log_p = _log_p(e, logits)
    loss = e("Neg", e("GatherElements", log_p, _column(e, known, logits), axis=1))
    if smoothing:
        mean = e("ReduceMean", log_p, e.ints(1), keepdims=1)
        loss = e("Sub", scaled(e, loss, 1 - smoothing), scaled(e, mean, smoothing))
    counted = e("Where", _column(e, valid, logits), loss, e.constant(0.0))
    total = e("ReduceSum", counted, e.ints(0, 1), keepdims=0)
    e.write(node.outputs[0], e("Div", total, _count(e, labels, ignore)))


def _cross_entropy_grad(e: Emitter, node: Node) -> None:
    ct, logits, labels = node.inputs
    ignore, smoothing, first = (node.attrs[name] for name in ("ignore_index", "label_smoothing", "first_row"))
    classes = logits.type.shape[1]
    known = _part(e, _known(e, labels, ignore), logits, labels, first)
    valid = _part(e, _is_valid(e, labels, ignore), logits, labels, first)
    p = e("Exp", _log_p(e, logits))
    if smoothing:
        p = e("Sub", p, e.constant(smoothing / classes))
    share = e.constant(np.full((logits.type.shape[0], 1), smoothing - 1, np.float32))
    gradient = e("ScatterElements", p, _column(e, known, logits), share, axis=1, reduction="add")
    scale = e("Div", e.read(ct), e("Max", _count(e, labels, ignore), e.constant(1.0)))
    factors = e("Where", _column(e, valid, logits), scale, e.constant(0.0))
    e.write(node.outputs[0], e("Mul", gradient, factors))


def _count_correct(e: Emitter, node: Node) -> None:
    (logits, labels), (correct, counted) = node.inputs, node.outputs
    shape = (node.attrs["samples"], labels.type.elements // node.attrs["samples"])
    valid = _is_valid(e, labels, node.attrs["ignore_index"])
    best = e("ArgMax", e.read(logits), axis=1, keepdims=0)
    hits = e("And", e("Equal", best, e.read(labels)), valid)
    for output, flags in ((correct, hits), (counted, valid)):
        numbers = e.reshaped(e("Cast", flags, to=ELEMENT_TYPES["i64"]), shape)
        e.write(output, e("ReduceSum", numbers, e.ints(1), keepdims=0))


OPS: dict[str, Lowering] = {
    "cross_entropy": _cross_entropy,
    "cross_entropy_grad": _cross_entropy_grad,
    "count_correct": _count_correct,
}

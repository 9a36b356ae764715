"""Normalisation and its gradients; the formulas are derived in pockc/ops/norm.py.

Statistics are computed once: the gradients find those of the forward pass among the notes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pockc.ir import Node, Value
from pockc.targets.onnxruntime.emitter import Emitter, Lowering, Permutation
from pockc.targets.onnxruntime.reduce import moved_axes


class _Normalised(NamedTuple):
    """``xhat``, and one over the scale that x was divided by, in some order of the axes of x."""

    xhat: str
    scale: str
    axes: tuple[int, ...]  # of the mean, in that order
    order: Permutation
    centred: bool


def _mean(e: Emitter, tensor: str, axes: tuple[int, ...]) -> str:
    return e("ReduceMean", tensor, e.ints(*axes), keepdims=1)


def _layer_norm(e: Emitter, node: Node) -> None:
    x, *vectors = node.inputs
    width, epsilon = x.type.shape[-1], node.attrs["epsilon"]
    gamma, *beta = [e.read(v) for v in vectors] or [e.constant(np.ones(width, np.float32))]
    y, mean, scale = e.multi("LayerNormalization", 3, e.read(x), gamma, *beta, axis=-1, epsilon=epsilon)
    e.notes["statistics", x, epsilon] = mean, scale
    e.write(node.outputs[0], y)


def _layer_rows(e: Emitter, x: Value, epsilon: float) -> _Normalised:
    """The normalised rows, with the statistics of the forward pass if those are there."""

    def make() -> _Normalised:
        last = len(x.type.shape) - 1
        known = e.notes.get(("statistics", x, epsilon))
        tensor = e.read(x)
        centred = e("Sub", tensor, known[0] if known else _mean(e, tensor, (last,)))
        scale = known[1] if known else _inverse_root(e, _mean(e, e("Mul", centred, centred), (last,)), epsilon)
        order = tuple(range(len(x.type.shape)))
        return _Normalised(e("Mul", centred, scale), scale, (last,), order, True)

    found: _Normalised = e.note(("layer rows", x, epsilon), make)
    return found


def _inverse_root(e: Emitter, variance: str, epsilon: float) -> str:
    return e("Reciprocal", e("Sqrt", e("Add", variance, e.constant(epsilon))))


def _rms_rows(e: Emitter, x: Value, epsilon: float) -> _Normalised:
    def make() -> _Normalised:
        last = len(x.type.shape) - 1
        tensor = e.read(x)
        scale = _inverse_root(e, _mean(e, e("Mul", tensor, tensor), (last,)), epsilon)
        order = tuple(range(len(x.type.shape)))
        return _Normalised(e("Mul", tensor, scale), scale, (last,), order, False)

    found: _Normalised = e.note(("rms rows", x, epsilon), make)
    return found


def _rms_norm(e: Emitter, node: Node) -> None:
    x, *gamma = node.inputs
    rows = _rms_rows(e, x, node.attrs["epsilon"])
    e.write(node.outputs[0], e("Mul", rows.xhat, e.read(gamma[0])) if gamma else rows.xhat)


# (g - mean(g) - xhat mean(g xhat)) scale, without the mean of g where x was not centred.
def _gradient(e: Emitter, g: str, rows: _Normalised) -> str:
    through_scale = e("Mul", rows.xhat, _mean(e, e("Mul", g, rows.xhat), rows.axes))
    left = e("Sub", g, _mean(e, g, rows.axes)) if rows.centred else g
    return e("Mul", e("Sub", left, through_scale), rows.scale)


def _row_gradients(name: str, rows_of: object) -> dict[str, Lowering]:
    assert callable(rows_of)

    def grad_input(e: Emitter, node: Node) -> None:
        ct, x, *gamma = node.inputs
        rows = rows_of(e, x, node.attrs["epsilon"])
        g = e("Mul", e.read(ct), e.read(gamma[0])) if gamma else e.read(ct)
        e.write(node.outputs[0], _gradient(e, g, rows))

    def grad_gamma(e: Emitter, node: Node) -> None:
        ct, x = node.inputs
        products = e("Mul", e.read(ct), rows_of(e, x, node.attrs["epsilon"]).xhat)
        axes = tuple(range(len(x.type.shape) - 1))
        e.write(node.outputs[0], e("ReduceSum", products, e.ints(*axes), keepdims=0) if axes else products)

    return {f"{name}_grad_input": grad_input, f"{name}_grad_gamma": grad_gamma}


# --- Batch norm: per channel, the last axis of the IR's images and the second of ONNX's ------------------------------


def _channel_axes(x: Value, order: Permutation) -> tuple[int, ...]:
    return moved_axes(order, tuple(range(len(x.type.shape) - 1)))


def _vector(e: Emitter, vector: Value, like: Value, order: Permutation) -> str:
    """A vector over the channels, shaped to broadcast."""
    return e.aligned(vector, len(like.type.shape), order)


def _batch_norm(e: Emitter, node: Node) -> None:
    (x, gamma, beta), (y, mean, variance) = node.inputs, node.outputs
    order = e.order(x)
    axes, tensor = _channel_axes(x, order), e.read(x, order)
    centre = _mean(e, tensor, axes)
    centred = e("Sub", tensor, centre)
    spread = _mean(e, e("Mul", centred, centred), axes)
    scale = _inverse_root(e, spread, node.attrs["epsilon"])
    xhat = e("Mul", centred, scale)
    e.notes["batch", x, mean, variance] = _Normalised(xhat, scale, axes, order, True)
    scaled = e("Mul", xhat, _vector(e, gamma, x, order))
    e.write(y, e("Add", scaled, _vector(e, beta, x, order)), order)
    e.write(mean, e.reshaped(centre, mean.type.shape))
    e.write(variance, e.reshaped(spread, variance.type.shape))


def _batch(e: Emitter, x: Value, mean: Value, variance: Value, epsilon: float) -> _Normalised:
    def make() -> _Normalised:
        order = e.order(x)
        scale = _inverse_root(e, _vector(e, variance, x, order), epsilon)
        xhat = e("Mul", e("Sub", e.read(x, order), _vector(e, mean, x, order)), scale)
        return _Normalised(xhat, scale, _channel_axes(x, order), order, True)

    found: _Normalised = e.note(("batch", x, mean, variance), make)
    return found


def _batch_norm_grad_input(e: Emitter, node: Node) -> None:
    ct, x, gamma, mean, variance = node.inputs
    rows = _batch(e, x, mean, variance, node.attrs["epsilon"])
    g = e("Mul", e.read(ct, rows.order), _vector(e, gamma, x, rows.order))
    e.write(node.outputs[0], _gradient(e, g, rows), rows.order)


def _batch_norm_grad_gamma(e: Emitter, node: Node) -> None:
    ct, x, mean, variance = node.inputs
    rows = _batch(e, x, mean, variance, node.attrs["epsilon"])
    products = e("Mul", e.read(ct, rows.order), rows.xhat)
    e.write(node.outputs[0], e("ReduceSum", products, e.ints(*rows.axes), keepdims=0))


OPS: dict[str, Lowering] = {
    "layer_norm": _layer_norm,
    **_row_gradients("layer_norm", _layer_rows),
    "rms_norm": _rms_norm,
    **_row_gradients("rms_norm", _rms_rows),
    "batch_norm": _batch_norm,
    "batch_norm_grad_input": _batch_norm_grad_input,
    "batch_norm_grad_gamma": _batch_norm_grad_gamma,
}

"""Attention with grouped queries, and rotary position embedding.

The query heads that share a key head are one matrix of all their rows, so that keys and values are never repeated, and
their gradients sum over those heads inside one product. The weights of the forward pass are kept for the gradient:
recomputing them, as the native kernels do, would save memory that ONNX Runtime does not plan anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pockc.ir import Node, Value
from pockc.targets.onnxruntime.elementwise import scaled
from pockc.targets.onnxruntime.emitter import Emitter, Lowering, Permutation
from pockc.targets.onnxruntime.shape import sliced

_SWAPPED: Permutation = (0, 1, 3, 2)


class _Shape(NamedTuple):
    batch: int
    heads: int
    groups: int
    queries: int
    keys: int

    @property
    def scores(self) -> tuple[int, ...]:
        return self.batch, self.heads, self.queries, self.keys

    def by_group(self, last: int) -> tuple[int, ...]:
        """Of a tensor with a row for each query head and position: the rows of a group together."""
        return self.batch, self.groups, self.heads // self.groups * self.queries, last

    def by_head(self, last: int) -> tuple[int, ...]:
        return self.batch, self.heads, self.queries, last


def _shape(q: Value, k: Value) -> _Shape:
    batch, heads, queries, _ = q.type.shape
    return _Shape(batch, heads, k.type.shape[1], queries, k.type.shape[2])


def _rows(e: Emitter, value: Value, shape: _Shape) -> str:
    """A tensor of all query heads by group."""
    tensor = e.read(value)
    return tensor if shape.heads == shape.groups else e.reshaped(tensor, shape.by_group(value.type.shape[3]))


def _split(e: Emitter, tensor: str, shape: _Shape, last: int) -> str:
    """The opposite of `_rows`."""
    return tensor if shape.heads == shape.groups else e.reshaped(tensor, shape.by_head(last))


def _joined(e: Emitter, tensor: str, shape: _Shape, last: int) -> str:
    return tensor if shape.heads == shape.groups else e.reshaped(tensor, shape.by_group(last))


def _bias(e: Emitter, mask: Value | None, shape: _Shape, causal: bool) -> str | None:
    """What is added to the scores: minus infinity where a key is not visible; None where all are."""
    visible = np.tri(shape.queries, shape.keys, dtype=np.bool_)
    hidden = np.where(visible, 0, -np.inf).astype(np.float32)
    if mask is None:
        return e.constant(hidden, name="causal") if causal else None
    tensor = e.read(mask)
    if mask.type.dtype == "bool":
        if tensor in e.constants:
            bias = np.where(e.constants[tensor], 0, -np.inf).astype(np.float32)
            return e.constant(bias + hidden if causal else bias, name=mask.name)
        tensor = e("Where", tensor, e.constant(0.0), e.constant(-np.inf))
    if tensor in e.constants and causal:
        return e.constant(e.constants[tensor] + hidden, name=mask.name)
    return e("Add", tensor, e.constant(hidden, name="causal")) if causal else tensor


def _scores(e: Emitter, q: Value, k: Value, shape: _Shape, bias: str | None, scale: float) -> str:
    """[B,H,T,S], minus infinity where a key is not visible."""
    products = e("MatMul", _rows(e, q, shape), e.read(k, _SWAPPED))
    scores = _split(e, scaled(e, products, scale), shape, shape.keys)
    return scores if bias is None else e("Add", scores, bias)


def _sees_anything(e: Emitter, bias: str | None) -> str | None:
    """Whether a row sees any key, to broadcast against the scores; None where all rows are known to."""
    if bias is None:
        return None
    if bias in e.constants:
        seen = np.asarray(e.constants[bias]).max(-1, keepdims=True) > -np.inf
        return None if seen.all() else e.constant(seen, np.bool_, "seen")
    return e("Greater", e("ReduceMax", bias, e.ints(-1), keepdims=1), e.constant(-np.inf))


def _attention(e: Emitter, node: Node) -> None:
    (q, k, v, *mask), (out, logsumexp) = node.inputs, node.outputs
    shape = _shape(q, k)
    bias = _bias(e, mask[0] if mask else None, shape, node.attrs["causal"])
    scores = _scores(e, q, k, shape, bias, node.attrs["scale"])
    weights = e("Softmax", scores, axis=-1)
    seen = _sees_anything(e, bias)
    if seen is not None:
        weights = e("Where", seen, weights, e.constant(0.0))
    joined = _joined(e, weights, shape, shape.keys)
    e.write(out, _split(e, e("MatMul", joined, e.read(v)), shape, v.type.shape[3]))
    e.notes["weights", logsumexp] = joined
    e.later[logsumexp] = lambda: _logsumexp(e, scores)


def _logsumexp(e: Emitter, scores: str) -> str:
    most = e("ReduceMax", scores, e.ints(-1), keepdims=1)
    shift = e("Where", e("IsInf", most), e.constant(0.0), most)
    total = e("ReduceSum", e("Exp", e("Sub", scores, shift)), e.ints(-1), keepdims=0)
    return e("Add", e("Log", total), e("Squeeze", shift, e.ints(-1)))


def _recomputed(e: Emitter, node: Node, shape: _Shape) -> str:
    """The weights from what the IR keeps of the forward pass: ``exp(scores - logsumexp)``."""
    _, q, k, _, _, logsumexp, *mask = node.inputs
    bias = _bias(e, mask[0] if mask else None, shape, node.attrs["causal"])
    sums = e.read(logsumexp)
    shift = e("Unsqueeze", e("Where", e("IsInf", sums), e.constant(0.0), sums), e.ints(-1))
    weights = e("Exp", e("Sub", _scores(e, q, k, shape, bias, node.attrs["scale"]), shift))
    return _joined(e, weights, shape, shape.keys)


# Derived in pockc/ops/attention.py: dV = P^T ct, dP = ct V^T, dS = P (dP - ct . O), dQ = scale dS K, dK = scale dS^T Q.
def _attention_grad(e: Emitter, node: Node) -> None:
    ct, q, k, v, out, logsumexp, *_ = node.inputs
    shape, scale = _shape(q, k), node.attrs["scale"]
    weights = e.notes.get(("weights", logsumexp)) or _recomputed(e, node, shape)
    cts = _rows(e, ct, shape)
    through_weights = e("MatMul", cts, e.read(v, _SWAPPED))
    row = e("ReduceSum", e("Mul", cts, _rows(e, out, shape)), e.ints(-1), keepdims=1)
    through_scores = e("Mul", scaled(e, weights, scale), e("Sub", through_weights, row))
    dq = e("MatMul", through_scores, e.read(k))
    e.write(node.outputs[0], _split(e, dq, shape, q.type.shape[3]))
    e.write(node.outputs[1], e("MatMul", e("Transpose", through_scores, perm=_SWAPPED), _rows(e, q, shape)))
    e.write(node.outputs[2], e("MatMul", e("Transpose", weights, perm=_SWAPPED), cts))


def _rotary(e: Emitter, node: Node) -> None:
    x, cos, sin = node.inputs
    order = tuple(range(4))
    tensor, cosines, sines = e.read(x), e.aligned(cos, 4, order), e.aligned(sin, 4, order)
    half = x.type.shape[3] // 2

    def rotated(t: str) -> str:
        second = sliced(e, t, 3, half, 2 * half)
        return e("Concat", e("Neg", second), sliced(e, t, 3, 0, half), axis=3)

    straight = e("Mul", tensor, cosines)
    if node.attrs["inverse"]:
        e.write(node.outputs[0], e("Sub", straight, rotated(e("Mul", tensor, sines))))
    else:
        e.write(node.outputs[0], e("Add", straight, e("Mul", rotated(tensor), sines)))


OPS: dict[str, Lowering] = {"attention": _attention, "attention_grad": _attention_grad, "rotary": _rotary}

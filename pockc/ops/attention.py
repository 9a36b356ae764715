"""Scaled dot product attention with grouped queries, and rotary position embedding.

Neither op ever stores the T x S matrix of weights: the gradient recomputes it from the saved log-sum-exp of each row.
The references here do form it; they are for small sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pockc.errors import UserError
from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import (
    Cotangents,
    Gradients,
    Need,
    boolean,
    broadcast,
    cotangent_of,
    f32,
    require,
    require_dtype,
    require_type,
    torch_gradient,
)


def _attention_rule(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    mask: TensorType | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[TensorType, TensorType]:
    for name, operand in (("q", q), ("k", k), ("v", v)):
        require_dtype(name, operand, "f32")
        require(len(operand.shape) == 4, f"{name} must have the axes batch, head, position, feature, not {operand}")
    batch, heads, queries, features = q.shape
    groups, keys = k.shape[1:3]
    require_type("k", k, f32(batch, groups, keys, features))
    require_type("v", v, f32(batch, groups, keys, v.shape[3]))
    require(heads % groups == 0, f"{groups} key heads do not divide {heads} query heads")
    if mask is not None:
        _require_mask(mask, (batch, heads, queries, keys))
    return f32(batch, heads, queries, v.shape[3]), f32(batch, heads, queries)


def _require_mask(mask: TensorType, scores: tuple[int, ...]) -> None:
    require_dtype("the mask", mask, "bool", "f32")
    fits = len(mask.shape) == 4 and broadcast(mask.shape, scores) == scores
    require(fits, f"the mask must have four axes and broadcast to {list(scores)}, not {mask}")


def _repeated(x: Array, heads: int) -> Array:
    """Keys or values with one head per query head: head h reads head h // (H / Hk)."""
    return np.repeat(x, heads // x.shape[1], 1)


def _scores(q: Array, k: Array, mask: Array | None, scale: float, causal: bool) -> Array:
    """[B,H,T,S], minus infinity where a key is not visible."""
    scores = scale * (q @ _repeated(k, q.shape[1]).swapaxes(2, 3))
    if mask is not None:
        scores = np.where(mask, scores, -np.inf).astype(q.dtype) if mask.dtype == np.bool_ else scores + mask
    if causal:
        visible = np.tri(q.shape[2], k.shape[2], dtype=np.bool_)
        scores = np.where(visible, scores, -np.inf).astype(q.dtype)
    return np.asarray(scores)


def _weights(scores: Array, logsumexp: Array) -> Array:
    """The softmax of each row; zeros for a row that sees nothing."""
    empty = np.isneginf(logsumexp)[..., None]
    shifted = scores - np.where(empty, 0, logsumexp[..., None])
    return np.asarray(np.exp(shifted))


def _attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, scale: float, causal: bool = False
) -> tuple[Array, Array]:
    scores = _scores(q, k, mask, scale, causal)
    largest = scores.max(-1, keepdims=True)
    largest = np.where(np.isneginf(largest), 0, largest)
    with np.errstate(divide="ignore"):  # a row that sees nothing: log 0
        logsumexp = np.log(np.exp(scores - largest).sum(-1)) + largest[..., 0]
    return _weights(scores, logsumexp) @ _repeated(v, q.shape[1]), logsumexp


def _attention_vjp(builder: Builder, node: Node, cotangents: Cotangents, need: Need) -> Gradients:
    if 3 in need:
        raise UserError(
            "attention has no gradient for its additive mask",
            where=node.origin,
            supported="gradients for query, key and value",
            instead="Freeze the parameters that the mask is computed from.",
        )
    ct = cotangent_of(node, cotangents)
    if not need:
        return [None] * len(node.inputs)
    q, k, v, *mask = node.inputs
    found = builder.multi("attention_grad", ct, q, k, v, *node.outputs, *mask, **node.attrs)
    gradients: list[Value | None] = [gradient if i in need else None for i, gradient in enumerate(found)]
    return [*gradients, *(None for _ in mask)]


def _attention_grad_rule(
    ct: TensorType,
    q: TensorType,
    k: TensorType,
    v: TensorType,
    out: TensorType,
    logsumexp: TensorType,
    mask: TensorType | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[TensorType, TensorType, TensorType]:
    operands = (q, k, v) if mask is None else (q, k, v, mask)
    forward, sums = _attention_rule(*operands, scale=scale, causal=causal)
    require_type("ct", ct, forward)
    require_type("out", out, forward)
    require_type("logsumexp", logsumexp, sums)
    return q, k, v


# S = scale Q K^T, P = softmax(S) = exp(S - logsumexp), O = P V. Then dV = P^T ct and dP = ct V^T. Through the softmax,
# dS_ij = P_ij (dP_ij - sum_k P_ik dP_ik), and that sum is ct_i . O_i, a number per row that needs no second pass over
# the keys. Last, dQ = scale dS K and dK = scale dS^T Q. Keys and values of a group sum over the heads that read them.
def _attention_grad(
    ct: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    logsumexp: Array,
    mask: Array | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[Array, Array, Array]:
    weights = _weights(_scores(q, k, mask, scale, causal), logsumexp)
    through_weights = ct @ _repeated(v, q.shape[1]).swapaxes(2, 3)
    through_scores = weights * (through_weights - (ct * out).sum(-1, keepdims=True))
    dq = scale * (through_scores @ _repeated(k, q.shape[1]))
    dk = scale * _group_sum(through_scores.swapaxes(2, 3) @ q, k.shape)
    return dq, dk, _group_sum(weights.swapaxes(2, 3) @ ct, v.shape)


def _group_sum(x: Array, shape: tuple[int, ...]) -> Array:
    batch, groups, positions, features = shape
    return np.asarray(x.reshape(batch, groups, -1, positions, features).sum(2))


# Queries, keys, values, mask if any, attributes.
_PADDING_MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.bool_).reshape(2, 1, 1, 5)
_EMPTY_ROW_MASK = np.array([[1, 0, 1], [0, 0, 0]], np.bool_).reshape(1, 1, 2, 3)
_CASES: tuple[tuple[tuple[Any, ...], Mapping[str, Any]], ...] = (
    ((f32(2, 3, 4, 5), f32(2, 3, 6, 5), f32(2, 3, 6, 7)), {"scale": 0.4}),
    ((f32(1, 2, 5, 4), f32(1, 2, 5, 4), f32(1, 2, 5, 4)), {"scale": 0.5, "causal": True}),
    ((f32(1, 2, 3, 4), f32(1, 2, 6, 4), f32(1, 2, 6, 4)), {"scale": 0.5, "causal": True}),
    ((f32(2, 6, 4, 8), f32(2, 2, 4, 8), f32(2, 2, 4, 8)), {"scale": 0.35, "causal": True}),
    ((f32(1, 4, 3, 4), f32(1, 1, 5, 4), f32(1, 1, 5, 4)), {"scale": 0.5}),
    ((f32(2, 2, 4, 4), f32(2, 2, 5, 4), f32(2, 2, 5, 4), _PADDING_MASK), {"scale": 0.5}),
    ((f32(1, 2, 2, 4), f32(1, 2, 3, 4), f32(1, 2, 3, 4), _EMPTY_ROW_MASK), {"scale": 0.5}),
    ((f32(2, 2, 4, 4), f32(2, 2, 4, 4), f32(2, 2, 4, 4), f32(1, 2, 4, 4)), {"scale": 0.5}),
    ((f32(2, 4, 4, 4), f32(2, 2, 4, 4), f32(2, 2, 4, 4), boolean(2, 1, 4, 4)), {"scale": 0.5, "causal": True}),
)


def _torch_attention(attrs: Mapping[str, Any]) -> Any:
    """From matmul and softmax, since torch gives nan to a row that sees nothing."""

    def run(torch: Any, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = attrs["scale"] * (q @ k.mT)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if attrs.get("causal"):
            visible = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~visible, -torch.inf)
        empty = torch.isneginf(scores.amax(-1, keepdim=True))
        weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
        return weights @ v, scores.detach().logsumexp(-1)

    return run


def _grad_sample(operands: tuple[Any, ...], attrs: Mapping[str, Any]) -> Sample:
    """The output and the log-sum-exp have to be those of q, k, v and the mask, so all are given as arrays."""
    random = np.random.default_rng(7)

    def fill(operand: Any) -> Array:
        if not isinstance(operand, TensorType):
            return np.asarray(operand)
        if operand.dtype == "bool":
            return random.integers(0, 2, operand.shape).astype(np.bool_)
        return random.uniform(-2, 2, operand.shape).astype(np.float32)

    q, k, v, *mask = (fill(operand) for operand in operands)
    out, logsumexp = _attention(q, k, v, *mask, **attrs)
    forward = _torch_attention(attrs)

    def torch(t: Any, ct: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, *mask: Any) -> Any:
        return torch_gradient(lambda t, *qkv: forward(t, *qkv, *mask)[0], 0, 1, 2)(t, ct, q, k, v)

    return Sample((f32(*out.shape), q, k, v, out, logsumexp, *mask), attrs, torch)


define(
    "attention",
    type_rule=_attention_rule,
    reference=_attention,
    vjp=_attention_vjp,
    samples=[Sample(operands, attrs, _torch_attention(attrs), (0, 1, 2)) for operands, attrs in _CASES],
    saves="q, k, v, out, logsumexp",
)
define(
    "attention_grad",
    type_rule=_attention_grad_rule,
    reference=_attention_grad,
    samples=[_grad_sample(operands, attrs) for operands, attrs in _CASES],
)


# rotary


def _rotary_rule(x: TensorType, cos: TensorType, sin: TensorType, *, inverse: bool = False) -> TensorType:
    require_dtype("x", x, "f32")
    require(len(x.shape) == 4 and x.shape[3] % 2 == 0, f"x must be f32[B,H,T,D] with an even D, not {x}")
    for name, table in (("cos", cos), ("sin", sin)):
        require_dtype(name, table, "f32")
        require(broadcast(table.shape, x.shape) == x.shape, f"{name} {table} does not broadcast to {x}")
    return x


def _rotate_half(x: Array) -> Array:
    first, second = np.split(x, 2, -1)
    return np.concatenate([-second, first], -1)


def _rotary(x: Array, cos: Array, sin: Array, *, inverse: bool = False) -> Array:
    return x * cos - _rotate_half(x * sin) if inverse else x * cos + _rotate_half(x) * sin


# With R the matrix of rotate_half, y = (C + S R) x for diagonal C and S. R^T = -R, so the transpose is C - R S: the
# inverse rotation wherever sin agrees between the two halves, and the gradient in any case.
def _rotary_vjp(builder: Builder, node: Node, cotangents: Cotangents, need: Need) -> Gradients:
    if need - {0}:
        raise UserError(
            "rotary has no gradient for its angles",
            where=node.origin,
            supported="a gradient for the rotated tensor",
            instead="Freeze the parameters that the angles are computed from.",
        )
    ct = cotangent_of(node, cotangents)
    _, cos, sin = node.inputs
    return builder("rotary", ct, cos, sin, inverse=not node.attrs["inverse"]) if 0 in need else None, None, None


def _torch_rotary(t: Any, x: Any, cos: Any, sin: Any, inverse: bool) -> Any:
    def rotate(x: Any) -> Any:
        first, second = x.chunk(2, -1)
        return t.cat([-second, first], -1)

    return x * cos - rotate(x * sin) if inverse else x * cos + rotate(x) * sin


define(
    "rotary",
    type_rule=_rotary_rule,
    reference=_rotary,
    vjp=_rotary_vjp,
    samples=[
        Sample(
            (f32(2, 3, 4, 6), table, table),
            {"inverse": inverse},
            lambda t, x, cos, sin, inverse=inverse: _torch_rotary(t, x, cos, sin, inverse),
            (0,),
        )
        for table in (f32(1, 1, 4, 6), f32(4, 6), f32(2, 1, 4, 6))
        for inverse in (False, True)
    ],
    saves="cos, sin",
)

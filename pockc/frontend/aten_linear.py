"""Matrix products and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pockc.frontend.aten import Call, handles, refuse_unless, shape_of
from pockc.frontend.random import dropout
from pockc.ir import Value


@handles("linear.default")
def _linear(call: Call, x: Value, weight: Value, bias: Value | None = None) -> Value:
    refuse_unless(len(shape_of(weight)) == 2, "a linear layer whose weight is not a matrix")
    rows = call.reshape(x, (1, *shape_of(x))) if len(shape_of(x)) == 1 else x
    y = call.builder("matmul", rows, weight, transpose_b=True)
    if bias is not None:
        y = call.builder("add", y, bias)
    return call.reshape(y, call.result.shape)


@handles("matmul.default", "bmm.default", "mm.default", "mv.default", "dot.default")
def _matmul(call: Call, a: Value, b: Value) -> Value:
    left = call.reshape(a, (1, *shape_of(a))) if len(shape_of(a)) == 1 else a
    right = call.reshape(b, (*shape_of(b), 1)) if len(shape_of(b)) == 1 else b
    return call.reshape(call.builder("matmul", left, right), call.result.shape)


@handles("addmm.default", "baddbmm.default", "addmv.default", "addbmm.default")
def _addmm(call: Call, x: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    refuse_unless(call.operator != "aten.addbmm.default", "addbmm", instead="Use torch.bmm(a, b).sum(0).")
    product = _matmul(call, a, b)
    if alpha != 1:
        product = call.builder("mul", product, call.builder.constant(alpha))
    if beta == 0:
        return product
    if beta != 1:
        x = call.builder("mul", x, call.builder.constant(beta))
    return call.builder("add", product, x)


@handles("scaled_dot_product_attention.default")
def _attention(
    call: Call,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    factor = 1 / math.sqrt(shape_of(query)[-1]) if scale is None else float(scale)
    query, key, value = (_four_axes(call, x) for x in (query, key, value))
    mask, causal = _simplified_mask(call, attn_mask, is_causal)
    if dropout_p > 0:
        return call.reshape(
            _explicit_attention(call, query, key, value, mask, causal, factor, dropout_p), call.result.shape
        )
    batch = np.broadcast_shapes(*(shape_of(x)[:1] for x in (query, key, value)))
    query, key, value = (call.expand(x, (*batch, *shape_of(x)[1:])) for x in (query, key, value))
    operands = (query, key, value) if mask is None else (query, key, value, mask)
    out, _ = call.builder.multi("attention", *operands, scale=factor, causal=causal)
    return call.reshape(out, call.result.shape)


def _four_axes(call: Call, x: Value) -> Value:
    """[batch, heads, length, width]; further leading axes count as batch."""
    shape = shape_of(x)
    if len(shape) < 4:
        return call.reshape(x, (1,) * (4 - len(shape)) + shape)
    return call.reshape(x, (math.prod(shape[:-3]), *shape[-3:]))


def _simplified_mask(call: Call, mask: Value | None, causal: bool) -> tuple[Value | None, bool]:
    """The mask with four axes; none where it is constant and says nothing, or no more than `causal` does."""
    if mask is None:
        return None, causal
    contents = call.constant(mask)
    if contents is None:
        return _four_axes(call, mask), causal
    while contents.ndim > 2 and (contents[:1] == contents).all():
        contents = contents[0]
    visible = contents if contents.dtype == np.bool_ else contents == 0
    hidden_is_minus_infinity = contents.dtype == np.bool_ or bool((contents[~visible] <= _NEVER).all())
    if bool(visible.all()):
        return None, causal
    lower = np.tril(np.ones(visible.shape[-2:], dtype=np.bool_))
    if hidden_is_minus_infinity and visible.ndim == 2 and np.array_equal(visible, lower):
        return None, True
    dtype = "bool" if contents.dtype == np.bool_ else "f32"
    smaller = call.builder.constant(contents.reshape((1,) * (4 - contents.ndim) + contents.shape), dtype)
    return smaller, causal


# Additive masks write "never" as minus infinity or as the most negative number: exp() of either is zero.
_NEVER = -1e30


def _explicit_attention(
    call: Call, query: Value, key: Value, value: Value, mask: Value | None, causal: bool, scale: float, p: float
) -> Value:
    """Attention with dropout on its weights: these must exist as a tensor then."""
    b = call.builder
    heads = shape_of(query)[1]
    key, value = (_repeat_heads(call, x, heads) for x in (key, value))
    scores = b("matmul", b("mul", query, b.constant(scale)), key, transpose_b=True)
    if causal:
        visible = np.tril(np.ones(shape_of(scores)[-2:], dtype=np.bool_))
        scores = b("where", b.constant(visible, "bool"), scores, b.constant(-math.inf))
    if mask is not None and mask.type.dtype == "bool":
        scores = b("where", mask, scores, b.constant(-math.inf))
    elif mask is not None:
        scores = b("add", scores, mask)
    return b("matmul", dropout(b, b("softmax", scores), p), value)


def _repeat_heads(call: Call, x: Value, heads: int) -> Value:
    batch, groups, length, width = shape_of(x)
    if groups == heads:
        return x
    wide = call.expand(
        call.reshape(x, (batch, groups, 1, length, width)), (batch, groups, heads // groups, length, width)
    )
    return call.reshape(wide, (batch, heads, length, width))


@handles("outer.default")
def _outer(call: Call, a: Value, b: Value) -> Value:
    return call.builder("mul", call.reshape(a, (*shape_of(a), 1)), b)


@handles("softmax.int", "_softmax.default", "_safe_softmax.default")
def _softmax(
    call: Call, x: Value, dim: int, half_to_float: bool | str | None = False, dtype: str | None = None
) -> Value:
    return _last_axis(call, "softmax", x, dim)


@handles("log_softmax.int", "_log_softmax.default")
def _log_softmax(
    call: Call, x: Value, dim: int, half_to_float: bool | str | None = False, dtype: str | None = None
) -> Value:
    return _last_axis(call, "log_softmax", x, dim)


def _last_axis(call: Call, op: str, x: Value, dim: int) -> Value:
    """An operator that works along the last axis, along any axis."""
    rank = len(shape_of(x))
    if rank == 0:
        return call.reshape(call.builder(op, call.reshape(x, (1,))), ())
    axis = dim % rank
    order: Sequence[int] = [i for i in range(rank) if i != axis] + [axis]
    y = call.builder(op, call.transpose(x, order))
    return call.transpose(y, [order.index(i) for i in range(rank)])

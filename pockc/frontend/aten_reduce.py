"""Sums, means, extrema, moments and norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pockc.frontend.aten import Call, axes_of, axis_of, handles, refuse_unless, shape_of
from pockc.ir import Value

Dims = int | Sequence[int] | None


def _reduce(call: Call, op: str, x: Value, dims: Dims, keepdim: bool) -> Value:
    axes = axes_of(dims, len(shape_of(x)))
    if not axes:
        return x
    # Spatial means of images go through channels-last, as pools do.
    if op == "reduce_mean" and len(shape_of(x)) == 4 and axes == (2, 3):
        mean = call.builder(op, call.channels_last(x), axes=(1, 2), keepdims=keepdim)
        return call.channels_first(mean) if keepdim else mean
    return call.builder(op, x, axes=axes, keepdims=keepdim)


@handles("sum.default", "sum.dim_IntList")
def _sum(call: Call, x: Value, dim: Dims = None, keepdim: bool = False, dtype: str | None = None) -> Value:
    return _reduce(call, "reduce_sum", call.cast(x, call.result.dtype), dim, keepdim)


@handles("mean.default", "mean.dim")
def _mean(call: Call, x: Value, dim: Dims = None, keepdim: bool = False, dtype: str | None = None) -> Value:
    return _reduce(call, "reduce_mean", call.cast(x, "f32"), dim, keepdim)


@handles("amax.default")
def _amax(call: Call, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
    return _reduce(call, "reduce_max", x, dim, keepdim)


@handles("amin.default")
def _amin(call: Call, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
    return call.builder("neg", _reduce(call, "reduce_max", call.builder("neg", x), dim, keepdim))


@handles("max.default")
def _max_all(call: Call, x: Value) -> Value:
    return _amax(call, x)


@handles("min.default")
def _min_all(call: Call, x: Value) -> Value:
    return _amin(call, x)


@handles("max.dim")
def _max(call: Call, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, ...]:
    return _amax(call, x, dim, keepdim), _argmax(call, x, dim, keepdim)


@handles("min.dim")
def _min(call: Call, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, ...]:
    return _amin(call, x, dim, keepdim), _argmin(call, x, dim, keepdim)


@handles("argmax.default")
def _argmax(call: Call, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    if dim is None:
        flat = call.builder("argmax", call.reshape(x, (x.type.elements,)), axis=0)
        return call.reshape(flat, (1,) * len(shape_of(x)) if keepdim else ())
    axis = axis_of(dim, len(shape_of(x)))
    index = call.builder("argmax", x, axis=axis)
    return call.reshape(index, (*shape_of(x)[:axis], 1, *shape_of(x)[axis + 1 :])) if keepdim else index


@handles("argmin.default")
def _argmin(call: Call, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return _argmax(call, call.builder("neg", x), dim, keepdim)


@handles("any.default", "any.dim", "any.dims")
def _any(call: Call, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
    count = _reduce(call, "reduce_sum", call.cast(call.cast(x, "bool"), "i64"), dim, keepdim)
    return call.builder("greater", count, call.value(0, "i64"))


@handles("all.default", "all.dim", "all.dims")
def _all(call: Call, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
    false = call.builder("logical_not", call.cast(x, "bool"))
    count = _reduce(call, "reduce_sum", call.cast(false, "i64"), dim, keepdim)
    return call.builder("equal", count, call.value(0, "i64"))


@handles("cumsum.default")
def _cumsum(call: Call, x: Value, dim: int, dtype: str | None = None) -> Value:
    return call.builder("cumsum", call.cast(x, call.result.dtype), axis=axis_of(dim, len(shape_of(x))))


@handles("var_mean.correction")
def _var_mean(
    call: Call, x: Value, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Value, ...]:
    b = call.builder
    axes = axes_of(dim, len(shape_of(x)))
    count = math.prod(shape_of(x)[axis] for axis in axes)
    degrees = count - (1 if correction is None else correction)
    refuse_unless(degrees > 0, f"a variance of {count} elements with correction {correction}")
    mean = b("reduce_mean", x, axes=axes, keepdims=True)
    centred = b("sub", x, mean)
    total = b("reduce_sum", b("mul", centred, centred), axes=axes, keepdims=keepdim)
    variance = b("mul", total, b.constant(1.0 / degrees))
    return variance, mean if keepdim else call.reshape(mean, shape_of(variance))


@handles("var.correction")
def _var(call: Call, x: Value, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Value:
    return _var_mean(call, x, dim, correction=correction, keepdim=keepdim)[0]


@handles("std.correction")
def _std(call: Call, x: Value, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Value:
    return call.builder("sqrt", _var(call, x, dim, correction=correction, keepdim=keepdim))


@handles("linalg_vector_norm.default")
def _vector_norm(
    call: Call,
    x: Value,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    dtype: str | None = None,
) -> Value:
    b = call.builder
    refuse_unless(ord in (1, 2, math.inf), f"the {ord}-norm", supported="the 1-, 2- and infinity-norm")
    if ord == 1:
        return _reduce(call, "reduce_sum", b("abs", x), dim, keepdim)
    if ord == math.inf:
        return _reduce(call, "reduce_max", b("abs", x), dim, keepdim)
    return b("sqrt", _reduce(call, "reduce_sum", b("mul", x, x), dim, keepdim))


@handles("logsumexp.default")
def _logsumexp(call: Call, x: Value, dim: Dims, keepdim: bool = False) -> Value:
    """The maximum is subtracted first; as a constant of the derivative it needs none of its own."""
    b = call.builder
    highest = b("reduce_max", x, axes=axes_of(dim, len(shape_of(x))), keepdims=True)
    total = b("log", _reduce(call, "reduce_sum", b("exp", b("sub", x, highest)), dim, keepdim))
    return b("add", total, call.reshape(highest, shape_of(total)))

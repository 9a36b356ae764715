"""Lookups: embedding, and indexing by integer tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pockc.frontend.aten import Call, axis_of, handles, refuse, refuse_unless, shape_of
from pockc.ir import Array, Value


@handles("embedding.default")
def _embedding(
    call: Call, weight: Value, indices: Value, padding_idx: int = -1, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Value:  # fmt: skip
    refuse_unless(not scale_grad_by_freq, "an embedding with scale_grad_by_freq=True", supported="False")
    return call.builder("embedding", weight, call.cast(indices, "i64"), padding_index=padding_idx)


@handles("index_select.default")
def _index_select(call: Call, x: Value, dim: int, index: Value) -> Value:
    return _index(call, x, [None] * axis_of(dim, len(shape_of(x))) + [index])


@handles("flip.default")
def _flip(call: Call, x: Value, dims: Sequence[int]) -> Value:
    for dim in dims:
        axis = axis_of(dim, len(shape_of(x)))
        x = _take(call, x, np.arange(shape_of(x)[axis])[::-1], axis)
    return x


@handles("roll.default")
def _roll(call: Call, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    if not dims:
        flat = _take(call, call.reshape(x, (x.type.elements,)), np.roll(np.arange(x.type.elements), shifts[0]), 0)
        return call.reshape(flat, shape_of(x))
    for shift, dim in zip(shifts, dims, strict=True):
        axis = axis_of(dim, len(shape_of(x)))
        x = _take(call, x, np.roll(np.arange(shape_of(x)[axis]), shift), axis)
    return x


@handles("index.Tensor", "_unsafe_index.Tensor")
def _index(call: Call, x: Value, indices: Sequence[Value | None]) -> Value:
    """``x[:, i, j]``: the indexed axes, which must be neighbours, become one, looked up by flat positions."""
    places = [axis for axis, index in enumerate(indices) if index is not None]
    first, count = places[0], len(places)
    chosen = [index for index in indices if index is not None]
    refuse_unless(
        all(index.type.dtype != "bool" for index in chosen),
        "indexing by a boolean mask, whose result has a shape that depends on data",
        instead="Multiply by the mask, or use torch.where.",
    )
    refuse_unless(
        places == list(range(first, first + count)),
        "indexing by tensors on axes that are not neighbours",
        instead="Permute the axes first, so that the indexed ones are next to each other.",
    )
    sizes = shape_of(x)[first : first + count]
    before, after = shape_of(x)[:first], shape_of(x)[first + count :]
    shape = np.broadcast_shapes(*(shape_of(index) for index in chosen))
    merged = call.reshape(x, (*before, math.prod(sizes), *after))
    contents = [call.constant(index) for index in chosen]
    known = [array for array in contents if array is not None]
    if len(known) < len(contents):
        return _lookup(call, merged, [_wrapped(call, i, n) for i, n in zip(chosen, sizes, strict=True)], sizes, first)
    flat = np.broadcast_to(_flat_positions(known, sizes), shape)
    return call.reshape(_take(call, merged, flat.ravel(), first), (*before, *shape, *after))


def _flat_positions(indices: Sequence[Array], sizes: Sequence[int]) -> Array:
    position: Array = np.zeros((), dtype=np.int64)
    for index, size in zip(indices, sizes, strict=True):
        position = position * size + np.where(index < 0, index + size, index)
    return position


def _take(call: Call, x: Value, positions: Array, axis: int) -> Value:
    """A constant selection along one axis: nothing at all, a slice, or a take."""
    size = shape_of(x)[axis]
    if np.any(positions < 0) or np.any(positions >= size):
        raise refuse(f"a constant index outside of an axis of {size} elements")
    if np.array_equal(positions, np.arange(size)):
        return x
    if len(positions) > 0 and np.array_equal(positions, np.arange(positions[0], positions[0] + len(positions))):
        start = int(positions[0])
        return call.builder("slice", x, axis=axis, start=start, stop=start + len(positions), step=1)
    return call.builder("take", x, call.builder.constant(positions, "i32"), axis=axis)


def _wrapped(call: Call, index: Value, size: int) -> Value:
    """Negative indices, which count from the end, as non-negative ones."""
    b, index = call.builder, call.cast(index, "i64")
    return b("where", b("less", index, call.value(0, "i64")), b("add", index, call.value(size, "i64")), index)


def _lookup(call: Call, x: Value, indices: Sequence[Value], sizes: Sequence[int], axis: int) -> Value:
    """Rows chosen at run time: an embedding lookup, whose table is `x` itself with the indexed axis in front."""
    refuse_unless(
        _exact_as_float(call, x), f"an {x.type.dtype} tensor indexed by computed positions", supported="float32 tensors"
    )
    b = call.builder
    position = indices[0]
    for index, size in zip(indices[1:], sizes[1:], strict=True):
        position = b("add", b("mul", position, call.value(size, "i64")), index)
    rank = len(shape_of(x))
    table = call.transpose(x, (axis, *(i for i in range(rank) if i != axis)))
    rest = shape_of(table)[1:]
    rows = b("embedding", call.reshape(call.cast(table, "f32"), (shape_of(table)[0], math.prod(rest))), position)
    shape = shape_of(position)
    result = call.cast(call.reshape(rows, (*shape, *rest)), x.type.dtype)
    lead = len(shape)
    # The looked-up axes stand in front; put them back behind the axes that came before the indexed one.
    order = (*range(lead, lead + axis), *range(lead), *range(lead + axis, lead + len(rest)))
    return call.transpose(result, order)


@handles("gather.default")
def _gather(call: Call, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    """Along the last axis: a lookup in the flattened tensor, at row * size + index."""
    contents = call.constant(x)
    if contents is not None and contents.size and (contents == contents.flat[0]).all():
        return call.expand(call.value(contents.flat[0].item(), x.type.dtype), shape_of(index))
    axis, rank = axis_of(dim, len(shape_of(x))), len(shape_of(x))
    refuse_unless(
        rank > 0 and axis == rank - 1 and shape_of(index)[:-1] == shape_of(x)[:-1] and _exact_as_float(call, x),
        "this gather",
        supported="gather of float32 along the last axis, with an index of the same leading shape",
        instead="Use an embedding lookup.",
    )
    b, size = call.builder, shape_of(x)[-1]
    starts = np.arange(math.prod(shape_of(x)[:-1]), dtype=np.int64).reshape(*shape_of(x)[:-1], 1) * size
    position = b("add", call.cast(index, "i64"), b.constant(starts, "i64"))
    rows = b("embedding", call.reshape(call.cast(x, "f32"), (x.type.elements, 1)), position)
    return call.cast(call.reshape(rows, shape_of(index)), x.type.dtype)


def _exact_as_float(call: Call, x: Value) -> bool:
    """Whether a lookup may go through float32: floats and booleans, and integers that are known to be small."""
    contents = call.constant(x)
    small = contents is not None and bool((np.abs(contents) < 2**24).all())
    return x.type.dtype in ("f32", "bool") or small

"""Reshaping, permuting, slicing, joining, repeating and padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pockc.frontend.aten import Call, axis_of, handles, refuse, refuse_unless, shape_of
from pockc.ir import Value

_HUGE = 2**62


@handles("view.default", "reshape.default", "_unsafe_view.default", "view_copy.default")
def _view(call: Call, x: Value, size: Sequence[int]) -> Value:
    return call.reshape(x, call.result.shape)


@handles("unsqueeze.default")
def _unsqueeze(call: Call, x: Value, dim: int) -> Value:
    return call.reshape(x, call.result.shape)


@handles("squeeze.default", "squeeze.dim", "squeeze.dims")
def _squeeze(call: Call, x: Value, dim: int | Sequence[int] | None = None) -> Value:
    return call.reshape(x, call.result.shape)


@handles("permute.default")
def _permute(call: Call, x: Value, dims: Sequence[int]) -> Value:
    return call.transpose(x, [axis_of(dim, len(shape_of(x))) for dim in dims])


@handles("transpose.int")
def _transpose(call: Call, x: Value, dim0: int, dim1: int) -> Value:
    rank = len(shape_of(x))
    permutation = list(range(rank))
    if rank:
        first, second = axis_of(dim0, rank), axis_of(dim1, rank)
        permutation[first], permutation[second] = second, first
    return call.transpose(x, permutation)


@handles("t.default")
def _t(call: Call, x: Value) -> Value:
    return call.transpose(x, range(len(shape_of(x)))[::-1])


@handles("expand.default")
def _expand(call: Call, x: Value, size: Sequence[int], implicit: bool = False) -> Value:
    return call.expand(x, call.result.shape)


@handles("repeat.default")
def _repeat(call: Call, x: Value, repeats: Sequence[int]) -> Value:
    """Each repeated axis as [repeats, size] broadcast along the first; at most as many joins as there are axes."""
    x = call.reshape(x, (1,) * (len(repeats) - len(shape_of(x))) + shape_of(x))
    for axis, count in enumerate(repeats):
        refuse_unless(count > 0, "repeat with a count of 0")
        if count == 1:
            continue
        before, size, after = shape_of(x)[:axis], shape_of(x)[axis], shape_of(x)[axis + 1 :]
        flat = (math.prod(before), 1, size * math.prod(after))
        wide = call.expand(call.reshape(x, flat), (flat[0], count, flat[2]))
        x = call.reshape(wide, (*before, count * size, *after))
    return x


def slice_axis(call: Call, x: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
    """A slice within bounds; the value itself where it is all of the axis."""
    if start == 0 and stop == shape_of(x)[axis] and step == 1:
        return x
    refuse_unless(stop > start, "a slice without elements", instead="Leave empty tensors out of the model.")
    return call.builder("slice", x, axis=axis, start=start, stop=stop, step=step)


def _bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    first, last, _ = slice(start, end).indices(size)
    return first, last


@handles("slice.Tensor", "slice_copy.Tensor")
def _slice(
    call: Call, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    axis = axis_of(dim, len(shape_of(x)))
    return slice_axis(call, x, axis, *_bounds(start, end, shape_of(x)[axis]), step)


@handles("narrow.default")
def _narrow(call: Call, x: Value, dim: int, start: int, length: int) -> Value:
    axis = axis_of(dim, len(shape_of(x)))
    first = start % shape_of(x)[axis]
    return slice_axis(call, x, axis, first, first + length)


@handles("select.int", "select_copy.int")
def _select(call: Call, x: Value, dim: int, index: int) -> Value:
    axis = axis_of(dim, len(shape_of(x)))
    first = index % shape_of(x)[axis]
    return call.reshape(slice_axis(call, x, axis, first, first + 1), call.result.shape)


@handles("split_with_sizes.default", "split_with_sizes_copy.default")
def _split_with_sizes(call: Call, x: Value, split_sizes: Sequence[int], dim: int = 0) -> tuple[Value, ...]:
    axis = axis_of(dim, len(shape_of(x)))
    ends = np.cumsum(split_sizes).tolist()
    return tuple(slice_axis(call, x, axis, end - size, end) for size, end in zip(split_sizes, ends, strict=True))


@handles("split.Tensor")
def _split(call: Call, x: Value, split_size: int, dim: int = 0) -> tuple[Value, ...]:
    axis = axis_of(dim, len(shape_of(x)))
    size = shape_of(x)[axis]
    starts = range(0, size, split_size)
    return tuple(slice_axis(call, x, axis, start, min(start + split_size, size)) for start in starts)


@handles("chunk.default")
def _chunk(call: Call, x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    size = shape_of(x)[axis_of(dim, len(shape_of(x)))]
    return _split(call, x, -(-size // chunks), dim)


@handles("unbind.int")
def _unbind(call: Call, x: Value, dim: int = 0) -> tuple[Value, ...]:
    axis = axis_of(dim, len(shape_of(x)))
    shape = (*shape_of(x)[:axis], *shape_of(x)[axis + 1 :])
    return tuple(call.reshape(slice_axis(call, x, axis, i, i + 1), shape) for i in range(shape_of(x)[axis]))


@handles("cat.default")
def _cat(call: Call, tensors: Sequence[Value], dim: int = 0) -> Value:
    # PyTorch lets 1-d tensors without elements take part in any concatenation.
    parts = [call.cast(part, call.result.dtype) for part in tensors if shape_of(part) != (0,)]
    axis = axis_of(dim, len(call.result.shape))
    parts = [part for part in parts if shape_of(part)[axis] > 0]
    refuse_unless(parts, "a concatenation without elements")
    return parts[0] if len(parts) == 1 else call.builder("concat", *parts, axis=axis)


@handles("stack.default")
def _stack(call: Call, tensors: Sequence[Value], dim: int = 0) -> Value:
    axis = axis_of(dim, len(call.result.shape))
    shape = (*call.result.shape[:axis], 1, *call.result.shape[axis + 1 :])
    parts = [call.reshape(call.cast(part, call.result.dtype), shape) for part in tensors]
    return parts[0] if len(parts) == 1 else call.builder("concat", *parts, axis=axis)


@handles("constant_pad_nd.default")
def _pad(call: Call, x: Value, pad: Sequence[int], value: float = 0) -> Value:
    """Pairs from the last axis inwards; a negative number crops."""
    rank = len(shape_of(x))
    before, after = [0] * rank, [0] * rank
    for i in range(len(pad) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    for axis in range(rank):
        size = shape_of(x)[axis]
        x = slice_axis(call, x, axis, max(0, -before[axis]), size + min(0, after[axis]))
    before, after = [max(0, n) for n in before], [max(0, n) for n in after]
    if not any(before) and not any(after):
        return x
    dtype = x.type.dtype
    if dtype != "f32":
        return _pad_by_concatenation(call, x, before, after, value)
    return call.builder("pad", x, before=tuple(before), after=tuple(after), value=float(value))


def _pad_by_concatenation(call: Call, x: Value, before: list[int], after: list[int], value: float) -> Value:
    dtype = x.type.dtype
    for axis in range(len(before)):
        shape = shape_of(x)
        parts = [x]
        if before[axis]:
            edge = call.value(value if dtype != "bool" else bool(value), dtype)
            parts.insert(0, call.expand(edge, (*shape[:axis], before[axis], *shape[axis + 1 :])))
        if after[axis]:
            edge = call.value(value if dtype != "bool" else bool(value), dtype)
            parts.append(call.expand(edge, (*shape[:axis], after[axis], *shape[axis + 1 :])))
        x = parts[0] if len(parts) == 1 else call.builder("concat", *parts, axis=axis)
    return x


@handles("slice_scatter.default")
def _slice_scatter(
    call: Call, x: Value, src: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    """What an assignment to a slice becomes: the parts around it, joined with the new one."""
    if step != 1:
        raise refuse("assignment to a slice with a step", supported="slices with step 1")
    axis = axis_of(dim, len(shape_of(x)))
    size = shape_of(x)[axis]
    first, last = _bounds(start, end, size)
    parts = [call.expand(src, (*shape_of(x)[:axis], last - first, *shape_of(x)[axis + 1 :]))]
    if first > 0:
        parts.insert(0, slice_axis(call, x, axis, 0, first))
    if last < size:
        parts.append(slice_axis(call, x, axis, last, size))
    return parts[0] if len(parts) == 1 else call.builder("concat", *parts, axis=axis)


@handles("select_scatter.default")
def _select_scatter(call: Call, x: Value, src: Value, dim: int, index: int) -> Value:
    axis = axis_of(dim, len(shape_of(x)))
    first = index % shape_of(x)[axis]
    part = call.reshape(src, (*shape_of(x)[:axis], 1, *shape_of(x)[axis + 1 :]))
    return _slice_scatter(call, x, part, axis, first, first + 1)


@handles("tril.default")
def _tril(call: Call, x: Value, diagonal: int = 0) -> Value:
    keep = np.tril(np.ones(shape_of(x)[-2:], dtype=np.bool_), diagonal)
    return call.builder("where", call.builder.constant(keep, "bool"), x, call.value(0, x.type.dtype))


@handles("triu.default")
def _triu(call: Call, x: Value, diagonal: int = 0) -> Value:
    keep = np.triu(np.ones(shape_of(x)[-2:], dtype=np.bool_), diagonal)
    return call.builder("where", call.builder.constant(keep, "bool"), x, call.value(0, x.type.dtype))


@handles("pixel_shuffle.default")
def _pixel_shuffle(call: Call, x: Value, upscale_factor: int) -> Value:
    *lead, channels, height, width = shape_of(x)
    factor, batch = upscale_factor, math.prod(lead)
    split = call.reshape(x, (batch, channels // factor**2, factor, factor, height, width))
    return call.reshape(call.transpose(split, (0, 1, 4, 2, 5, 3)), call.result.shape)


@handles("zeros_like.default", "new_zeros.default")
def _zeros_like(call: Call, x: Value, *_: object, **__: object) -> Value:
    return call.expand(call.value(0, call.result.dtype), call.result.shape)


@handles("ones_like.default", "new_ones.default")
def _ones_like(call: Call, x: Value, *_: object, **__: object) -> Value:
    return call.expand(call.value(1, call.result.dtype), call.result.shape)


@handles("full_like.default", "fill.Scalar")
def _full_like(call: Call, x: Value, fill_value: float, **_: object) -> Value:
    return call.expand(call.value(fill_value, call.result.dtype), call.result.shape)


@handles("new_full.default")
def _new_full(call: Call, x: Value, size: Sequence[int], fill_value: float, **_: object) -> Value:
    return _full_like(call, x, fill_value)

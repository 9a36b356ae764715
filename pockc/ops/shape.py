"""Ops that move elements: reshape, transpose, slice, insert, concat, expand, pad, take."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import numpy as np

from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import (
    Cotangents,
    Gradients,
    Need,
    boolean,
    cotangent_of,
    f32,
    i64,
    require,
    require_axis,
    require_dtype,
    unary_vjp,
    unbroadcast,
)

MAXIMUM_RANK = 8


def _replaced(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _require_shape(shape: tuple[int, ...]) -> None:
    require(all(size > 0 for size in shape), f"the sizes of shape {list(shape)} must be positive")
    require(len(shape) <= MAXIMUM_RANK, f"shape {list(shape)} has more than {MAXIMUM_RANK} axes")


def _reshape_rule(x: TensorType, *, shape: tuple[int, ...]) -> TensorType:
    _require_shape(shape)
    require(prod(shape) == x.elements, f"{x} does not fit shape {list(shape)}")
    return TensorType(shape, x.dtype)


define(
    "reshape",
    type_rule=_reshape_rule,
    reference=lambda x, *, shape: x.reshape(shape),
    vjp=unary_vjp(lambda b, node, ct: b("reshape", ct, shape=node.inputs[0].type.shape)),
    samples=[
        Sample((f32(3, 4),), {"shape": (2, 6)}, lambda t, x: x.reshape(2, 6), (0,)),
        Sample((f32(2, 3, 4),), {"shape": (24,)}, lambda t, x: x.reshape(24), (0,)),
        Sample((f32(2, 3, 4),), {"shape": (2, 3, 2, 2)}, lambda t, x: x.reshape(2, 3, 2, 2), (0,)),
        Sample((f32(),), {"shape": (1, 1)}, lambda t, x: x.reshape(1, 1), (0,)),
        Sample((i64(6),), {"shape": (3, 2)}, lambda t, x: x.reshape(3, 2)),
    ],
    view=True,
)


def _transpose_rule(x: TensorType, *, permutation: tuple[int, ...]) -> TensorType:
    axes = tuple(range(len(x.shape)))
    require(tuple(sorted(permutation)) == axes, f"{permutation} is not a permutation of the axes of {x}")
    return TensorType(tuple(x.shape[axis] for axis in permutation), x.dtype)


def _transpose_gradient(b: Builder, node: Node, ct: Value) -> Value:
    inverse = tuple(int(axis) for axis in np.argsort(node.attrs["permutation"]))
    return b("transpose", ct, permutation=inverse)


define(
    "transpose",
    type_rule=_transpose_rule,
    reference=lambda x, *, permutation: np.ascontiguousarray(x.transpose(permutation)),
    vjp=unary_vjp(_transpose_gradient),
    samples=[
        Sample((f32(3, 4),), {"permutation": (1, 0)}, lambda t, x: x.permute(1, 0), (0,)),
        Sample((f32(2, 3, 4, 5),), {"permutation": (0, 3, 1, 2)}, lambda t, x: x.permute(0, 3, 1, 2), (0,)),
        Sample((f32(2, 3, 4),), {"permutation": (2, 0, 1)}, lambda t, x: x.permute(2, 0, 1), (0,)),
        Sample((f32(2, 3, 4, 5),), {"permutation": (0, 2, 1, 3)}, lambda t, x: x.permute(0, 2, 1, 3), (0,)),
        Sample((i64(2, 3),), {"permutation": (1, 0)}, lambda t, x: x.permute(1, 0)),
    ],
)


# slice


def _slice_rule(x: TensorType, *, axis: int, start: int, stop: int, step: int = 1) -> TensorType:
    require_axis(axis, len(x.shape))
    size = x.shape[axis]
    require(0 <= start < stop <= size, f"the range {start}:{stop} is empty or outside axis {axis} of {x}")
    require(step > 0, f"the step must be positive, not {step}")
    return TensorType(_replaced(x.shape, axis, len(range(start, stop, step))), x.dtype)


def _index(rank: int, axis: int, selection: slice) -> tuple[slice, ...]:
    return tuple(selection if i == axis else slice(None) for i in range(rank))


def _slice(x: Array, *, axis: int, start: int, stop: int, step: int = 1) -> Array:
    return np.ascontiguousarray(x[_index(x.ndim, axis, slice(start, stop, step))])


def _slice_gradient(b: Builder, node: Node, ct: Value) -> Value:
    axis, start, step = (node.attrs[name] for name in ("axis", "start", "step"))
    return b("slice_grad", ct, axis=axis, start=start, step=step, size=node.inputs[0].type.shape[axis])


define(
    "slice",
    type_rule=_slice_rule,
    reference=_slice,
    vjp=unary_vjp(_slice_gradient),
    samples=[
        Sample((f32(5, 3),), {"axis": 0, "start": 1, "stop": 4}, lambda t, x: x[1:4], (0,)),
        Sample((f32(2, 7, 3),), {"axis": 1, "start": 1, "stop": 7, "step": 2}, lambda t, x: x[:, 1:7:2], (0,)),
        Sample((f32(2, 8),), {"axis": 1, "start": 0, "stop": 8, "step": 3}, lambda t, x: x[:, ::3], (0,)),
        Sample((i64(6),), {"axis": 0, "start": 2, "stop": 3}, lambda t, x: x[2:3]),
    ],
)


def _slice_grad_rule(ct: TensorType, *, axis: int, start: int, step: int, size: int) -> TensorType:
    require_dtype("ct", ct, "f32")
    require_axis(axis, len(ct.shape))
    last = start + (ct.shape[axis] - 1) * step
    require(start >= 0 and step > 0 and last < size, f"the slice ends at {last}, outside an axis of size {size}")
    return TensorType(_replaced(ct.shape, axis, size), ct.dtype)


def _slice_grad(ct: Array, *, axis: int, start: int, step: int, size: int) -> Array:
    result = np.zeros(_replaced(ct.shape, axis, size), ct.dtype)
    stop = start + (ct.shape[axis] - 1) * step + 1
    result[_index(ct.ndim, axis, slice(start, stop, step))] = ct
    return result


define(
    "slice_grad",
    type_rule=_slice_grad_rule,
    reference=_slice_grad,
    samples=[
        Sample(
            (f32(3, 4),),
            {"axis": 0, "start": 1, "step": 1, "size": 5},
            lambda t, ct: t.nn.functional.pad(ct, (0, 0, 1, 1)),
        ),
        Sample(
            (f32(2, 3, 3),),
            {"axis": 1, "start": 1, "step": 2, "size": 7},
            lambda t, ct: t.zeros(2, 7, 3, dtype=ct.dtype).index_copy(1, t.tensor([1, 3, 5]), ct),
        ),
    ],
)


# insert: what fills a tensor part by part; the lowering alone makes it, after differentiation


def _insert_rule(base: TensorType, part: TensorType, *, axis: int, start: int) -> TensorType:
    require_axis(axis, len(base.shape))
    fits = part.dtype == base.dtype and len(part.shape) == len(base.shape)
    fits = fits and _replaced(part.shape, axis, 1) == _replaced(base.shape, axis, 1)
    require(fits, f"{part} and {base} do not line up along axis {axis}")
    stop = start + part.shape[axis]
    require(start >= 0 and stop <= base.shape[axis], f"the range {start}:{stop} is outside axis {axis} of {base}")
    return base


def _insert(base: Array, part: Array, *, axis: int, start: int) -> Array:
    result = base.copy()
    result[_index(base.ndim, axis, slice(start, start + part.shape[axis]))] = part
    return result


def _torch_insert(torch: Any, base: Any, part: Any, axis: int, start: int) -> Any:
    return base.index_copy(axis, torch.arange(start, start + part.shape[axis]), part)


define(
    "insert",
    type_rule=_insert_rule,
    reference=_insert,
    samples=[
        Sample((f32(5, 3), f32(2, 3)), {"axis": 0, "start": 1}, partial(_torch_insert, axis=0, start=1)),
        Sample((f32(2, 5, 3), f32(2, 2, 3)), {"axis": 1, "start": 3}, partial(_torch_insert, axis=1, start=3)),
        Sample((i64(4), i64(4)), {"axis": 0, "start": 0}, partial(_torch_insert, axis=0, start=0)),
        Sample((boolean(3, 2), boolean(1, 2)), {"axis": 0, "start": 2}, partial(_torch_insert, axis=0, start=2)),
    ],
    in_place=(0,),
)


# concat


def _concat_rule(*xs: TensorType, axis: int) -> TensorType:
    require(len(xs) > 0, "there is nothing to concatenate")
    first = xs[0]
    require_axis(axis, len(first.shape))
    for x in xs:
        fits = x.dtype == first.dtype and len(x.shape) == len(first.shape)
        fits = fits and _replaced(x.shape, axis, 1) == _replaced(first.shape, axis, 1)
        require(fits, f"{x} and {first} do not line up along axis {axis}")
    return TensorType(_replaced(first.shape, axis, sum(x.shape[axis] for x in xs)), first.dtype)


def _concat_vjp(builder: Builder, node: Node, cotangents: Cotangents, need: Need) -> Gradients:
    ct = cotangent_of(node, cotangents)
    axis = node.attrs["axis"]
    gradients: list[Value | None] = []
    start = 0
    for i, x in enumerate(node.inputs):
        stop = start + x.type.shape[axis]
        gradients.append(builder("slice", ct, axis=axis, start=start, stop=stop) if i in need else None)
        start = stop
    return gradients


define(
    "concat",
    type_rule=_concat_rule,
    reference=lambda *xs, axis: np.concatenate(xs, axis),
    vjp=_concat_vjp,
    samples=[
        Sample((f32(2, 3), f32(4, 3)), {"axis": 0}, lambda t, *xs: t.cat(xs, 0), (0, 1)),
        Sample((f32(2, 3, 4), f32(2, 1, 4), f32(2, 2, 4)), {"axis": 1}, lambda t, *xs: t.cat(xs, 1), (0, 1, 2)),
        Sample((f32(2, 3), f32(2, 5)), {"axis": 1}, lambda t, *xs: t.cat(xs, 1), (0, 1)),
        Sample((f32(3),), {"axis": 0}, lambda t, *xs: t.cat(xs, 0), (0,)),
        Sample((boolean(2), boolean(3)), {"axis": 0}, lambda t, *xs: t.cat(xs, 0)),
    ],
)


# expand


def _expand_rule(x: TensorType, *, shape: tuple[int, ...]) -> TensorType:
    _require_shape(shape)
    tail = shape[len(shape) - len(x.shape) :]
    fits = len(shape) >= len(x.shape) and all(a in (1, b) for a, b in zip(x.shape, tail, strict=True))
    require(fits, f"{x} does not broadcast to shape {list(shape)}")
    return TensorType(shape, x.dtype)


define(
    "expand",
    type_rule=_expand_rule,
    reference=lambda x, *, shape: np.ascontiguousarray(np.broadcast_to(x, shape)),
    vjp=unary_vjp(lambda b, node, ct: unbroadcast(b, ct, node.inputs[0].type.shape)),
    samples=[
        Sample((f32(3, 1),), {"shape": (2, 3, 4)}, lambda t, x: x.expand(2, 3, 4), (0,)),
        Sample((f32(),), {"shape": (5,)}, lambda t, x: x.expand(5), (0,)),
        Sample((f32(1, 4),), {"shape": (3, 4)}, lambda t, x: x.expand(3, 4), (0,)),
        Sample((f32(2, 2),), {"shape": (2, 2)}, lambda t, x: x.clone(), (0,)),
        Sample((i64(1, 3),), {"shape": (2, 3)}, lambda t, x: x.expand(2, 3)),
    ],
)


# pad


def _pad_rule(x: TensorType, *, before: tuple[int, ...], after: tuple[int, ...], value: float = 0.0) -> TensorType:
    require_dtype("x", x, "f32")
    require(len(before) == len(after) == len(x.shape), f"pad needs one amount per axis of {x} on each side")
    require(min((*before, *after), default=0) >= 0, f"the amounts {before} and {after} must not be negative")
    return f32(*(low + size + high for low, size, high in zip(before, x.shape, after, strict=True)))


def _pad(x: Array, *, before: tuple[int, ...], after: tuple[int, ...], value: float = 0.0) -> Array:
    return np.pad(x, tuple(zip(before, after, strict=True)), constant_values=value) if x.ndim else x


def _pad_gradient(b: Builder, node: Node, ct: Value) -> Value:
    shape = node.inputs[0].type.shape
    for axis, (start, size) in enumerate(zip(node.attrs["before"], shape, strict=True)):
        if ct.type.shape[axis] != size:
            ct = b("slice", ct, axis=axis, start=start, stop=start + size)
    return ct


define(
    "pad",
    type_rule=_pad_rule,
    reference=_pad,
    vjp=unary_vjp(_pad_gradient),
    samples=[
        Sample(
            (f32(2, 3),),
            {"before": (0, 1), "after": (2, 0)},
            lambda t, x: t.nn.functional.pad(x, (1, 0, 0, 2)),
            (0,),
        ),
        Sample(
            (f32(1, 3, 3, 2),),
            {"before": (0, 0, 1, 0), "after": (0, 1, 1, 0), "value": -1.5},
            lambda t, x: t.nn.functional.pad(x, (0, 0, 1, 1, 0, 1), value=-1.5),
            (0,),
        ),
    ],
)


# take: indices are known at build time, and differ from each other in no particular way


def _take_rule(x: TensorType, indices: TensorType, *, axis: int) -> TensorType:
    require_axis(axis, len(x.shape))
    require(indices.dtype == "i32" and len(indices.shape) == 1, f"the indices must be i32[k], not {indices}")
    return TensorType(_replaced(x.shape, axis, indices.shape[0]), x.dtype)


def _take_gradient(b: Builder, node: Node, ct: Value) -> Value:
    x, indices = node.inputs
    axis = node.attrs["axis"]
    return b("take_grad", ct, indices, axis=axis, size=x.type.shape[axis])


def _indices(*values: int) -> Array:
    return np.array(values, np.int32)


define(
    "take",
    type_rule=_take_rule,
    reference=lambda x, indices, *, axis: np.take(x, indices, axis),
    vjp=unary_vjp(_take_gradient),
    samples=[
        Sample((f32(5, 3), _indices(4, 0, 2)), {"axis": 0}, lambda t, x, i: x.index_select(0, i), (0,)),
        Sample((f32(2, 3, 6), _indices(1, 1, 5, 0)), {"axis": 2}, lambda t, x, i: x.index_select(2, i), (0,)),
        Sample((f32(2, 4, 3), _indices(3)), {"axis": 1}, lambda t, x, i: x.index_select(1, i), (0,)),
        Sample((i64(4), _indices(3, 2)), {"axis": 0}, lambda t, x, i: x.index_select(0, i)),
    ],
    saves="the indices",
)


def _take_grad_rule(ct: TensorType, indices: TensorType, *, axis: int, size: int) -> TensorType:
    require_dtype("ct", ct, "f32")
    require_axis(axis, len(ct.shape))
    expected = TensorType((ct.shape[axis],), "i32")
    require(indices == expected, f"the indices must be {expected}, not {indices}")
    require(size > 0, f"the size must be positive, not {size}")
    return TensorType(_replaced(ct.shape, axis, size), ct.dtype)


def _take_grad(ct: Array, indices: Array, *, axis: int, size: int) -> Array:
    result = np.zeros(_replaced(ct.shape, axis, size), ct.dtype)
    np.add.at(np.moveaxis(result, axis, 0), indices, np.moveaxis(ct, axis, 0))
    return result


define(
    "take_grad",
    type_rule=_take_grad_rule,
    reference=_take_grad,
    samples=[
        Sample(
            (f32(3, 2), _indices(4, 0, 4)),
            {"axis": 0, "size": 5},
            lambda t, ct, i: t.zeros(5, 2, dtype=ct.dtype).index_add(0, i, ct),
        ),
        Sample(
            (f32(2, 3, 4), _indices(1, 1, 5, 0)),
            {"axis": 2, "size": 6},
            lambda t, ct, i: t.zeros(2, 3, 6, dtype=ct.dtype).index_add(2, i, ct),
        ),
    ],
)

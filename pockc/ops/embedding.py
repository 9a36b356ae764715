"""Rows of a table by index."""

from __future__ import annotations

import numpy as np

from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import f32, require, require_dtype, require_type, require_weight, unary_vjp


def _embedding_rule(weight: TensorType, ids: TensorType, *, padding_index: int = -1) -> TensorType:
    require_weight("the weight", weight)
    require(len(weight.shape) == 2, f"the weight must be f32[V,D], not {weight}")
    require_dtype("the ids", ids, "i64")
    _require_padding_index(padding_index, weight.shape[0])
    return f32(*ids.shape, weight.shape[1])


def _require_padding_index(padding_index: int, rows: int) -> None:
    require(-1 <= padding_index < rows, f"padding index {padding_index} is outside a table of {rows} rows")


def _embedding(weight: Array, ids: Array, *, padding_index: int = -1) -> Array:
    if np.any((ids < 0) | (ids >= len(weight))):
        raise IndexError(f"an id lies outside the {len(weight)} rows of the table")
    return weight[ids]


def _embedding_gradient(b: Builder, node: Node, ct: Value) -> Value:
    weight, ids = node.inputs
    return b("embedding_grad", ct, ids, rows=weight.type.shape[0], **node.attrs)


_IDS = np.array([[1, 0, 4], [4, 4, 2]])

define(
    "embedding",
    type_rule=_embedding_rule,
    reference=_embedding,
    vjp=unary_vjp(_embedding_gradient),
    samples=[
        Sample((f32(5, 3), _IDS), {}, lambda t, w, i: t.nn.functional.embedding(i, w), (0,)),
        Sample((f32(7, 1), _IDS[0]), {}, lambda t, w, i: t.nn.functional.embedding(i, w), (0,)),
        Sample((f32(5, 4), np.array(3)), {}, lambda t, w, i: t.nn.functional.embedding(i, w), (0,)),
        # With a padding index the gradient is not the derivative, on purpose: embedding_grad is checked instead.
        Sample((f32(5, 3), _IDS), {"padding_index": 4}, lambda t, w, i: t.nn.functional.embedding(i, w, 4)),
    ],
    saves="ids",
    weight=0,
)


def _embedding_grad_rule(
    ct: TensorType, ids: TensorType, base: TensorType | None = None, *, rows: int, padding_index: int = -1
) -> TensorType:
    require_dtype("ct", ct, "f32")
    require_dtype("the ids", ids, "i64")
    require(ct.shape[:-1] == ids.shape and len(ct.shape) > 0, f"{ct} is not a row for each of {ids}")
    require(rows > 0, f"the table must have rows, not {rows}")
    _require_padding_index(padding_index, rows)
    if base is not None:
        require_type("base", base, f32(rows, ct.shape[-1]))
    return f32(rows, ct.shape[-1])


# With ``base``, what is already known of the table's gradient: the sum, without a second table.
def _embedding_grad(ct: Array, ids: Array, base: Array | None = None, *, rows: int, padding_index: int = -1) -> Array:
    gradient = np.zeros((rows, ct.shape[-1]), ct.dtype) if base is None else base.copy()
    counted = ids != padding_index
    np.add.at(gradient, ids[counted], ct[counted])
    return gradient


define(
    "embedding_grad",
    type_rule=_embedding_grad_rule,
    reference=_embedding_grad,
    samples=[
        Sample(
            (f32(2, 3, 4), _IDS),
            {"rows": 5, "padding_index": padding},
            lambda t, ct, i, p=padding: t.ops.aten.embedding_dense_backward(ct, i, 5, p, False),
        )
        for padding in (-1, 4, 0)
    ]
    + [
        Sample(
            (f32(2, 3, 4), _IDS, f32(5, 4)),
            {"rows": 5, "padding_index": padding},
            lambda t, ct, i, x, p=padding: x + t.ops.aten.embedding_dense_backward(ct, i, 5, p, False),
        )
        for padding in (-1, 4)
    ],
    in_place=(2,),
)

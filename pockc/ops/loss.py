"""Losses that are ops of their own; the others are compositions."""

from __future__ import annotations

from typing import Any

import numpy as np

from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import f32, i64, require, require_dtype, require_type, torch_gradient, unary_vjp
from pockc.ops.softmax import log_softmax


def _require_logits(logits: TensorType, labels: TensorType) -> None:
    require_dtype("logits", logits, "f32")
    require(len(logits.shape) == 2, f"logits must be f32[N,C], not {logits}")
    require_type("labels", labels, TensorType(logits.shape[:1], "i64"))


def _cross_entropy_rule(
    logits: TensorType,
    labels: TensorType,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    first_row: int = -1,
) -> TensorType:
    if first_row < 0:
        _require_logits(logits, labels)
    else:
        require_dtype("logits", logits, "f32")
        require(len(logits.shape) == 2, f"logits must be f32[N,C], not {logits}")
        require(labels.dtype == "i64" and len(labels.shape) == 1, f"the labels must be i64[N], not {labels}")
        last = first_row + logits.shape[0]
        require(last <= labels.shape[0], f"{labels} has no labels for rows {first_row} to {last}")
    require(0 <= label_smoothing <= 1, f"label smoothing must lie in [0, 1], not {label_smoothing}")
    return f32()


def valid_labels(labels: Array, classes: int, ignore_index: int) -> tuple[Array, Array]:
    """Which rows count, and the labels with 0 in the rows that do not; IndexError for a label outside the classes."""
    valid = labels != ignore_index
    known = np.where(valid, labels, 0)
    if np.any((known < 0) | (known >= classes)):
        raise IndexError(f"a label lies outside the {classes} classes")
    return valid, known


# With p = softmax(logits), s the smoothing and one row's label l:
# loss = -(1 - s) log p_l - s / C sum_c log p_c, averaged over the rows that count.
# From `first_row` 0 on, logits are the rows from there on of a batch all of whose labels are given: the result is then
# their share of the mean over all labels, and the shares of all parts of the batch add up to it.
def _cross_entropy(
    logits: Array, labels: Array, *, ignore_index: int = -100, label_smoothing: float = 0.0, first_row: int = -1
) -> Array:
    all_valid, all_known = valid_labels(labels, logits.shape[1], ignore_index)
    rows = slice(max(0, first_row), max(0, first_row) + len(logits))
    valid, known = all_valid[rows], all_known[rows]
    log_p = log_softmax(logits)
    loss = -np.take_along_axis(log_p, known[:, None], 1)[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(1)
    with np.errstate(invalid="ignore"):  # no row counts: nan, as in torch
        return np.asarray(np.divide(loss[valid].sum(), all_valid.sum(), dtype=logits.dtype))


def _cross_entropy_gradient(b: Builder, node: Node, ct: Value) -> Value:
    return b("cross_entropy_grad", ct, *node.inputs, **node.attrs)


_LABELS = np.array([1, 0, 4, 2])
_SOME_IGNORED = np.array([1, -100, 4, -100])
_PADDED = np.array([0, 3, 0, 2])
_CASES: tuple[tuple[TensorType, Array, dict[str, Any]], ...] = (
    (f32(4, 5), _LABELS, {}),
    (f32(4, 5), _SOME_IGNORED, {}),
    (f32(4, 5), _PADDED, {"ignore_index": 0}),
    (f32(4, 5), _SOME_IGNORED, {"label_smoothing": 0.1}),
    (f32(4, 1), np.zeros(4, np.int64), {}),
    (f32(4, 1003), _LABELS, {"label_smoothing": 0.2}),
)

_PART_CASES: tuple[tuple[TensorType, Array, dict[str, Any]], ...] = (
    (f32(2, 5), _LABELS, {"first_row": 2}),
    (f32(1, 5), _SOME_IGNORED, {"first_row": 1}),
    (f32(3, 5), _SOME_IGNORED, {"first_row": 0, "label_smoothing": 0.1}),
)


def _torch_part(t: Any, x: Any, y: Any, attrs: dict[str, Any]) -> Any:
    """The share that some rows have in the mean over all labels."""
    options = {name: value for name, value in attrs.items() if name != "first_row"}
    first = max(0, attrs["first_row"])
    losses = t.nn.functional.cross_entropy(x, y[first : first + len(x)], reduction="sum", **options)
    return losses / (y != attrs.get("ignore_index", -100)).sum()


define(
    "cross_entropy",
    type_rule=_cross_entropy_rule,
    reference=_cross_entropy,
    vjp=unary_vjp(_cross_entropy_gradient),
    samples=[
        *(Sample((x, y), a, lambda t, x, y, a=a: t.nn.functional.cross_entropy(x, y, **a), (0,)) for x, y, a in _CASES),
        *(Sample((x, y), a, lambda t, x, y, a=a: _torch_part(t, x, y, a), (0,)) for x, y, a in _PART_CASES),
    ],
    saves="logits, labels",
)


def _cross_entropy_grad_rule(
    ct: TensorType,
    logits: TensorType,
    labels: TensorType,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    first_row: int = -1,
) -> TensorType:
    require_type("ct", ct, f32())
    _cross_entropy_rule(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, first_row=first_row)
    return logits


# d log p_k / d logits_c = [k = c] - p_c. The weights (1 - s) and s / C of the C + 1 logarithms sum to 1, hence
# dloss/dlogits_c = p_c - (1 - s) [c = l] - s / C, over the count; rows that do not count get zero.
def _cross_entropy_grad(
    ct: Array,
    logits: Array,
    labels: Array,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    first_row: int = -1,
) -> Array:
    rows, classes = logits.shape
    all_valid, all_known = valid_labels(labels, classes, ignore_index)
    part = slice(max(0, first_row), max(0, first_row) + rows)
    valid, known = all_valid[part], all_known[part]
    gradient = np.exp(log_softmax(logits)) - label_smoothing / classes
    gradient[np.arange(rows), known] -= 1 - label_smoothing
    scale = ct / max(1, int(all_valid.sum()))
    return np.asarray(np.where(valid[:, None], gradient * scale, np.zeros_like(gradient)))


define(
    "cross_entropy_grad",
    type_rule=_cross_entropy_grad_rule,
    reference=_cross_entropy_grad,
    samples=[
        Sample(
            (f32(), x, y),
            a,
            torch_gradient(lambda t, x, y, a=a: _torch_part(t, x, y, {"first_row": 0, **a}), 0),
        )
        for x, y, a in (*_CASES, *_PART_CASES)
    ],
    in_place=(1,),
)


def _count_correct_rule(
    logits: TensorType, labels: TensorType, *, samples: int, ignore_index: int = -100
) -> tuple[TensorType, TensorType]:
    _require_logits(logits, labels)
    return counts_of_samples(labels, samples)


def counts_of_samples(labels: TensorType, samples: int) -> tuple[TensorType, TensorType]:
    """The types of what is counted for each sample, to which equally many rows belong."""
    require(samples > 0 and labels.shape[0] % samples == 0, f"{labels} are not the labels of {samples} samples")
    return i64(samples), i64(samples)


def hits_of_samples(best: Array, labels: Array, samples: int, ignore_index: int) -> tuple[Array, Array]:
    """How many rows of each sample are labelled with their best class, and how many have a label."""
    counted = (labels != ignore_index).reshape(samples, -1)
    hits = (best == labels).reshape(samples, -1) & counted
    return hits.sum(1, dtype=np.int64), counted.sum(1, dtype=np.int64)


# Per sample, as the last batch of a data set may be filled up with samples that do not count.
def _count_correct(logits: Array, labels: Array, *, samples: int, ignore_index: int = -100) -> tuple[Array, Array]:
    return hits_of_samples(logits.argmax(1), labels, samples, ignore_index)


def _torch_count(t: Any, x: Any, y: Any, samples: int, ignore_index: int) -> Any:
    counted = (y != ignore_index).reshape(samples, -1)
    return ((x.argmax(1) == y).reshape(samples, -1) & counted).sum(1), counted.sum(1)


define(
    "count_correct",
    type_rule=_count_correct_rule,
    reference=_count_correct,
    samples=[
        Sample(
            (f32(50, 3), np.arange(50) % 3),
            {"samples": samples, "ignore_index": ignore},
            lambda t, x, y, s=samples, i=ignore: _torch_count(t, x, y, s, i),
        )
        for samples, ignore in ((1, -100), (10, 0), (50, 2))
    ],
)

"""Cross entropy over tiles of the classes, so that the logits of all classes never exist together.

A tile holds the logits of classes ``[start, start + width)`` for every row. What is known of a row after some tiles
are five numbers, ``running`` f32[N,5]: the largest logit m, the sum of e^(logit - m), the label's logit (0 before its
tile), the sum of the logits, and the class of the first largest logit, exact below 2^24 classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pockc.ir import Array, TensorType
from pockc.ops import Sample, define
from pockc.ops.common import f32, require, require_dtype, require_type
from pockc.ops.loss import counts_of_samples, hits_of_samples, valid_labels

MOST_CLASSES = 1 << 24
_MOST, _SUM, _LABEL, _TOTAL, _BEST = range(5)
STATISTICS = 5


def _require_tile(logits: TensorType, labels: TensorType, running: TensorType | None, start: int, classes: int) -> None:
    require_dtype("logits", logits, "f32")
    require(len(logits.shape) == 2, f"logits must be f32[N,width], not {logits}")
    require(
        start >= 0 and start + logits.shape[1] <= min(classes, MOST_CLASSES),
        f"classes {start} to {start + logits.shape[1]} are not all among {classes}",
    )
    require_type("labels", labels, TensorType(logits.shape[:1], "i64"))
    if running is not None:
        require_type("running", running, f32(logits.shape[0], STATISTICS))


def _tile_rule(
    logits: TensorType,
    labels: TensorType,
    running: TensorType | None = None,
    *,
    start: int,
    ignore_index: int = -100,
) -> TensorType:
    _require_tile(logits, labels, running, start, MOST_CLASSES)
    return f32(logits.shape[0], STATISTICS)


def _tile(logits: Array, labels: Array, running: Array | None = None, *, start: int, ignore_index: int = -100) -> Array:
    rows, width = logits.shape
    if running is None:
        running = np.zeros((rows, STATISTICS), logits.dtype)
        running[:, _MOST] = -np.inf
    old = running[:, _MOST]
    most = np.maximum(old, logits.max(1))
    shift = np.where(np.isneginf(most), 0, most)  # of a row of -inf alone the sum is 0, not nan
    inside = (labels != ignore_index) & (labels >= start) & (labels < start + width)
    position = np.where(inside, labels - start, 0)
    found = np.empty_like(running)
    found[:, _MOST] = most
    found[:, _SUM] = running[:, _SUM] * np.exp(old - shift) + np.exp(logits - shift[:, None]).sum(1)
    found[:, _LABEL] = np.where(inside, logits[np.arange(rows), position], running[:, _LABEL])
    found[:, _TOTAL] = running[:, _TOTAL] + logits.sum(1)
    found[:, _BEST] = np.where(most > old, start + logits.argmax(1), running[:, _BEST])
    return found


def _require_running(running: TensorType, labels: TensorType) -> None:
    require(len(labels.shape) == 1, f"the labels must be i64[N], not {labels}")
    require_type("labels", labels, TensorType(labels.shape, "i64"))
    require_type("running", running, f32(labels.shape[0], STATISTICS))


def _of_tiles_rule(
    running: TensorType, labels: TensorType, *, classes: int, ignore_index: int = -100, label_smoothing: float = 0.0
) -> TensorType:
    _require_running(running, labels)
    require(0 < classes <= MOST_CLASSES, f"there must be 1 to {MOST_CLASSES} classes, not {classes}")
    require(0 <= label_smoothing <= 1, f"label smoothing must lie in [0, 1], not {label_smoothing}")
    return f32()


# With L = log sum e^logit, -log p_l = L - logit_l, and the mean of -log p_c over the classes is L - mean logit.
def _of_tiles(
    running: Array, labels: Array, *, classes: int, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Array:
    valid, _ = valid_labels(labels, classes, ignore_index)
    log_sum = running[:, _MOST] + np.log(running[:, _SUM])
    loss = log_sum - running[:, _LABEL]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_sum - running[:, _TOTAL] / classes)
    with np.errstate(invalid="ignore"):  # no row counts: nan, as in torch
        return np.asarray(np.divide(loss[valid].sum(), valid.sum(), dtype=running.dtype))


def _grad_tile_rule(
    ct: TensorType,
    logits: TensorType,
    labels: TensorType,
    running: TensorType,
    *,
    start: int,
    classes: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> TensorType:
    require_type("ct", ct, f32())
    _require_tile(logits, labels, running, start, classes)
    _of_tiles_rule(running, labels, classes=classes, ignore_index=ignore_index, label_smoothing=label_smoothing)
    return logits


# The columns of the tile of cross_entropy_grad, where ``running`` is what all tiles gave.
def _grad_tile(
    ct: Array,
    logits: Array,
    labels: Array,
    running: Array,
    *,
    start: int,
    classes: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Array:
    valid, known = valid_labels(labels, classes, ignore_index)
    gradient = np.exp(logits - running[:, [_MOST]]) / running[:, [_SUM]] - label_smoothing / classes
    is_label = known[:, None] == start + np.arange(logits.shape[1])
    gradient -= np.where(is_label, np.asarray(1 - label_smoothing, gradient.dtype), 0)
    scale = ct / max(1, int(valid.sum()))
    return np.asarray(np.where(valid[:, None], gradient * scale, np.zeros_like(gradient)))


def _hits_rule(
    running: TensorType, labels: TensorType, *, samples: int, ignore_index: int = -100
) -> tuple[TensorType, TensorType]:
    _require_running(running, labels)
    return counts_of_samples(labels, samples)


def _hits(running: Array, labels: Array, *, samples: int, ignore_index: int = -100) -> tuple[Array, Array]:
    return hits_of_samples(running[:, _BEST].astype(np.int64), labels, samples, ignore_index)


# Samples

_ROWS, _WIDTHS = 6, (7, 1, 19, 16)
_CLASSES = sum(_WIDTHS)
_LABELS = np.array([0, 6, 7, 42, -100, 20])
_PADDED = np.array([3, 6, 7, 42, 0, 20])
_LOGITS = np.random.default_rng(5).uniform(-3, 3, (_ROWS, _CLASSES)).astype(np.float32)
_STARTS = [sum(_WIDTHS[:i]) for i in range(len(_WIDTHS))]


def _after(tiles: int, labels: Array = _LABELS) -> Array:
    """What is known of the sample rows after some tiles."""
    running = None
    for start, width in list(zip(_STARTS, _WIDTHS, strict=True))[:tiles]:
        running = _tile(_LOGITS[:, start : start + width], labels, running, start=start)
    assert running is not None, "the samples have at least one tile"
    return running


_LOSSES: tuple[tuple[Array, Mapping[str, Any]], ...] = (
    (_LABELS, {}),
    (_PADDED, {"ignore_index": 0}),
    (_LABELS, {"label_smoothing": 0.2}),
)


def _columns(tile: int) -> Array:
    return _LOGITS[:, _STARTS[tile] : _STARTS[tile] + _WIDTHS[tile]]


def _torch_statistics(t: Any, labels: Any, tiles: int, ignore_index: int = -100) -> Any:
    """The same from the logits of all classes so far."""
    stop = sum(_WIDTHS[:tiles])
    x = t.tensor(_LOGITS[:, :stop])
    inside = (labels != ignore_index) & (labels >= 0) & (labels < stop)
    label = t.where(inside, x.gather(1, labels.where(inside, 0)[:, None])[:, 0], 0)
    most, best = x.max(1)
    return t.stack([most, (x - most[:, None]).exp().sum(1), label, x.sum(1), best.float()], 1)


def _torch_tile_gradient(t: Any, ct: Any, labels: Any, tile: int, attrs: Mapping[str, float]) -> Any:
    x = t.tensor(_LOGITS, requires_grad=True)
    loss = t.nn.functional.cross_entropy(x, labels, **attrs)
    columns = slice(_STARTS[tile], _STARTS[tile] + _WIDTHS[tile])
    return t.autograd.grad(loss, x, ct)[0][:, columns]


def _torch_hits(labels: Any, samples: int, ignore_index: int) -> Any:
    counted = (labels != ignore_index).reshape(samples, -1)
    hits = (labels == labels.new_tensor(_LOGITS.argmax(1))).reshape(samples, -1) & counted
    return hits.sum(1), counted.sum(1)


define(
    "cross_entropy_tile",
    type_rule=_tile_rule,
    reference=_tile,
    samples=[
        Sample((_columns(0), _LABELS), {"start": 0}, lambda t, x, y: _torch_statistics(t, y, 1)),
        Sample((_columns(0), _PADDED), {"start": 0, "ignore_index": 0}, lambda t, x, y: _torch_statistics(t, y, 1, 0)),
        *(
            Sample(
                (_columns(tile), _LABELS, _after(tile)),
                {"start": _STARTS[tile]},
                lambda t, x, y, r, n=tile + 1: _torch_statistics(t, y, n),
            )
            for tile in range(1, len(_WIDTHS))
        ),
        Sample((f32(67, 300), np.arange(67) * 5), {"start": 0}),
    ],
    in_place=(2,),
)

define(
    "cross_entropy_of_tiles",
    type_rule=_of_tiles_rule,
    reference=_of_tiles,
    samples=[
        Sample(
            (_after(len(_WIDTHS), labels), labels),
            {**attrs, "classes": _CLASSES},
            lambda t, r, y, a=attrs: t.nn.functional.cross_entropy(t.tensor(_LOGITS), y, **a),
        )
        for labels, attrs in _LOSSES
    ],
)

define(
    "cross_entropy_grad_tile",
    type_rule=_grad_tile_rule,
    reference=_grad_tile,
    samples=[
        Sample(
            (f32(), _columns(tile), labels, _after(len(_WIDTHS), labels)),
            {**attrs, "start": _STARTS[tile], "classes": _CLASSES},
            lambda t, ct, x, y, r, n=tile, a=attrs: _torch_tile_gradient(t, ct, y, n, a),
        )
        for tile in range(len(_WIDTHS))
        for labels, attrs in _LOSSES
    ],
    in_place=(1,),
)

define(
    "count_correct_of_tiles",
    type_rule=_hits_rule,
    reference=_hits,
    samples=[
        Sample(
            (_after(len(_WIDTHS)), _LOGITS.argmax(1) * np.array([1, 1, 0, 1, 1, 0])),
            {"samples": samples, "ignore_index": ignore},
            lambda t, r, y, s=samples, i=ignore: _torch_hits(y, s, i),
        )
        for samples, ignore in ((1, -100), (3, 0), (6, -100))
    ],
)

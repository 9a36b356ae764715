"""The named losses, built from ops: ``LOSSES[name](builder, prediction, labels, options) -> scalar loss``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pockc.errors import UserError
from pockc.ir import Builder, TensorType, Value

Options = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Loss:
    """A named loss: the type of its ``labels`` input for a prediction, and the graph it adds."""

    labels: Callable[[TensorType], TensorType]
    attach: Callable[[Builder, Value, Value, Options], Value]
    classifies: bool = False  # labels are class indices: accuracy can be counted


def _class_labels(prediction: TensorType) -> TensorType:
    if len(prediction.shape) < 2:
        raise UserError(f"cross entropy needs logits [..., classes], found {prediction}")
    return TensorType(prediction.shape[:-1], "i64")


def _same_labels(prediction: TensorType) -> TensorType:
    return prediction


def rows(builder: Builder, logits: Value, labels: Value) -> tuple[Value, Value]:
    """Logits [..., C] and labels [...] as a matrix [N, C] and a vector [N]."""
    classes = logits.type.shape[-1]
    count = logits.type.elements // classes
    if logits.type.shape != (count, classes):
        logits = builder("reshape", logits, shape=(count, classes))
    if labels.type.shape != (count,):
        labels = builder("reshape", labels, shape=(count,))
    return logits, labels


def next_tokens(builder: Builder, labels: Value, ignore_index: int) -> Value:
    """The label of each position's next token; the last position, which has none, is ignored.

    Shifting the labels and not the logits leaves the largest tensor of a language model, and its gradient, uncopied.
    """
    *leading, length = labels.type.shape
    if length < 2:
        raise UserError(f"causal_lm needs sequences of two tokens or more, found labels {labels.type}")
    following = builder("slice", labels, axis=len(leading), start=1, stop=length)
    none = builder.constant(np.full((*leading, 1), ignore_index), "i64", hint="no_label")
    return builder("concat", following, none, axis=len(leading))


def _cross_entropy(builder: Builder, logits: Value, labels: Value, options: Options) -> Value:
    logits, labels = rows(builder, logits, labels)
    return builder(
        "cross_entropy",
        logits,
        labels,
        ignore_index=int(options.get("ignore_index", -100)),
        label_smoothing=float(options.get("label_smoothing", 0.0)),
        hint="loss",
    )


def _causal_lm(builder: Builder, logits: Value, labels: Value, options: Options) -> Value:
    labels = next_tokens(builder, labels, int(options.get("ignore_index", -100)))
    return _cross_entropy(builder, logits, labels, options)


def _mean(builder: Builder, value: Value) -> Value:
    return builder("reduce_mean", value, axes=tuple(range(len(value.type.shape))), hint="loss")


def _bce_with_logits(builder: Builder, logits: Value, labels: Value, options: Options) -> Value:
    # -y log s(x) - (1-y) log(1-s(x)) = softplus(x) - x y, which neither overflows nor takes log(0).
    product = builder("mul", logits, labels)
    return _mean(builder, builder("sub", builder("softplus", logits), product))


def _mse(builder: Builder, prediction: Value, labels: Value, options: Options) -> Value:
    difference = builder("sub", prediction, labels)
    return _mean(builder, builder("mul", difference, difference))


def _l1(builder: Builder, prediction: Value, labels: Value, options: Options) -> Value:
    return _mean(builder, builder("abs", builder("sub", prediction, labels)))


def _huber(builder: Builder, prediction: Value, labels: Value, options: Options) -> Value:
    # With c = clip(d, -delta, delta): c (d - c/2) is d^2/2 inside and delta (|d| - delta/2) outside.
    delta = float(options.get("delta", 1.0))
    difference = builder("sub", prediction, labels)
    clipped = builder("clip", difference, low=-delta, high=delta)
    half = builder("mul", clipped, builder.constant(0.5))
    return _mean(builder, builder("mul", clipped, builder("sub", difference, half)))


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_class_labels, _cross_entropy, classifies=True),
    "causal_lm": Loss(_class_labels, _causal_lm, classifies=True),
    "bce_with_logits": Loss(_same_labels, _bce_with_logits),
    "mse": Loss(_same_labels, _mse),
    "l1": Loss(_same_labels, _l1),
    "huber": Loss(_same_labels, _huber),
}

"""Dropout and the losses that a model computes itself."""

from __future__ import annotations

import math

import numpy as np

from pockc.frontend.aten import Call, handles, refuse, refuse_unless, shape_of
from pockc.frontend.random import dropout
from pockc.ir import Value

_MEAN = 1  # ATen's numbers of the reductions: none 0, mean 1, sum 2


@handles("dropout.default", "native_dropout.default")
def _dropout(call: Call, x: Value, p: float, train: bool) -> Value | tuple[Value | None, ...]:
    y = dropout(call.builder, x, p) if train else x
    return (y, None) if len(call.results) > 1 else y


@handles("bernoulli.p")
def _bernoulli(call: Call, x: Value, p: float = 0.5) -> Value:
    """Ones with probability p, else zeros: what Dropout2d multiplies whole channels by."""
    ones = call.builder.constant(np.ones(shape_of(x)))
    return dropout(call.builder, ones, 1.0 - p, scale=1.0)


@handles("cross_entropy_loss.default")
def _cross_entropy(
    call: Call, x: Value, target: Value, weight: Value | None = None, reduction: int = _MEAN, ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Value:  # fmt: skip
    refuse_unless(weight is None, "cross_entropy with class weights", supported="cross_entropy without weights")
    if target.type.dtype == "f32":
        return _soft_cross_entropy(call, x, target, reduction, label_smoothing)
    refuse_unless(reduction == _MEAN, "cross_entropy with reduction 'sum' or 'none'", supported="reduction 'mean'")
    logits, labels = _classes_last(call, x, target)
    return call.builder(
        "cross_entropy", logits, labels, ignore_index=ignore_index, label_smoothing=float(label_smoothing)
    )


def _classes_last(call: Call, x: Value, target: Value) -> tuple[Value, Value]:
    """Logits [N, C, ...] as rows of classes, and their labels."""
    classes = shape_of(x)[1] if len(shape_of(x)) > 1 else shape_of(x)[0]
    rows = call.channels_last(x)
    count = x.type.elements // classes
    return call.reshape(rows, (count, classes)), call.reshape(call.cast(target, "i64"), (count,))


def _soft_cross_entropy(call: Call, x: Value, target: Value, reduction: int, smoothing: float) -> Value:
    """- sum of target * log_softmax over the classes, averaged over everything else."""
    b = call.builder
    refuse_unless(reduction == _MEAN, "cross_entropy with reduction 'sum' or 'none'", supported="reduction 'mean'")
    logits, wanted = call.channels_last(x), call.channels_last(target)
    classes = shape_of(logits)[-1]
    if smoothing:
        spread = b.constant(smoothing / classes)
        wanted = b("add", b("mul", wanted, b.constant(1.0 - smoothing)), spread)
    products = b("mul", wanted, b("log_softmax", logits))
    total = b("reduce_sum", products, axes=tuple(range(len(shape_of(products)))), keepdims=False)
    return b("mul", total, b.constant(-1.0 / (products.type.elements // classes)))


@handles("nll_loss_nd.default", "nll_loss_forward.default", "nll_loss2d_forward.default")
def _nll_loss(
    call: Call, x: Value, target: Value, weight: Value | None = None, reduction: int = _MEAN, ignore_index: int = -100
) -> Value | tuple[Value | None, ...]:
    """Log-probabilities are their own log_softmax, so that of a log_softmax this is the cross-entropy."""
    if not _is_log_softmax(call, x):
        raise refuse("nll_loss of something else than log_softmax", instead="Use cross_entropy on the logits.")
    loss = _cross_entropy(call, x, target, weight, reduction, ignore_index)
    return (loss, None) if len(call.results) > 1 else loss


def _is_log_softmax(call: Call, value: Value) -> bool:
    producers = {output: node for node in call.builder.nodes for output in node.outputs}
    while value in producers:
        node = producers[value]
        if node.op == "log_softmax":
            return True
        if node.op not in ("transpose", "reshape"):
            return False
        value = node.inputs[0]
    return False


@handles("binary_cross_entropy_with_logits.default")
def _bce_with_logits(
    call: Call, x: Value, target: Value, weight: Value | None = None, pos_weight: Value | None = None,
    reduction: int = _MEAN,
) -> Value:  # fmt: skip
    """softplus(x) - x*y; with a weight p of the positives, (1 - y) * x + (1 + (p - 1) * y) * softplus(-x)."""
    b = call.builder
    if pos_weight is None:
        loss = b("sub", b("softplus", x), b("mul", x, target))
    else:
        one = b.constant(1.0)
        positive = b("add", one, b("mul", b("sub", pos_weight, one), target))
        loss = b("add", b("mul", b("sub", one, target), x), b("mul", positive, b("softplus", b("neg", x))))
    if weight is not None:
        loss = b("mul", loss, weight)
    if reduction == 0:
        return loss
    op = "reduce_mean" if reduction == _MEAN else "reduce_sum"
    return b(op, loss, axes=tuple(range(len(shape_of(loss)))), keepdims=False)


@handles("binary_cross_entropy.default")
def _bce(call: Call, x: Value, target: Value, weight: Value | None = None, reduction: int = _MEAN) -> Value:
    """- y*log(x) - (1-y)*log(1-x), with logarithms cut off at -100 as in PyTorch."""
    b, one = call.builder, call.builder.constant(1.0)

    def safe_log(value: Value) -> Value:
        return b("clip", b("log", value), low=-100.0, high=math.inf)

    hit, miss = b("mul", target, safe_log(x)), b("mul", b("sub", one, target), safe_log(b("sub", one, x)))
    loss = b("neg", b("add", hit, miss))
    if weight is not None:
        loss = b("mul", loss, weight)
    if reduction == 0:
        return loss
    op = "reduce_mean" if reduction == _MEAN else "reduce_sum"
    return b(op, loss, axes=tuple(range(len(shape_of(loss)))), keepdims=False)

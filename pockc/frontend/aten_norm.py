"""Normalisation layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pockc.frontend.aten import Call, handles, refuse_unless, shape_of
from pockc.ir import Value

_FLOAT32_EPSILON = float(np.finfo(np.float32).eps)


@handles("_native_batch_norm_legit_no_training.default")
def _frozen_batch_norm(
    call: Call, x: Value, weight: Value | None, bias: Value | None, running_mean: Value, running_var: Value,
    momentum: float, eps: float,
) -> tuple[Value | None, ...]:  # fmt: skip
    """Computes x * scale + shift, with scale = gamma / sqrt(var + eps) and shift = beta - mean * scale."""
    b = call.builder
    scale = b("rsqrt", b("add", running_var, b.constant(eps)))
    if weight is not None:
        scale = b("mul", weight, scale)
    offset = b("mul", running_mean, scale)
    shift = b("neg", offset) if bias is None else b("sub", bias, offset)
    y = b("add", b("mul", call.channels_last(x), scale), shift)
    return call.channels_first(y), None, None


@handles("_native_batch_norm_legit_functional.default", "_native_batch_norm_legit.no_stats")
def _batch_norm(
    call: Call, x: Value, weight: Value | None, bias: Value | None, *statistics: Value | bool | float
) -> tuple[Value | None, ...]:
    """Batch statistics; returns the new running statistics too, where there are any."""
    b = call.builder
    momentum, eps = (float(number) for number in statistics[-2:])  # type: ignore[arg-type]  # the last two are numbers
    running = [value for value in statistics if isinstance(value, Value)]
    if not running and shape_of(x)[0] == 1 and len(shape_of(x)) > 2:
        return _instance_norm(call, x, weight, bias, eps)
    channels = (shape_of(x)[1],)
    gamma = weight if weight is not None else b.constant(np.ones(channels))
    beta = bias if bias is not None else b.constant(np.zeros(channels))
    y, mean, variance = b.multi("batch_norm", call.channels_last(x), gamma, beta, epsilon=eps)
    out = call.channels_first(y)
    if not running:
        return out, None, None
    count = x.type.elements // channels[0]
    refuse_unless(count > 1, "batch statistics of one element", instead="Use a larger batch, or freeze batch norm.")
    # Running variances are kept unbiased: n / (n - 1) times the variance that normalises the batch.
    factors = (momentum, momentum * count / (count - 1))
    updated = [
        b("add", b("mul", old, b.constant(1 - momentum)), b("mul", new, b.constant(factor)))
        for old, new, factor in zip(running, (mean, variance), factors, strict=True)
    ]
    return out, None, None, *updated


def _instance_norm(
    call: Call, x: Value, weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value | None, ...]:
    """One image, statistics of each channel alone: a layer norm over the pixels."""
    b = call.builder
    flat = call.reshape(x, (shape_of(x)[1], math.prod(shape_of(x)[2:])))
    y = call.reshape(b("layer_norm", flat, epsilon=eps), shape_of(x))
    return _channel_affine(call, y, weight, bias), None, None


def _channel_affine(call: Call, x: Value, weight: Value | None, bias: Value | None) -> Value:
    """Computes x * weight + bias with one number per channel, channels on axis 1."""
    broadcast = (-1, *[1] * (len(shape_of(x)) - 2))
    if weight is not None:
        x = call.builder("mul", x, call.reshape(weight, (shape_of(weight)[0], *broadcast[1:])))
    if bias is not None:
        x = call.builder("add", x, call.reshape(bias, (shape_of(bias)[0], *broadcast[1:])))
    return x


@handles("native_group_norm.default")
def _group_norm(
    call: Call, x: Value, weight: Value | None, bias: Value | None, batch: int, channels: int, pixels: int,
    groups: int, eps: float,
) -> tuple[Value | None, ...]:  # fmt: skip
    grouped = call.reshape(x, (batch * groups, channels // groups * pixels))
    y = call.reshape(call.builder("layer_norm", grouped, epsilon=float(eps)), shape_of(x))
    return _channel_affine(call, y, weight, bias), None, None


def _normalise(
    call: Call, op: str, x: Value, shape: Sequence[int], vectors: Sequence[Value | None], eps: float
) -> Value:
    """A norm over the last axes, which become one; the affine vectors go into the op where all are there."""
    width = math.prod(shape)
    flat = call.reshape(x, (*shape_of(x)[: len(shape_of(x)) - len(shape)], width))
    operands = [call.reshape(vector, (width,)) for vector in vectors if vector is not None]
    if len(operands) == len(vectors):
        return call.reshape(call.builder(op, flat, *operands, epsilon=eps), shape_of(x))
    y = call.builder(op, flat, epsilon=eps)
    for combine, vector in zip(("mul", "add"), vectors, strict=False):
        if vector is not None:
            y = call.builder(combine, y, call.reshape(vector, (width,)))
    return call.reshape(y, shape_of(x))


@handles("layer_norm.default")
def _layer_norm(
    call: Call, x: Value, normalized_shape: Sequence[int], weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Value:  # fmt: skip
    return _normalise(call, "layer_norm", x, normalized_shape, (weight, bias), float(eps))


@handles("native_layer_norm.default")
def _native_layer_norm(
    call: Call, x: Value, normalized_shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value | None, ...]:
    return _layer_norm(call, x, normalized_shape, weight, bias, eps), None, None


@handles("rms_norm.default")
def _rms_norm(
    call: Call, x: Value, normalized_shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    return _normalise(call, "rms_norm", x, normalized_shape, (weight,), _FLOAT32_EPSILON if eps is None else float(eps))

"""Normalisation: layer and RMS norm over the last axis, batch norm per channel (the last axis) over all others.

The gradients recompute the statistics of layer and RMS norm, so nothing but the input is saved.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pockc.ir import Array, Builder, Node, TensorType, Value
from pockc.ops import Sample, define
from pockc.ops.common import (
    Cotangents,
    Gradients,
    Need,
    cotangent_of,
    f32,
    require,
    require_dtype,
    require_type,
    torch_gradient,
)


def _require_normalisable(x: TensorType, minimum_rank: int = 1) -> None:
    require_dtype("x", x, "f32")
    require(len(x.shape) >= minimum_rank, f"x must have a rank of at least {minimum_rank}, not {x}")


def _require_channels(x: TensorType, **vectors: TensorType | None) -> None:
    for name, vector in vectors.items():
        if vector is not None:
            require_type(name, vector, f32(x.shape[-1]))


def _all_but_last(x: Array | TensorType) -> tuple[int, ...]:
    return tuple(range(len(x.shape) - 1))


def _channel_sum(b: Builder, ct: Value) -> Value:
    """The gradient of a vector that is added along the last axis."""
    axes = _all_but_last(ct.type)
    return b("reduce_sum", ct, axes=axes) if axes else ct


# y_i = x_i / s * gamma with s^2 the (centred) mean of squares plus epsilon. With xhat the normalised x and
# g = ct * gamma:  dL/dx = (g - mean(g) - xhat mean(g xhat)) / s, where mean(g) is the path through the mean of x,
# absent without centring, and xhat mean(g xhat) the path through s.
def _normalised_gradient(g: Array, xhat: Array, scale: Array, axes: tuple[int, ...], centred: bool) -> Array:
    through_scale = xhat * (g * xhat).mean(axes, keepdims=True)
    through_mean = g.mean(axes, keepdims=True) if centred else 0
    return np.asarray((g - through_mean - through_scale) * scale)


# batch_norm


def _batch_norm_rule(
    x: TensorType, gamma: TensorType, beta: TensorType, *, epsilon: float
) -> tuple[TensorType, TensorType, TensorType]:
    _require_normalisable(x, 2)
    _require_channels(x, gamma=gamma, beta=beta)
    return x, gamma, gamma


def _batch_norm(x: Array, gamma: Array, beta: Array, *, epsilon: float) -> tuple[Array, Array, Array]:
    axes = _all_but_last(x)
    mean, variance = x.mean(axes), x.var(axes)
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta, mean, variance


def _batch_norm_vjp(builder: Builder, node: Node, cotangents: Cotangents, need: Need) -> Gradients:
    ct = cotangent_of(node, cotangents)  # the statistics only feed the running ones, which are not differentiated
    x, gamma, _ = node.inputs
    _, mean, variance = node.outputs
    left: Value | None = None
    scale: Value | None = None
    if 0 in need:
        left = builder("batch_norm_grad_input", ct, x, gamma, mean, variance, **node.attrs)
    if 1 in need:
        scale = builder("batch_norm_grad_gamma", ct, x, mean, variance, **node.attrs)
    return left, scale, _channel_sum(builder, ct) if 2 in need else None


def _batch_norm_grad_input_rule(
    ct: TensorType, x: TensorType, gamma: TensorType, mean: TensorType, variance: TensorType, *, epsilon: float
) -> TensorType:
    _require_normalisable(x, 2)
    require_type("ct", ct, x)
    _require_channels(x, gamma=gamma, mean=mean, variance=variance)
    return x


def _batch_norm_grad_input(ct: Array, x: Array, gamma: Array, mean: Array, variance: Array, *, epsilon: float) -> Array:
    scale = 1 / np.sqrt(variance + epsilon)
    return _normalised_gradient(ct * gamma, (x - mean) * scale, scale, _all_but_last(x), centred=True)


def _batch_norm_grad_gamma_rule(
    ct: TensorType, x: TensorType, mean: TensorType, variance: TensorType, *, epsilon: float
) -> TensorType:
    _require_normalisable(x, 2)
    require_type("ct", ct, x)
    _require_channels(x, mean=mean, variance=variance)
    return mean


def _batch_norm_grad_gamma(ct: Array, x: Array, mean: Array, variance: Array, *, epsilon: float) -> Array:
    return np.asarray((ct * (x - mean) / np.sqrt(variance + epsilon)).sum(_all_but_last(x)))


def _torch_batch_norm(torch: Any, x: Any, gamma: Any, beta: Any, epsilon: float) -> Any:
    nchw = x.movedim(-1, 1)
    y = torch.nn.functional.batch_norm(nchw, None, None, gamma, beta, True, 0.1, epsilon)
    flat = x.reshape(-1, x.shape[-1])
    return y.movedim(1, -1), flat.mean(0), flat.var(0, correction=0)


_BATCHES = ((f32(4, 3, 5, 6), 1e-5), (f32(2, 7, 7, 17), 1e-3), (f32(9, 4), 1e-5))


def _batch_norm_grad_samples(gamma_gradient: bool) -> list[Sample]:
    """Mean and variance have to be those of x, so x is given as an array."""
    samples = []
    for shape, epsilon in _BATCHES:
        x = np.random.default_rng(shape.elements).uniform(-2, 2, shape.shape).astype(np.float32)
        channels = f32(shape.shape[-1])
        _, mean, variance = _batch_norm(x, np.ones(()), np.zeros(()), epsilon=epsilon)
        operands = (shape, x, mean, variance) if gamma_gradient else (shape, x, channels, mean, variance)

        def torch(t: Any, ct: Any, x: Any, *vectors: Any, epsilon: float = epsilon) -> Any:
            gamma = t.ones_like(vectors[0]) if gamma_gradient else vectors[0]
            forward = lambda t, x, g: _torch_batch_norm(t, x, g, t.zeros_like(g), epsilon)[0]  # noqa: E731
            return torch_gradient(forward, int(gamma_gradient))(t, ct, x, gamma)

        samples.append(Sample(operands, {"epsilon": epsilon}, torch))
    return samples


define(
    "batch_norm",
    type_rule=_batch_norm_rule,
    reference=_batch_norm,
    vjp=_batch_norm_vjp,
    samples=[
        Sample(
            (x, f32(x.shape[-1]), f32(x.shape[-1])),
            {"epsilon": epsilon},
            lambda t, x, g, b, epsilon=epsilon: _torch_batch_norm(t, x, g, b, epsilon),
            (0, 1, 2),
        )
        for x, epsilon in _BATCHES
    ],
    saves="x, mean, variance if x or gamma needs a gradient",
)
define(
    "batch_norm_grad_input",
    type_rule=_batch_norm_grad_input_rule,
    reference=_batch_norm_grad_input,
    samples=_batch_norm_grad_samples(gamma_gradient=False),
)
define(
    "batch_norm_grad_gamma",
    type_rule=_batch_norm_grad_gamma_rule,
    reference=_batch_norm_grad_gamma,
    samples=_batch_norm_grad_samples(gamma_gradient=True),
)


# layer_norm and rms_norm: one with centring and beta, the other without


def _layer_norm_rule(
    x: TensorType, gamma: TensorType | None = None, beta: TensorType | None = None, *, epsilon: float
) -> TensorType:
    _require_normalisable(x)
    require((gamma is None) == (beta is None), "gamma and beta are given together or not at all")
    _require_channels(x, gamma=gamma, beta=beta)
    return x


def _rms_norm_rule(x: TensorType, gamma: TensorType | None = None, *, epsilon: float) -> TensorType:
    _require_normalisable(x)
    _require_channels(x, gamma=gamma)
    return x


def _row_norm_grad_input_rule(
    ct: TensorType, x: TensorType, gamma: TensorType | None = None, *, epsilon: float
) -> TensorType:
    _require_normalisable(x)
    require_type("ct", ct, x)
    _require_channels(x, gamma=gamma)
    return x


def _row_norm_grad_gamma_rule(ct: TensorType, x: TensorType, *, epsilon: float) -> TensorType:
    _require_normalisable(x)
    require_type("ct", ct, x)
    return f32(x.shape[-1])


def _normalised_rows(x: Array, epsilon: float, centred: bool) -> tuple[Array, Array]:
    """Every row over its scale, and one over that scale."""
    if centred:
        x = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return x * scale, scale


def _layer_norm(x: Array, gamma: Array | None = None, beta: Array | None = None, *, epsilon: float) -> Array:
    xhat, _ = _normalised_rows(x, epsilon, centred=True)
    return xhat if gamma is None or beta is None else xhat * gamma + beta


def _rms_norm(x: Array, gamma: Array | None = None, *, epsilon: float) -> Array:
    xhat, _ = _normalised_rows(x, epsilon, centred=False)
    return xhat if gamma is None else xhat * gamma


def _define_row_norm_gradients(name: str, centred: bool, forward: Any) -> None:
    def grad_input(ct: Array, x: Array, gamma: Array | None = None, *, epsilon: float) -> Array:
        xhat, scale = _normalised_rows(x, epsilon, centred)
        return _normalised_gradient(ct if gamma is None else ct * gamma, xhat, scale, (x.ndim - 1,), centred)

    def grad_gamma(ct: Array, x: Array, *, epsilon: float) -> Array:
        return np.asarray((ct * _normalised_rows(x, epsilon, centred)[0]).sum(_all_but_last(x)))

    def torch_grad_gamma(t: Any, ct: Any, x: Any, epsilon: float) -> Any:
        by_autograd = torch_gradient(lambda t, gamma: forward(t, x, gamma, epsilon=epsilon), 0)
        return by_autograd(t, ct, t.ones_like(x[(0,) * (x.dim() - 1)]))

    def torch_grad_input(epsilon: float) -> Any:
        return torch_gradient(lambda t, x, *gamma: forward(t, x, *gamma, epsilon=epsilon), 0)

    define(
        f"{name}_grad_input",
        type_rule=_row_norm_grad_input_rule,
        reference=grad_input,
        samples=[
            Sample((x, x, *gamma), {"epsilon": epsilon}, torch_grad_input(epsilon))
            for x, epsilon in _ROWS
            for gamma in ((), (f32(x.shape[-1]),))
        ],
    )
    define(
        f"{name}_grad_gamma",
        type_rule=_row_norm_grad_gamma_rule,
        reference=grad_gamma,
        samples=[Sample((x, x), {"epsilon": e}, lambda t, ct, x, e=e: torch_grad_gamma(t, ct, x, e)) for x, e in _ROWS],
    )


def _row_norm_vjp(builder: Builder, node: Node, cotangents: Cotangents, need: Need) -> Gradients:
    ct = cotangent_of(node, cotangents)
    x, *rest = node.inputs
    gradients: list[Value | None] = [None] * len(node.inputs)
    if 0 in need:
        gradients[0] = builder(f"{node.op}_grad_input", ct, x, *rest[:1], **node.attrs)
    if 1 in need:
        gradients[1] = builder(f"{node.op}_grad_gamma", ct, x, **node.attrs)
    if 2 in need:
        gradients[2] = _channel_sum(builder, ct)
    return gradients


def _torch_layer_norm(t: Any, x: Any, gamma: Any = None, beta: Any = None, *, epsilon: float) -> Any:
    return t.nn.functional.layer_norm(x, x.shape[-1:], gamma, beta, epsilon)


def _torch_rms_norm(t: Any, x: Any, gamma: Any = None, *, epsilon: float) -> Any:
    return t.nn.functional.rms_norm(x, x.shape[-1:], gamma, epsilon)


_ROWS = (
    (f32(3, 8), 1e-5),
    (f32(2, 3, 37), 1e-12),
    (
        f32(
            5,
        ),
        1e-3,
    ),
)

define(
    "layer_norm",
    type_rule=_layer_norm_rule,
    reference=_layer_norm,
    vjp=_row_norm_vjp,
    samples=[
        Sample(
            (x, *vectors),
            {"epsilon": e},
            lambda t, *xs, e=e: _torch_layer_norm(t, *xs, epsilon=e),
            tuple(range(1 + len(vectors))),
        )
        for x, e in _ROWS
        for vectors in ((), (f32(x.shape[-1]),) * 2)
    ],
    saves="x if x or gamma needs a gradient",
)
_define_row_norm_gradients("layer_norm", True, _torch_layer_norm)
define(
    "rms_norm",
    type_rule=_rms_norm_rule,
    reference=_rms_norm,
    vjp=_row_norm_vjp,
    samples=[
        Sample(
            (x, *vectors),
            {"epsilon": e},
            lambda t, *xs, e=e: _torch_rms_norm(t, *xs, epsilon=e),
            tuple(range(1 + len(vectors))),
        )
        for x, e in _ROWS
        for vectors in ((), (f32(x.shape[-1]),))
    ],
    saves="x",
)
_define_row_norm_gradients("rms_norm", False, _torch_rms_norm)

"""Optimizer steps: the new parameter and the new slots. ``step`` is 1 at the first step.

With ``indices`` only those positions of ``p`` along ``axis`` are updated; the gradient and the slots have just them.
With ``start`` of 0 or more, the rows of ``p`` and of the slots from there on for which there are rows of the gradient.
The order of operations is that of torch.optim, so that trajectories agree to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pockc.ir import Array, TensorType
from pockc.ops import Sample, define
from pockc.ops.common import f32, require, require_axis, require_dtype, require_type

STEP = TensorType((), "i64")


def require_update(
    p: TensorType, slices: Mapping[str, TensorType], indices: TensorType | None, axis: int, start: int = -1
) -> None:
    """The gradient and the slots match the parameter, or the updated part of it."""
    require_dtype("p", p, "f32")
    if start >= 0:
        _require_rows(p, slices, indices, start)
        return
    expected = p
    if indices is not None:
        require_axis(axis, len(p.shape))
        require(indices.dtype == "i32" and len(indices.shape) == 1, f"the indices must be i32[k], not {indices}")
        require(indices.shape[0] <= p.shape[axis], f"{indices} holds more indices than axis {axis} of {p} has")
        expected = f32(*p.shape[:axis], indices.shape[0], *p.shape[axis + 1 :])
    for name, slot in slices.items():
        require_type(name, slot, expected)


def _require_rows(p: TensorType, slices: Mapping[str, TensorType], indices: TensorType | None, start: int) -> None:
    """The gradient has some rows of the parameter, the slots have all."""
    g, *slots = slices.values()
    require(indices is None, "an update of rows from a start on takes no indices")
    require(p.shape[1:] == g.shape[1:] and min(len(p.shape), len(g.shape)) > 0, f"{g} holds no rows of {p}")
    require(start + g.shape[0] <= p.shape[0], f"rows {start} to {start + g.shape[0]} are not all in {p}")
    require_type("g", g, f32(*g.shape))
    for slot in slots:
        require_type("a slot", slot, p)


def _on_rows(whole: Callable[..., Any], slots: int) -> Callable[..., Any]:
    """The reference with ``start``: that of the rows alone, and what it gives in their place in ``p`` and the slots."""

    def run(p: Array, g: Array, *rest: Array, start: int = -1, **attrs: Any) -> Any:
        if start < 0:
            return whole(p, g, *rest, **attrs)
        rows = slice(start, start + len(g))
        states = (p, *rest[:slots])
        parts = whole(p[rows], g, *(slot[rows] for slot in rest[:slots]), *rest[slots:], **attrs)
        results = tuple(state.copy() for state in states)
        for result, part in zip(results, parts if slots else (parts,), strict=True):
            result[rows] = part
        return results if slots else results[0]

    return run


def _part(p: Array, indices: Array | None, axis: int) -> Array:
    return p if indices is None else np.take(p, indices, axis)


def _written(p: Array, part: Array, indices: Array | None, axis: int) -> Array:
    """A copy of ``p`` with the updated part in its place."""
    if indices is None:
        return np.asarray(part, dtype=p.dtype)
    result = p.copy()
    result[(slice(None),) * axis + (indices,)] = part
    return result


# sgd


def _sgd_rule(
    p: TensorType,
    g: TensorType,
    lr: TensorType,
    indices: TensorType | None = None,
    *,
    weight_decay: float = 0.0,
    axis: int = 0,
    start: int = -1,
) -> TensorType:
    require_update(p, {"g": g}, indices, axis, start)
    require_type("lr", lr, f32())
    return p


def _sgd(
    p: Array, g: Array, lr: Array, indices: Array | None = None, *, weight_decay: float = 0.0, axis: int = 0
) -> Array:
    part = _part(p, indices, axis)
    return _written(p, part - lr * (g + weight_decay * part), indices, axis)


RATE = np.float32(0.05)


def _samples(
    slots: int, scalars: tuple[Any, ...], attrs: tuple[Mapping[str, Any], ...], torch: Callable[..., Any]
) -> list[Sample]:
    """Whole and indexed updates for every set of attributes; slots are positive, as squares are.

    ``torch(attrs)`` makes the torch counterpart of the whole update.
    """
    sizes = (f32(5, 7), f32())
    found = [Sample((*(x,) * (2 + slots), *scalars), a, torch(a), low=0.1) for a in attrs for x in sizes]
    last = attrs[-1]
    for whole, part, indices, axis in (
        (f32(5, 7), f32(2, 7), np.array([3, 1], np.int32), 0),
        (f32(2, 6, 3), f32(2, 3, 3), np.array([0, 2, 5], np.int32), 1),
    ):
        operands = (whole, *(part,) * (1 + slots), *scalars, indices)
        found.append(Sample(operands, {**last, "axis": axis}, _torch_part(torch(last), axis), low=0.1))
    for whole, part, start in ((f32(5, 7), f32(2, 7), 2), (f32(6), f32(6), 0), (f32(37, 3, 2), f32(21, 3, 2), 16)):
        operands = (whole, part, *(whole,) * slots, *scalars)
        found.append(Sample(operands, {**last, "start": start}, _torch_rows(torch(last), slots, start), low=0.1))
    return found


def _torch_rows(whole: Callable[..., Any], slots: int, start: int) -> Callable[..., Any]:
    """The update of the rows from ``start`` on, from that of a whole parameter."""

    def run(torch: Any, p: Any, g: Any, *rest: Any) -> Any:
        states = (p, *rest[:slots])
        parts = whole(
            torch, p[start : start + len(g)], g, *(x[start : start + len(g)] for x in states[1:]), *rest[slots:]
        )
        parts = parts if isinstance(parts, tuple) else (parts,)
        results = [torch.cat([x[:start], part, x[start + len(g) :]]) for x, part in zip(states, parts, strict=True)]
        return tuple(results)

    return run


def _torch_part(whole: Callable[..., Any], axis: int) -> Callable[..., Any]:
    """The update of the indexed part, from that of a whole parameter."""

    def run(torch: Any, p: Any, *rest: Any) -> Any:
        *operands, indices = rest
        found = whole(torch, p.index_select(axis, indices), *operands)
        part, *slots = found if isinstance(found, tuple) else (found,)
        return p.index_copy(axis, indices.long(), part), *slots

    return run


def _torch_step(name: str, slots: tuple[str, ...], options: Mapping[str, Any]) -> Callable[..., Any]:
    """One step of a torch optimizer from given slots: ``(torch, p, g, *slots, lr, [step])`` -> new p and slots."""

    def run(torch: Any, p: Any, g: Any, *rest: Any) -> Any:
        given, lr, *step = rest[: len(slots)], *rest[len(slots) :]
        parameter = torch.nn.Parameter(p.clone())
        parameter.grad = g.clone()
        optimizer = getattr(torch.optim, name)([parameter], lr=float(lr), foreach=False, **options)
        if name != "SGD" or not step or int(step[0]) > 1:  # before its first step SGD has no slot, Adam has zeros
            state: dict[str, Any] = {slot: value.clone() for slot, value in zip(slots, given, strict=True)}
            optimizer.state[parameter] = {**state, "step": (step[0] - 1).float()} if step else state
        optimizer.step()
        found = optimizer.state[parameter]
        return parameter.detach(), *(found[slot] for slot in slots)

    return run


define(
    "sgd",
    type_rule=_sgd_rule,
    reference=_on_rows(_sgd, 0),
    samples=_samples(
        0,
        (RATE,),
        ({}, {"weight_decay": 0.1}),
        lambda attrs: _torch_step("SGD", (), attrs),
    ),
    in_place=(0,),
)


# momentum


def _momentum_rule(
    p: TensorType,
    g: TensorType,
    m: TensorType,
    lr: TensorType,
    step: TensorType,
    indices: TensorType | None = None,
    *,
    momentum: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    axis: int = 0,
    start: int = -1,
) -> tuple[TensorType, TensorType]:
    require_update(p, {"g": g, "m": m}, indices, axis, start)
    require_type("lr", lr, f32())
    require_type("step", step, STEP)
    require(not nesterov or (momentum > 0 and dampening == 0), "nesterov needs momentum above 0 and no dampening")
    return p, m


def momentum_step(
    p: Array,
    g: Array,
    m: Array,
    lr: Array,
    step: Array,
    indices: Array | None = None,
    *,
    momentum: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    axis: int = 0,
) -> tuple[Array, Array]:
    """The reference of `momentum`."""
    part = _part(p, indices, axis)
    g = g + weight_decay * part
    m = np.asarray(g if step == 1 else momentum * m + (1 - dampening) * g)
    direction = g + momentum * m if nesterov else m
    return _written(p, part - lr * direction, indices, axis), m


_MOMENTUM_ATTRS = (
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
)


def _torch_momentum(attrs: Mapping[str, Any]) -> Callable[..., Any]:
    return _torch_step("SGD", ("momentum_buffer",), attrs)


define(
    "momentum",
    type_rule=_momentum_rule,
    reference=_on_rows(momentum_step, 1),
    samples=[
        *_samples(1, (RATE, np.int64(1)), _MOMENTUM_ATTRS, _torch_momentum),
        *_samples(1, (RATE, np.int64(3)), _MOMENTUM_ATTRS, _torch_momentum),
    ],
    in_place=(0,),
)


# adam


def _adam_rule(
    p: TensorType,
    g: TensorType,
    m: TensorType,
    v: TensorType,
    lr: TensorType,
    step: TensorType,
    indices: TensorType | None = None,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    axis: int = 0,
    start: int = -1,
) -> tuple[TensorType, TensorType, TensorType]:
    require_update(p, {"g": g, "m": m, "v": v}, indices, axis, start)
    require_type("lr", lr, f32())
    require_type("step", step, STEP)
    require(0 <= beta1 < 1 and 0 <= beta2 < 1, f"the betas must lie in [0, 1), not {beta1} and {beta2}")
    return p, m, v


def adam_step(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    lr: Array,
    step: Array,
    indices: Array | None = None,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    axis: int = 0,
) -> tuple[Array, Array, Array]:
    """The reference of `adam`."""
    part = _part(p, indices, axis)
    rate = float(lr)
    if decoupled:
        part = part * (1 - rate * weight_decay)
    else:
        g = g + weight_decay * part
    m = np.asarray(m + (1 - beta1) * (g - m))
    v = np.asarray(beta2 * v + (1 - beta2) * g * g)
    count = int(step)
    step_size = rate / (1 - beta1**count)
    denominator = np.sqrt(v) / math.sqrt(1 - beta2**count) + epsilon
    return _written(p, part - step_size * (m / denominator), indices, axis), m, v


_ADAM = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
_ADAM_ATTRS = (
    _ADAM,
    {**_ADAM, "weight_decay": 0.1},
    {**_ADAM, "weight_decay": 0.1, "decoupled": False},
    {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3, "weight_decay": 0.01},
)


def _torch_adam(attrs: Mapping[str, Any]) -> Any:
    options = {
        "betas": (attrs["beta1"], attrs["beta2"]),
        "eps": attrs["epsilon"],
        "weight_decay": attrs.get("weight_decay", 0.0),
    }
    return _torch_step("AdamW" if attrs.get("decoupled", True) else "Adam", ("exp_avg", "exp_avg_sq"), options)


define(
    "adam",
    type_rule=_adam_rule,
    reference=_on_rows(adam_step, 2),
    samples=[
        *_samples(2, (RATE, np.int64(1)), _ADAM_ATTRS, _torch_adam),
        *_samples(2, (RATE, np.int64(7)), _ADAM_ATTRS, _torch_adam),
    ],
    in_place=(0,),
)


# lion: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"


def _lion_rule(
    p: TensorType,
    g: TensorType,
    m: TensorType,
    lr: TensorType,
    indices: TensorType | None = None,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float = 0.0,
    axis: int = 0,
    start: int = -1,
) -> tuple[TensorType, TensorType]:
    require_update(p, {"g": g, "m": m}, indices, axis, start)
    require_type("lr", lr, f32())
    require(0 <= beta1 < 1 and 0 <= beta2 < 1, f"the betas must lie in [0, 1), not {beta1} and {beta2}")
    return p, m


def lion_step(
    p: Array,
    g: Array,
    m: Array,
    lr: Array,
    indices: Array | None = None,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float = 0.0,
    axis: int = 0,
) -> tuple[Array, Array]:
    """The reference of `lion`."""
    rate = float(lr)
    part = _part(p, indices, axis) * (1 - rate * weight_decay)
    direction = np.sign(beta1 * m + (1 - beta1) * g)
    m = np.asarray(beta2 * m + (1 - beta2) * g)
    return _written(p, part - rate * direction, indices, axis), m


def _torch_lion(attrs: Mapping[str, Any]) -> Any:
    def run(torch: Any, p: Any, g: Any, m: Any, lr: Any) -> Any:
        p = p.mul(1 - lr * attrs.get("weight_decay", 0.0))
        direction = torch.lerp(g, m, attrs["beta1"]).sign()
        return p.sub(lr * direction), torch.lerp(g, m, attrs["beta2"])

    return run


define(
    "lion",
    type_rule=_lion_rule,
    reference=_on_rows(lion_step, 1),
    samples=_samples(
        1,
        (RATE,),
        ({"beta1": 0.9, "beta2": 0.99}, {"beta1": 0.95, "beta2": 0.98, "weight_decay": 0.1}),
        _torch_lion,
    ),
    in_place=(0,),
)


# learning_rate


def _learning_rate_rule(
    base: TensorType,
    step: TensorType,
    *,
    schedule: str,
    warmup_steps: int = 0,
    total_steps: int = 0,
    step_size: int = 0,
    minimum: float = 0.0,
    factor: float = 1.0,
) -> TensorType:
    require_type("base", base, f32())
    require_type("step", step, STEP)
    known = ("constant", "linear", "cosine", "step")
    require(schedule in known, f"there is no schedule {schedule!r}; there are {', '.join(known)}")
    require(schedule not in ("linear", "cosine") or total_steps > 0, f"a {schedule} schedule needs total_steps")
    require(schedule != "step" or step_size > 0, "a step schedule needs step_size")
    require(warmup_steps >= 0, f"warmup_steps must not be negative, not {warmup_steps}")
    return base


def _learning_rate(
    base: Array,
    step: Array,
    *,
    schedule: str,
    warmup_steps: int = 0,
    total_steps: int = 0,
    step_size: int = 0,
    minimum: float = 0.0,
    factor: float = 1.0,
) -> Array:
    done = int(step) - 1
    if done < warmup_steps:
        return np.asarray(float(base) * (done + 1) / warmup_steps, dtype=base.dtype)
    after = done - warmup_steps
    fraction = min(1.0, after / max(1, total_steps - warmup_steps))
    match schedule:
        case "linear":
            share = minimum + (1 - minimum) * (1 - fraction)
        case "cosine":
            share = minimum + (1 - minimum) * (1 + math.cos(math.pi * fraction)) / 2
        case "step":
            share = factor ** (after // step_size)
        case _:
            share = 1.0
    return np.asarray(float(base) * share, dtype=base.dtype)


_SCHEDULES: tuple[Mapping[str, Any], ...] = (
    {"schedule": "constant"},
    {"schedule": "constant", "warmup_steps": 4},
    {"schedule": "linear", "warmup_steps": 2, "total_steps": 10, "minimum": 0.1},
    {"schedule": "cosine", "total_steps": 10},
    {"schedule": "cosine", "warmup_steps": 3, "total_steps": 9, "minimum": 0.05},
    {"schedule": "step", "step_size": 3, "factor": 0.1},
)

define(
    "learning_rate",
    type_rule=_learning_rate_rule,
    reference=_learning_rate,
    samples=[Sample((RATE, np.int64(step)), a) for a in _SCHEDULES for step in (1, 2, 4, 7, 10, 50)],
)

"""Optimizer steps and the learning rate. Every element of a state is read before, or where, its new value is written.

Scalars that all parameters share (bias corrections, the decay of weights) are computed once, in double precision, as
the references do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pockc.ir import Node, Value
from pockc.targets.onnxruntime.elementwise import scaled
from pockc.targets.onnxruntime.emitter import Emitter, Lowering, in_order
from pockc.targets.onnxruntime.shape import as_i64, sliced

_F32, _F64 = 1, 11  # TensorProto.DataType


class _Step:
    """One update: the part of the parameter that it changes, and where the new part goes.

    All is done in the order of axes that the parameter is stored in, so that nothing is transposed but the gradient.
    """

    def __init__(self, e: Emitter, node: Node, slots: int) -> None:
        self.e, self.node = e, node
        self.p, self.g, *rest = node.inputs
        self.slots, scalars = rest[:slots], rest[slots:]
        indexed = bool(scalars) and scalars[-1].type.dtype == "i32"
        self.indices = scalars[-1] if indexed else None
        self.scalars = scalars[:-1] if indexed else scalars
        self.axis, self.start = node.attrs["axis"], node.attrs.get("start", -1)
        self.order = e.order(self.p)

    def gradient(self) -> str:
        """In the parameter's order."""
        return self.e.read(self.g, self.order)

    def part(self, state: Value) -> str:
        """The elements of a parameter or slot that the gradient is for; slots of indexed updates have no others."""
        tensor = self.e.read(state, self.order)
        if self.start >= 0:
            stop = self.start + self.g.type.shape[0]
            return sliced(self.e, tensor, self.order.index(0), self.start, stop)
        if self.indices is None or state is not self.p:
            return tensor
        return self.e("Gather", tensor, self.e.read(self.indices), axis=self.order.index(self.axis))

    def write(self, position: int, part: str) -> None:
        """The new parameter (position 0) or slot, with this part in its place."""
        state = self.node.inputs[0] if position == 0 else self.slots[position - 1]
        if self.start >= 0:
            rows = np.arange(self.start, self.start + self.g.type.shape[0], dtype=np.int64)
            self._scatter(position, state, part, self.e.constant(rows, np.int64, "rows"), 0)
        elif self.indices is not None and position == 0:
            self._scatter(position, state, part, as_i64(self.e, self.indices), self.axis)
        else:
            self.e.write(self.node.outputs[position], part, self.order)

    # ScatterND copies whole rows; along any other axis it has to be element by element.
    def _scatter(self, position: int, state: Value, part: str, rows: str, axis: int) -> None:
        e, stored = self.e, self.order.index(axis)
        shape = in_order(state.type.shape, self.order)
        count = self.g.type.shape[axis]
        part_shape = (*shape[:stored], count, *shape[stored + 1 :])
        if stored == 0:
            found = e("ScatterND", e.read(state, self.order), e.reshaped(rows, (count, 1)), part)
        else:
            index_shape = tuple(count if i == stored else 1 for i in range(len(shape)))
            spread = e("Expand", e.reshaped(rows, index_shape), e.ints(*part_shape))
            found = e("ScatterElements", e.read(state, self.order), spread, part, axis=stored)
        e.write(self.node.outputs[position], found, self.order)

    def decayed(self, part: str, rate: Value) -> str:
        """``part * (1 - rate * weight_decay)``."""
        decay = self.node.attrs["weight_decay"]
        if not decay:
            return part
        e = self.e

        def make() -> str:
            return e("Sub", e.constant(1.0), scaled(e, e.read(rate), decay))

        return e("Mul", part, e.note(("decay", rate, decay), make))

    def with_decay(self, gradient: str, part: str) -> str:
        """``gradient + weight_decay * part``."""
        decay = self.node.attrs["weight_decay"]
        return self.e("Add", gradient, scaled(self.e, part, decay)) if decay else gradient


def _sgd(e: Emitter, node: Node) -> None:
    step = _Step(e, node, 0)
    (rate,) = step.scalars
    part = step.part(step.p)
    g = step.with_decay(step.gradient(), part)
    step.write(0, e("Sub", part, e("Mul", g, e.read(rate))))


def _momentum(e: Emitter, node: Node) -> None:
    step = _Step(e, node, 1)
    rate, count = step.scalars
    momentum, dampening, nesterov = (node.attrs[name] for name in ("momentum", "dampening", "nesterov"))
    part, m = step.part(step.p), step.part(step.slots[0])
    g = step.with_decay(step.gradient(), part)
    keep = e.note(("momentum", count, momentum), lambda: _from_second(e, count, 0.0, momentum))
    moved = e("Mul", m, keep)
    if dampening:
        share = e.note(("dampening", count, dampening), lambda: _from_second(e, count, 1.0, 1 - dampening))
        moved = e("Add", moved, e("Mul", g, share))
    else:
        moved = e("Add", moved, g)
    direction = e("Add", g, scaled(e, moved, momentum)) if nesterov else moved
    step.write(0, e("Sub", part, e("Mul", direction, e.read(rate))))
    step.write(1, moved)


# The first step takes the gradient as it is.
def _from_second(e: Emitter, count: Value, first: float, later: float) -> str:
    """A factor that the first step has another one for."""
    is_first = e("Equal", e.read(count), e.constant(1, np.int64))
    return e("Where", is_first, e.constant(first), e.constant(later))


# With c = sqrt(1 - beta2^t):
# rate / (1 - beta1^t) m / (sqrt(v) / c + eps) = [rate c / (1 - beta1^t)] m / (sqrt(v) + c eps).
def _adam(e: Emitter, node: Node) -> None:
    step = _Step(e, node, 2)
    rate, count = step.scalars
    beta1, beta2, epsilon = (node.attrs[name] for name in ("beta1", "beta2", "epsilon"))
    part, m, v = step.part(step.p), step.part(step.slots[0]), step.part(step.slots[1])
    g = step.gradient()
    if node.attrs["decoupled"]:
        part = step.decayed(part, rate)
    else:
        g = step.with_decay(g, part)
    moved = e("Add", m, scaled(e, e("Sub", g, m), 1 - beta1))
    squares = e("Add", scaled(e, v, beta2), e("Mul", scaled(e, g, 1 - beta2), g))
    size, floor = e.note(
        ("adam", rate, count, beta1, beta2, epsilon), lambda: _adam_scalars(e, rate, count, beta1, beta2, epsilon)
    )
    direction = e("Div", moved, e("Add", e("Sqrt", squares), floor))
    step.write(0, e("Sub", part, e("Mul", direction, size)))
    step.write(1, moved)
    step.write(2, squares)


def _adam_scalars(e: Emitter, rate: Value, count: Value, beta1: float, beta2: float, epsilon: float) -> tuple[str, str]:
    """What the direction is multiplied by, and what is added to the root."""
    steps = e("Cast", e.read(count), to=_F64)

    def correction(beta: float) -> str:
        return e("Sub", _f64(e, 1.0), e("Pow", _f64(e, beta), steps))

    root = e("Sqrt", correction(beta2))
    size = e("Div", e("Mul", e("Cast", e.read(rate), to=_F64), root), correction(beta1))
    return e("Cast", size, to=_F32), e("Cast", e("Mul", root, _f64(e, epsilon)), to=_F32)


def _f64(e: Emitter, value: float) -> str:
    return e.constant(value, np.float64)


def _lion(e: Emitter, node: Node) -> None:
    step = _Step(e, node, 1)
    (rate,) = step.scalars
    beta1, beta2 = node.attrs["beta1"], node.attrs["beta2"]
    part, m, g = step.decayed(step.part(step.p), rate), step.part(step.slots[0]), step.gradient()
    direction = e("Sign", e("Add", scaled(e, m, beta1), scaled(e, g, 1 - beta1)))
    moved = e("Add", scaled(e, m, beta2), scaled(e, g, 1 - beta2))
    step.write(0, e("Sub", part, e("Mul", direction, e.read(rate))))
    step.write(1, moved)


# --- Learning rate ------------------------------------------------------------------------------------------------


def _learning_rate(e: Emitter, node: Node) -> None:
    base, count = node.inputs
    warmup = node.attrs["warmup_steps"]
    done = e("Sub", e("Cast", e.read(count), to=_F64), _f64(e, 1.0))
    share = _SCHEDULES[node.attrs["schedule"]](e, e("Sub", done, _f64(e, warmup)), node.attrs)
    if warmup:
        rising = e("Div", e("Add", done, _f64(e, 1.0)), _f64(e, warmup))
        share = e("Where", e("Less", done, _f64(e, warmup)), rising, share)
    rate = e("Mul", e("Cast", e.read(base), to=_F64), share)
    e.write(node.outputs[0], e("Cast", rate, to=_F32))


def _fraction(e: Emitter, after: str, attrs: Any) -> str:
    whole = max(1, attrs["total_steps"] - attrs["warmup_steps"])
    return e("Min", e("Div", after, _f64(e, whole)), _f64(e, 1.0))


def _above_minimum(e: Emitter, share: str, minimum: float) -> str:
    return e("Add", e("Mul", share, _f64(e, 1 - minimum)), _f64(e, minimum))


def _constant(e: Emitter, after: str, attrs: Any) -> str:
    return _f64(e, 1.0)


def _linear(e: Emitter, after: str, attrs: Any) -> str:
    return _above_minimum(e, e("Sub", _f64(e, 1.0), _fraction(e, after, attrs)), attrs["minimum"])


def _cosine(e: Emitter, after: str, attrs: Any) -> str:
    angle = e("Cast", e("Mul", _fraction(e, after, attrs), _f64(e, math.pi)), to=_F32)
    cosine = e("Cast", e("Cos", angle), to=_F64)
    share = e("Mul", e("Add", cosine, _f64(e, 1.0)), _f64(e, 0.5))
    return _above_minimum(e, share, attrs["minimum"])


def _stepwise(e: Emitter, after: str, attrs: Any) -> str:
    return e("Pow", _f64(e, attrs["factor"]), e("Floor", e("Div", after, _f64(e, attrs["step_size"]))))


_SCHEDULES: dict[str, Callable[[Emitter, str, Any], str]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "step": _stepwise,
}

OPS: dict[str, Lowering] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adam": _adam,
    "lion": _lion,
    "learning_rate": _learning_rate,
}

"""Attach the optimizer: gradients become new values of parameters, slots and counters."""

from __future__ import annotations

from typing import Any

import numpy as np

from pockc.ir import Array, Builder, Graph, Origin, StateKind, Value
from pockc.ops.optimizer8 import blocks
from pockc.optim import SGD, Adam, AdamW, Lion
from pockc.passes import loss_scale
from pockc.passes.differentiate import PREFIX
from pockc.recipe import Recipe
from pockc.scheme import channel_axis, select_channels

LEARNING_RATE = "pockc.learning_rate"
STEP = "pockc.step"  # times that an entry which trains has run, and was not skipped: the clock of dropout
UPDATES = "pockc.updates"  # optimizer steps done: the clock of the schedule; the same as STEP without accumulation
ACCUMULATED = "accumulated"


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Turn the outputs ``gradient:<p>`` into updates by the recipe's optimizer.

    Pre:  the outputs of `differentiate`, gradients of the loss over ``recipe.accumulation``, times its scale.
    Post: the loss is the only output; every trained parameter with a gradient, its slots, the step counters and, with
          accumulation, the accumulators (set back to zero) are updated. With a dynamic scale, that is updated too, and
          all of the rest but the accumulators waits for a `gate`.
    """
    stage = _Stage(graph, recipe)
    gradients = stage.gradients()
    stage.builder.origin = Origin(module="<optimizer>", phase="update")
    if recipe.accumulation > 1:
        gradients = {p: stage.accumulated(p, g, reset=True) for p, g in gradients.items()}
    if recipe.has_dynamic_scale:
        gradients = stage.behind_gate(gradients)
    step = stage.advance(STEP)
    if recipe.accumulation > 1:
        step = stage.advance(UPDATES)
    gradients = _clipped(stage.builder, gradients, recipe.optimizer.clip_norm)
    rate = stage.learning_rate(step)
    for parameter, gradient in gradients.items():
        stage.update(parameter, gradient, rate, step)
    return stage.finish()


def accumulate(graph: Graph, recipe: Recipe) -> Graph:
    """The micro-step that only adds its gradients to the accumulators.

    Pre:  as for `run`, with ``recipe.accumulation`` above 1.
    Post: only accumulators and the step counter (and the model's own statistics) are updated.
    """
    stage = _Stage(graph, recipe)
    gradients = stage.gradients()
    stage.builder.origin = Origin(module="<optimizer>", phase="update")
    stage.advance(STEP)
    for parameter, gradient in gradients.items():
        stage.accumulated(parameter, gradient, reset=False)
    return stage.finish()


def _clipped(builder: Builder, gradients: dict[Value, Value], clip_norm: float | None) -> dict[Value, Value]:
    """torch.nn.utils.clip_grad_norm_: every gradient times min(1, clip_norm / (norm + 1e-6))."""
    if clip_norm is None:
        return gradients
    total: Value | None = None
    for gradient in gradients.values():
        squares = builder("sum_squares", gradient)
        total = squares if total is None else builder("add", total, squares)
    assert total is not None, "differentiate guarantees at least one gradient"
    norm = builder("add", builder("sqrt", total, hint="norm"), builder.constant(1e-6))
    scale = builder("minimum", builder("div", builder.constant(clip_norm), norm), builder.constant(1.0))
    return {parameter: builder("mul", gradient, scale) for parameter, gradient in gradients.items()}


class _Stage:
    """The graph under construction: a builder, the states it gains, the updates so far."""

    def __init__(self, graph: Graph, recipe: Recipe) -> None:
        self.graph, self.recipe = graph, recipe
        self.builder = Builder(graph)
        self.updates: dict[Value, Value] = dict(graph.updates)
        self.indices: dict[Value, tuple[Value, int]] = {}  # of channel-sparse parameters: indices and axis
        self.one = self.builder.constant(1, "i64")  # what a counter advances by

    def finish(self) -> Graph:
        """The step. Its only output is the loss: predictions would stay alive until the last update."""
        return self.builder.build({"loss": self.graph.outputs["loss"]}, self.updates)

    def gradients(self) -> dict[Value, Value]:
        """Gradient of each trained parameter, cut to the channels that its scheme updates."""
        found = {}
        for name, gradient in self.graph.outputs.items():
            if name.startswith(PREFIX):
                parameter = self.graph.state(name.removeprefix(PREFIX))
                found[parameter] = self._unscaled(self._selected(parameter, gradient))
        return found

    def _unscaled(self, gradient: Value) -> Value:
        """The gradient of the loss itself: exact, since the scale is a power of two. With a dynamic one as it is."""
        if self.recipe.loss_scale == 1.0 or self.recipe.has_dynamic_scale:
            return gradient
        return self.builder("mul", gradient, self.builder.constant(1 / self.recipe.loss_scale))

    def behind_gate(self, gradients: dict[Value, Value]) -> dict[Value, Value]:
        """The gradients of the loss itself, where they are finite; else the step ends with the states as they were.

        The accumulators alone are set back to zero even then: an infinite sum would stay for ever. What the model
        itself updates, running statistics, waits like the rest: those of a batch that overflows are infinite.
        """
        resets = [value for state, value in self.updates.items() if state not in self.graph.updates]
        before = [self.graph.outputs["loss"], *resets]
        gate = loss_scale.gate(self.builder, self.recipe, gradients.values(), before)
        self.updates.update(gate.updates)
        for state, value in self.graph.updates.items():
            self.updates[state] = self.builder("mul", value, gate.one, hint=value.name)
        self.one = self.builder("cast", gate.one, dtype="i64", hint="one")
        return {p: self.builder("mul", g, gate.unscale, hint="gradient") for p, g in gradients.items()}

    def _selected(self, parameter: Value, gradient: Value) -> Value:
        channels = self.recipe.trained[parameter.name]
        if channels is None or channels.fraction >= 1.0:
            return gradient
        state = self.graph.states[parameter]
        original_axis = channel_axis(state.original().shape)
        axis = state.permutation.index(original_axis) if state.permutation else original_axis
        chosen = select_channels(state.original(), channels, original_axis)
        indices = self.builder.constant(chosen, dtype="i32", hint=f"{parameter.name}.channels")
        self.indices[parameter] = (indices, axis)
        self.builder.origin = Origin(module=parameter.name.rpartition(".")[0], phase="backward")
        return self.builder("take", gradient, indices, axis=axis)

    def state(self, name: str, kind: StateKind, initial: Array) -> Value:
        """The state of that name; made now if there is none (dropout brings its own step counter)."""
        known = next((v for v in self.builder.states if v.name == name), None)
        return known if known is not None else self.builder.state(name, kind, initial)

    def advance(self, counter: str) -> Value:
        """The counter plus one, which is also its new value."""
        state = self.state(counter, "counter", np.zeros((), np.int64))
        self.updates[state] = value = self.builder("add", state, self.one, hint="step")
        return value

    def accumulated(self, parameter: Value, gradient: Value, *, reset: bool) -> Value:
        """The gradient plus what earlier micro-steps left; the accumulator gets the sum, or zeros."""
        shape = gradient.type.shape
        state = self._slot(f"{parameter.name}.{ACCUMULATED}", shape, self.graph.states[parameter].permutation)
        total = self.builder("add", state, gradient, hint="accumulated")
        self.updates[state] = self._zeros(shape) if reset else total
        return total

    def _zeros(self, shape: tuple[int, ...]) -> Value:
        if self.recipe.has_dynamic_scale:
            return loss_scale.zeros(self.builder, shape)
        return self.builder("expand", self.builder.constant(0.0), shape=shape)

    def learning_rate(self, step: Value) -> Value:
        optimizer = self.recipe.optimizer
        base = self.state(LEARNING_RATE, "counter", np.asarray(optimizer.lr, np.float32))
        schedule = optimizer.schedule
        if schedule.is_constant:
            return base
        return self.builder(
            "learning_rate",
            base,
            step,
            schedule=schedule.kind,
            warmup_steps=schedule.warmup_steps,
            total_steps=schedule.total_steps,
            step_size=schedule.step_size,
            minimum=schedule.minimum,
            factor=schedule.factor,
        )

    def update(self, parameter: Value, gradient: Value, rate: Value, step: Value) -> None:
        """One optimizer op: the new parameter and its new slots become updates."""
        group = self.recipe.optimizer.group(parameter.name)
        if group.learning_rate_factor != 1.0:
            rate = self.builder("mul", rate, self.builder.constant(group.learning_rate_factor))
        permutation = self.graph.states[parameter].permutation
        names = [f"{parameter.name}.{slot}" for slot in self.recipe.optimizer.slots]
        slots = [slot for name in names for slot in self._slots(name, gradient.type.shape, permutation)]
        indices, axis = self.indices.get(parameter, (None, 0))
        tail = () if indices is None else (indices,)
        op, clocks, attrs = self._operation(rate, step)
        op = f"{op}8" if slots and self.recipe.state_dtype == "int8" else op
        self.builder.origin = Origin(module=parameter.name.rpartition(".")[0], phase="update")
        outputs = self.builder.multi(
            op, parameter, gradient, *slots, *clocks, *tail, weight_decay=group.weight_decay, axis=axis, **attrs
        )
        self.updates.update(zip([parameter, *slots], outputs, strict=True))

    def _slots(self, name: str, shape: tuple[int, ...], permutation: tuple[int, ...]) -> tuple[Value, ...]:
        """The states of one slot, zero at first: one of f32, or codes of one byte and the scales of their blocks."""
        if self.recipe.state_dtype == "f32":
            return (self._slot(name, shape, permutation),)
        codes = self.builder.state(name, "slot", np.zeros(shape, np.uint8), permutation)
        return codes, self._slot(f"{name}.scale", (blocks(shape),), ())

    def _slot(self, name: str, shape: tuple[int, ...], permutation: tuple[int, ...]) -> Value:
        return self.builder.state(name, "slot", np.zeros(shape, np.float32), permutation)

    def _operation(self, rate: Value, step: Value) -> tuple[str, tuple[Value, ...], dict[str, Any]]:
        """The op of the recipe's optimizer, the scalars it reads, and its own attributes."""
        optimizer = self.recipe.optimizer
        if isinstance(optimizer, SGD) and not optimizer.momentum:
            return "sgd", (rate,), {}
        if isinstance(optimizer, SGD):
            attrs = {name: getattr(optimizer, name) for name in ("momentum", "dampening", "nesterov")}
            return "momentum", (rate, step), attrs
        if isinstance(optimizer, Adam):
            beta1, beta2 = optimizer.betas
            decoupled = isinstance(optimizer, AdamW)
            return "adam", (rate, step), dict(beta1=beta1, beta2=beta2, epsilon=optimizer.eps, decoupled=decoupled)
        assert isinstance(optimizer, Lion), f"no op for {type(optimizer).__name__}"
        return "lion", (rate,), dict(beta1=optimizer.betas[0], beta2=optimizer.betas[1])

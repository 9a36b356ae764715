"""The scale of the loss, which keeps gradients above the least numbers of 16 bits: constant, or as gradients allow.

A dynamic scale s is what torch.amp.GradScaler makes of it. The backward pass starts from s instead of 1. Where a scaled
gradient is infinite or NaN, s was too large (or the data bad): the step is skipped, and s halves. After so many steps
in a row without that it doubles. Skipped is everything but s and its counters: all of it lies behind a `gate`, which
ends the step where it is shut, so that nothing is copied, and no state written that would have to be restored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pockc.ir import Builder, Origin, Value
from pockc.recipe import Recipe

SCALE = "pockc.loss_scale"
STREAK = "pockc.finite_steps"  # steps with finite gradients in a row, since the scale last changed
SKIPPED = "pockc.skipped_steps"  # in all
GROWTH, BACKOFF = 2.0, 0.5
SMALLEST, LARGEST = 2.0**-126, 2.0**126  # where the scale and its reciprocal are normal numbers


def seed(builder: Builder, recipe: Recipe) -> Value:
    """The gradient of what is differentiated with respect to the loss: the scale, over the micro-steps of a step."""
    if not recipe.has_dynamic_scale:
        return builder.constant(recipe.loss_scale / recipe.accumulation, hint="seed")
    scale = builder.state(SCALE, "counter", np.asarray(recipe.loss_scale, np.float32))
    if recipe.accumulation == 1:
        return scale
    builder.origin = Origin(module="<loss scale>", phase="backward")
    return builder("mul", scale, builder.constant(1 / recipe.accumulation), hint="seed")


@dataclass(frozen=True, slots=True)
class Gate:
    """What a step needs of its gate: values that are there once it is open, and the new states in front of it.

    ``one`` is 1: whatever must wait is multiplied by it, or by ``unscale``, the reciprocal of the scale.
    """

    one: Value
    unscale: Value
    updates: dict[Value, Value]


def gate(builder: Builder, recipe: Recipe, gradients: Iterable[Value], before: Iterable[Value]) -> Gate:
    """Append the gate that only finite gradients open, and what becomes of the scale either way.

    Args:
        builder: With the state that `seed` made.
        recipe: With a dynamic scale.
        gradients: As they are, scaled.
        before: What a step that is skipped must have computed too: its loss, and new states that depend on no gate.
    """
    scale = next(value for value in builder.states if value.name == SCALE)
    streak, skipped = (builder.state(name, "counter", np.zeros((), np.int64)) for name in (STREAK, SKIPPED))
    inverse = builder("reciprocal", scale, hint="unscale")  # of the old scale: in front of what overwrites it
    one, zero = builder.constant(1, "i64"), builder.constant(0, "i64")
    finite = builder("all_finite", *gradients, hint="finite")
    overflow = builder("logical_not", finite, hint="overflow")
    steps = builder("add", streak, one, hint="streak")
    grows = builder("greater_equal", steps, builder.constant(recipe.scale_interval, "i64"), hint="grows")
    if_finite = builder("where", grows, builder.constant(GROWTH), builder.constant(1.0))
    factor = builder("where", finite, if_finite, builder.constant(BACKOFF))
    # Each is made by a node that reads no old state but one it may overwrite: none is left to a copy behind the gate.
    updates = {
        scale: builder("clip", builder("mul", scale, factor), low=SMALLEST, high=LARGEST, hint="scale"),
        streak: builder("where", builder("logical_or", overflow, grows), zero, steps, hint="streak"),
        skipped: builder("add", skipped, builder("cast", overflow, dtype="i64"), hint="skipped"),
    }
    passed = builder("gate", finite, *updates.values(), *before)
    return Gate(passed, builder("mul", inverse, passed, hint="unscale"), updates)


def zeros(builder: Builder, shape: tuple[int, ...]) -> Value:
    """Zeros that a state can be reset to in front of the gate.

    Not constant and not equal to others, or they would become one constant, which is copied into the states at the end.
    """
    scale = next(value for value in builder.states if value.name == SCALE)
    return builder("expand", builder("copy", builder("sub", scale, scale)), shape=shape)

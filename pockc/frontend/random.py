"""Dropout, the one source of random numbers: a counter-based generator keyed by a seed and the step."""

from __future__ import annotations

import numpy as np

from pockc.ir import Builder, Value

SEED = "pockc.seed"
STEP = "pockc.step"


def counter(builder: Builder, name: str) -> Value:
    """The i64 scalar state of this name, made on first use."""
    found = next((value for value in builder.states if value.name == name), None)
    return found or builder.state(name, "counter", np.zeros((), dtype=np.int64))


def dropout(builder: Builder, x: Value, probability: float, scale: float | None = None) -> Value:
    """Zeroes elements of a f32 tensor with this probability, and scales the others, by 1 / (1 - probability) if unsaid.

    Every dropout of a graph draws from a stream of its own, numbered in the order of the graph.
    """
    if probability == 0:
        return x
    if probability == 1:
        return builder("mul", x, builder.constant(0.0))
    stream = sum(node.op == "dropout_mask" for node in builder.nodes)
    seed, step = counter(builder, SEED), counter(builder, STEP)
    mask = builder("dropout_mask", seed, step, elements=x.type.elements, probability=float(probability), stream=stream)
    return builder("apply_mask", x, mask, scale=1.0 / (1.0 - probability) if scale is None else scale)

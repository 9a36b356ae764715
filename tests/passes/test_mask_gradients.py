"""Masked input gradients: the same bits in fewer calls, never with more memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pockc
from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, Node, Origin, Value, op_counts
from pockc.ops.common import f32
from pockc.optim import SGD
from pockc.passes import mask_gradients, memory
from pockc.recipe import Recipe

RECIPE = Recipe(trained={}, optimizer=SGD(lr=0.1))
MASKED = mask_gradients.MASKED
BOUNDS: dict[str, Any] = {"low": 0.0, "high": 1.0}


class Step:
    """The backward pass of ``conv(clip(x))``, made call by call in any order."""

    def __init__(self, channels: int = 3) -> None:
        self.builder = Builder()
        self.ct = self.builder.input("ct", f32(1, 6, 6, channels))
        self.x = self.builder.input("x", f32(1, 6, 6, 4))
        self.weight = self.builder.state("w", "parameter", np.ones((channels, 1, 1, 4), np.float32))

    def activation(self) -> Value:
        return self.builder("clip", self.x, **BOUNDS)

    def mask(self, y: Value) -> Value:
        return self.builder("range_mask", y, **BOUNDS)

    def gradient(self) -> Value:
        return self.builder("conv2d_grad_input", self.ct, self.weight, size=self.x.type.shape[1:3])

    def finish(self, gradient: Value, mask: Value, *others: Value, **attrs: Any) -> Graph:
        dx = self.builder("apply_mask", gradient, mask, **attrs)
        return self.builder.build({"dx": dx, **{f"other_{i}": value for i, value in enumerate(others)}})


def arrays(graph: Graph) -> dict[str, Array]:
    draw = np.random.default_rng(0)
    return {value.name: draw.standard_normal(value.type.shape).astype(np.float32) for value in graph.inputs}


def same_results(graph: Graph) -> Graph:
    """The graph after the pass, whose results are the same bits, in no more memory."""
    after = mask_gradients.run(graph, RECIPE)
    given = arrays(graph)
    before, now = evaluate(graph, given)[0], evaluate(after, given)[0]
    for name in graph.outputs:
        np.testing.assert_array_equal(before[name], now[name])
    assert memory.live_peak(after, RECIPE.workspace) <= memory.live_peak(graph, RECIPE.workspace)
    return after


def masked(graph: Graph) -> Node:
    (node,) = (node for node in graph.nodes if node.op == MASKED)
    return node


def test_an_activation_that_is_alive_is_the_gate() -> None:
    step = Step()
    y = step.activation()
    after = same_results(step.finish(step.gradient(), step.mask(y), y))
    assert op_counts(after.nodes) == {"clip": 1, MASKED: 1}
    assert masked(after).inputs[2].type == y.type


def test_a_mask_that_is_there_is_the_gate_where_the_activation_is_not() -> None:
    step = Step()
    mask = step.mask(step.activation())
    after = same_results(step.finish(step.gradient(), mask))
    assert op_counts(after.nodes) == {"clip": 1, "range_mask": 1, MASKED: 1}
    assert masked(after).inputs[2] is mask


def test_the_product_waits_for_an_activation_that_is_computed_again() -> None:
    step = Step()
    gradient = step.gradient()
    after = same_results(step.finish(gradient, step.mask(step.activation())))
    assert [node.op for node in after.nodes] == ["clip", MASKED]


def test_the_product_does_not_wait_where_that_takes_memory() -> None:
    step = Step(channels=64)
    gradient = step.gradient()
    mask = step.mask(step.activation())
    later = step.builder("neg", step.x)  # keeps x alive, besides the wide cotangent
    graph = step.finish(gradient, mask, later)
    assert mask_gradients.run(graph, RECIPE) is graph


def test_a_product_does_not_wait_behind_the_update_of_its_weight() -> None:
    step = Step()
    gradient = step.gradient()
    builder = step.builder
    rate, builder.origin = builder.constant(0.5), Origin(phase="update")
    new = builder("mul", step.weight, rate)
    builder.origin = Origin()
    mask = step.mask(step.activation())
    dx = builder("apply_mask", gradient, mask)
    graph = builder.build({"dx": dx}, {step.weight: new})
    assert mask_gradients.run(graph, RECIPE) is graph


@pytest.mark.parametrize("case", ["scaled", "read twice"])
def test_what_is_more_than_a_mask_stays(case: str) -> None:
    step = Step()
    mask = step.mask(step.activation())
    gradient = step.gradient()
    graph = step.finish(gradient, mask, scale=2.0) if case == "scaled" else step.finish(gradient, mask, gradient)
    assert mask_gradients.run(graph, RECIPE) is graph


def test_training_steps_give_the_same_bits_with_and_without(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = nn.Sequential(*layers, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images, labels = torch.randn(2, 3, 12, 12), np.array([0, 3])
    losses = []
    for disabled in (frozenset[str](), frozenset({"mask-gradients"})):
        options: dict[str, Any] = {"loss": "cross_entropy", "optimizer": SGD(lr=0.5), "entries": ("train_step",)}
        program = pockc.build(model, (images,), disabled=disabled, **options)
        assert (MASKED in op_counts(program.entries["train_step"].nodes)) == (not disabled)
        program.save(tmp_path / "model.pock")
        with pockc.Session(tmp_path / "model.pock") as session:
            steps = (session.run("train_step", input=images.numpy(), labels=labels) for _ in range(3))
            losses.append([float(step["loss"]) for step in steps])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][2]

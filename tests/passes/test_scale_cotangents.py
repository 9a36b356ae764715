"""A scale on a trained weight is moved to the cotangent where that is the smaller one; gradients stay the same."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Builder, Graph, TensorType, Value
from pockc.optim import SGD
from pockc.passes import cse, dce, differentiate, scale_cotangents
from pockc.recipe import Recipe
from pockc.verify import verify

TRAINED = ("one.weight", "two.weight")


def recipe(dtype: Literal["f32", "bf16"] = "f32") -> Recipe:
    return Recipe(trained=dict.fromkeys(TRAINED), optimizer=SGD(lr=0.1), dtype=dtype)


class Network(Builder):
    """Two convolutions of scaled weights, the first of two groups, on images of ``size`` by ``size`` pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)
        self.weights: dict[str, Value] = {}
        x = self.input("x", TensorType((1, size, size, 6)))
        y = self("clip", self.convolution(x, "one", (8, 3, 3, 3), groups=2), low=0.0, high=6.0)
        self.y = self.convolution(y, "two", (10, 3, 3, 8), groups=1)

    def convolution(self, x: Value, name: str, shape: tuple[int, ...], groups: int) -> Value:
        weight = self.state(name + ".weight", "parameter", self.random.uniform(-1, 1, shape).astype(np.float32))
        scale = self.constant(self.random.uniform(0.5, 1.5, (shape[0], 1, 1, 1)).astype(np.float32))
        self.weights[name] = self("mul", weight, scale)
        return self("conv2d", x, self.weights[name], padding=(1, 1, 1, 1), groups=groups)

    def gradients(self, options: Recipe) -> Graph:
        loss = self("reduce_mean", self("mul", self.y, self.y), axes=(0, 1, 2, 3))
        graph = differentiate.run(self.build({"loss": loss}), options)
        return dce.run(cse.run(graph, options), options)


def scaled_weights(graph: Graph) -> list[tuple[int, ...]]:
    """The shapes of products with a factor per output channel of a weight."""
    return [n.outputs[0].type.shape for n in graph.nodes if n.op == "mul" and n.inputs[1].type.shape[1:] == (1, 1, 1)]


def scaled_cotangents(graph: Graph) -> list[tuple[int, ...]]:
    """The shapes of products with such factors as a vector."""
    vectors = {node.outputs[0] for node in graph.nodes if node.op == "reshape"}
    return [node.outputs[0].type.shape for node in graph.nodes if node.op == "mul" and node.inputs[1] in vectors]


def test_one_small_product_replaces_two_large_ones_and_gradients_stay() -> None:
    before = Network(size=3).gradients(recipe())
    after = scale_cotangents.run(before, recipe())
    verify(after, "training")
    # Both weights are scaled forward, their gradients backward, and the input gradient reads the scaled weight.
    assert sorted(scaled_weights(before)) == [(8, 3, 3, 3)] * 2 + [(10, 3, 3, 8)] * 2
    assert sorted(scaled_weights(after)) == [(8, 3, 3, 3), (10, 3, 3, 8)]
    assert sorted(scaled_cotangents(after)) == [(1, 3, 3, 8), (1, 3, 3, 10)]
    (scaled,) = (node for node in after.nodes if node.op == "mul" and node.outputs[0].type.shape == (10, 3, 3, 8))
    assert [node.op for node in after.consumers()[scaled.outputs[0]]] == ["conv2d"]
    inputs = {"x": np.random.default_rng(1).standard_normal((1, 3, 3, 6)).astype(np.float32)}
    expected, found = evaluate(before, inputs)[0], evaluate(after, inputs)[0]
    assert found.keys() == expected.keys() and len(found) == 3
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("size", "moved"), [(3, {(1, 3, 3, 8), (1, 3, 3, 10)}), (6, {(1, 6, 6, 10)}), (12, set())])
def test_only_a_smaller_cotangent_is_scaled(size: int, moved: set[tuple[int, ...]]) -> None:
    after = scale_cotangents.run(Network(size).gradients(recipe()), recipe())
    assert {*scaled_cotangents(after)} == moved


def test_narrow_cotangents_are_not_rounded_again() -> None:
    before = Network(size=3).gradients(recipe("bf16"))
    assert scale_cotangents.run(before, recipe("bf16")) is before


def test_a_gradient_with_another_reader_stays() -> None:
    b = Network(size=3)
    cotangent = b.input("cotangent", TensorType((1, 3, 3, 10)))
    gradient = b(
        "conv2d_grad_weight", b.input("y", TensorType((1, 3, 3, 8))), cotangent, kernel=(3, 3), padding=(1,) * 4
    )
    scale = b.weights["two"]
    (maker,) = (node for node in b.nodes if scale in node.outputs)
    before = b.build({"gradient": gradient, "scaled": b("mul", gradient, maker.inputs[1])})
    assert scaled_cotangents(scale_cotangents.run(before, recipe())) == []

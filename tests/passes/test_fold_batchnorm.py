"""Frozen batch norms disappear into weights and biases; gradients stay those of the original model."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, TensorType, Value, op_counts
from pockc.optim import SGD
from pockc.passes import cse, dce, differentiate, fold, fold_batchnorm
from pockc.recipe import Recipe
from pockc.verify import verify

X = {"x": np.random.default_rng(1).standard_normal((2, 6, 6, 3)).astype(np.float32)}


def recipe(*trained: str, batchnorm: Literal["fold", "freeze"] = "fold") -> Recipe:
    return Recipe(trained=dict.fromkeys(trained), optimizer=SGD(lr=0.1), batchnorm=batchnorm)


class Network(Builder):
    """Channels-last convolutions, each followed by a batch norm in eval mode as the frontend writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)

    def tensor(self, name: str, *shape: int, kind: Literal["parameter", "buffer"] = "parameter") -> Value:
        return self.state(name, kind, self.random.uniform(0.5, 1.5, shape).astype(np.float32))

    def norm(self, y: Value, name: str) -> Value:
        channels = y.type.shape[-1]
        gamma, beta = self.tensor(f"{name}.gamma", channels), self.tensor(f"{name}.beta", channels)
        mean, variance = (self.tensor(f"{name}.{s}", channels, kind="buffer") for s in ("mean", "variance"))
        scale = self("mul", gamma, self("rsqrt", self("add", variance, self.constant(1e-5))))
        return self("add", self("mul", y, scale), self("sub", beta, self("mul", mean, scale)))

    def convolution(self, x: Value, name: str, groups: int = 1) -> Value:
        weight = self.tensor(f"{name}.weight", 3, 3, 3, x.type.shape[-1] // groups)
        return self("conv2d", x, weight, padding=(1, 1, 1, 1), groups=groups)


def network(bias: bool = True) -> Graph:
    """Two blocks, the second depthwise; ``bias``: with a bias before the first norm."""
    b = Network()
    y = b.convolution(b.input("x", TensorType((2, 6, 6, 3))), "one")
    y = b("add", y, b.tensor("one.bias", 3)) if bias else y
    y = b("clip", b.norm(y, "bn1"), low=0.0, high=6.0)
    y = b.norm(b.convolution(y, "two", groups=3), "bn2")
    return b.build({"loss": b("reduce_mean", b("mul", y, y), axes=(0, 1, 2, 3))})


def lowered(graph: Graph, options: Recipe) -> Graph:
    for step in (fold.run, fold_batchnorm.run, fold.run, cse.run, dce.run):
        graph = step(graph, options)
        verify(graph, "imported")
    return graph


@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_norm_leaves_one_convolution_and_one_bias(bias: bool) -> None:
    before, options = network(bias), recipe()
    after = lowered(before, options)
    assert [node.op for node in after.nodes][:5] == ["conv2d", "add", "clip", "conv2d", "add"]
    assert len(after.nodes) == 7
    np.testing.assert_allclose(evaluate(after, X)[0]["loss"], evaluate(before, X)[0]["loss"], rtol=1e-5)
    assert {value.name for value in after.states} >= {"one.weight.folded", "two.weight.folded"}


def gradients(graph: Graph, options: Recipe) -> dict[str, Array]:
    outputs, _ = evaluate(differentiate.run(graph, options), X)
    return outputs


@pytest.mark.parametrize("trained", [("one.weight",), ("bn1.beta", "two.weight"), ("one.bias", "bn2.beta")])
def test_gradients_are_those_of_the_original_parameters(trained: tuple[str, ...]) -> None:
    options = recipe(*trained)
    before, after = network(), lowered(network(), options)
    assert all(after.state(name) for name in trained)
    expected, found = gradients(before, options), gradients(after, options)
    assert found.keys() == expected.keys() and len(found) == 1 + len(trained)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_trained_weight_is_scaled_by_a_node() -> None:
    after = lowered(network(), recipe("one.weight"))
    assert [node.op for node in after.nodes][:4] == ["mul", "conv2d", "add", "clip"]
    assert after.nodes[0].inputs[0] is after.state("one.weight")


def test_a_trained_beta_is_added_to_the_rest_of_the_shift() -> None:
    after = lowered(network(bias=False), recipe("bn1.beta"))
    assert [node.op for node in after.nodes][:4] == ["conv2d", "sub", "add", "clip"]


def test_a_trained_gamma_is_left_alone() -> None:
    before, options = network(), recipe("bn1.gamma")
    after = lowered(before, options)
    assert [node.op for node in after.nodes][:4] == ["conv2d", "add", "mul", "mul"]
    np.testing.assert_allclose(evaluate(after, X)[0]["loss"], evaluate(before, X)[0]["loss"], rtol=1e-5)


def test_nothing_happens_under_another_policy() -> None:
    graph = network()
    assert fold_batchnorm.run(graph, recipe(batchnorm="freeze")) is graph


def test_a_convolution_with_another_reader_keeps_its_scale() -> None:
    b = Network()
    y = b.convolution(b.input("x", TensorType((2, 6, 6, 3))), "one")
    before = b.build({"loss": b("reduce_mean", b.norm(y, "bn"), axes=(0, 1, 2, 3)), "features": y})
    after = fold_batchnorm.run(before, recipe())
    assert op_counts(after.nodes) == op_counts(before.nodes)


def test_a_sum_with_another_reader_is_not_computed_twice() -> None:
    b = Network()
    x = b.input("x", TensorType((4, 3)))
    y = b("add", x, b.tensor("first", 3))
    before = b.build({"y": y, "z": b("add", y, b.tensor("second", 3))})
    assert op_counts(fold_batchnorm.run(before, recipe()).nodes) == {"add": 2}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_norm_after_a_linear_layer_is_folded(transposed: bool) -> None:
    b = Network()
    x = b.input("x", TensorType((4, 5)))
    weight = b.tensor("weight", *((3, 5) if transposed else (5, 3)))
    y = b("add", b("matmul", x, weight, transpose_b=transposed), b.tensor("bias", 3))
    before = b.build({"y": b.norm(y, "bn")})
    after = lowered(before, recipe())
    assert [node.op for node in after.nodes] == ["matmul", "add"]
    inputs = {"x": np.random.default_rng(2).standard_normal((4, 5)).astype(np.float32)}
    np.testing.assert_allclose(evaluate(after, inputs)[0]["y"], evaluate(before, inputs)[0]["y"], rtol=1e-5)


def test_a_product_of_two_activations_keeps_its_scale() -> None:
    b = Network()
    x = b.input("x", TensorType((4, 4)))
    before = b.build({"y": b("mul", b("matmul", x, x), b.tensor("scale", 4))})
    assert [node.op for node in fold_batchnorm.run(before, recipe()).nodes] == ["matmul", "mul"]


def test_two_norms_in_a_row_are_both_folded() -> None:
    b = Network()
    y = b.convolution(b.input("x", TensorType((2, 6, 6, 3))), "one")
    before = b.build({"loss": b.norm(b.norm(y, "bn1"), "bn2")})
    after = lowered(before, recipe())
    assert [node.op for node in after.nodes] == ["conv2d", "add"]
    np.testing.assert_allclose(evaluate(after, X)[0]["loss"], evaluate(before, X)[0]["loss"], rtol=1e-4)


def test_origins_stay_those_of_the_layers() -> None:
    b = Network()
    x = b.input("x", TensorType((2, 6, 6, 3)))
    b.origin = replace(b.origin, module="conv")
    y = b.convolution(x, "one")
    b.origin = replace(b.origin, module="bn")
    after = lowered(b.build({"y": b.norm(y, "bn")}), recipe())
    assert [(node.op, node.origin.module) for node in after.nodes] == [("conv2d", "conv"), ("add", "bn")]

"""Biases and activations move into products, unless the backward pass needs what lies between."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Builder, Graph, Origin, TensorType, Value, op_counts
from pockc.optim import SGD
from pockc.passes import canonicalize, cse, dce, differentiate, fold, fold_batchnorm, fuse, layout
from pockc.recipe import Recipe
from pockc.verify import verify

Body = Callable[[Builder, Value], Value]


def recipe(*trained: str) -> Recipe:
    return Recipe(trained=dict.fromkeys(trained), optimizer=SGD(lr=0.1))


def parameter(b: Builder, name: str, *shape: int) -> Value:
    random = np.random.default_rng(len(b.states))
    return b.state(name, "parameter", random.standard_normal(shape).astype(np.float32))


def check(before: Graph, after: Graph) -> None:
    """Both compute the same."""
    verify(after, "lowered")
    random = np.random.default_rng(0)
    inputs = {v.name: random.standard_normal(v.type.shape).astype(np.float32) for v in before.inputs}
    expected, found = evaluate(before, inputs)[0], evaluate(after, inputs)[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def convolution(b: Builder, x: Value) -> Value:
    return b("conv2d", x, parameter(b, "w", 4, 3, 3, x.type.shape[-1]), padding=(1, 1, 1, 1))


def linear(b: Builder, x: Value) -> Value:
    return b("matmul", x, parameter(b, "w", 4, x.type.shape[-1]), transpose_b=True)


def fused(body: Body, shape: tuple[int, ...] = (2, 5, 5, 3)) -> Graph:
    builder = Builder()
    before = builder.build({"y": body(builder, builder.input("x", TensorType(shape)))})
    after = fuse.run(before, recipe())
    check(before, after)
    return after


ACTIVATIONS: dict[str, Body] = {
    "clip": lambda b, x: b("clip", x, low=-0.5, high=1.0),
    "gelu": lambda b, x: b("gelu", x),
    "gelu_tanh": lambda b, x: b("gelu", x, approximate=True),
    "silu": lambda b, x: b("silu", x),
    "hardswish": lambda b, x: b("hardswish", x),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("product", [convolution, linear])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_takes_bias_and_activation(activation: str, product: Body, biased: bool) -> None:
    def body(b: Builder, x: Value) -> Value:
        y = product(b, x)
        y = b("add", y, parameter(b, "bias", 4)) if biased else y
        return ACTIVATIONS[activation](b, y)

    after = fused(body)
    assert len(after.nodes) == 1
    assert after.nodes[0].attrs["activation"] == activation
    assert len(after.nodes[0].inputs) == 2 + biased


def test_a_bias_may_come_first_and_have_leading_ones() -> None:
    after = fused(lambda b, x: b("add", parameter(b, "bias", 1, 1, 4), linear(b, x)), (2, 7, 3))
    assert [node.op for node in after.nodes] == ["reshape", "matmul"]


def test_a_bias_that_is_computed_after_the_product_is_in_place_before_it() -> None:
    def body(b: Builder, x: Value) -> Value:
        y = linear(b, x)
        return b("add", y, b("exp", parameter(b, "bias", 4)))

    assert [node.op for node in fused(body).nodes] == ["exp", "matmul"]


@pytest.mark.parametrize("shape", [(), (1,), (2, 4), (1, 1, 4)])
def test_what_is_no_bias_vector_is_added_separately(shape: tuple[int, ...]) -> None:
    after = fused(lambda b, x: b("add", linear(b, x), parameter(b, "bias", *shape)), (2, 3))
    assert [node.op for node in after.nodes] == ["matmul", "add"]


def test_a_product_with_another_reader_stays() -> None:
    def body(b: Builder, x: Value) -> Value:
        y = linear(b, x)
        return b("mul", y, b("clip", y, low=0.0, high=inf))

    assert op_counts(fused(body).nodes) == {"matmul": 1, "clip": 1, "mul": 1}


def test_a_product_that_is_a_result_stays() -> None:
    b = Builder()
    y = linear(b, b.input("x", TensorType((2, 3))))
    before = b.build({"raw": y, "y": b("clip", y, low=0.0, high=inf)})
    after = fuse.run(before, recipe())
    check(before, after)
    assert [node.op for node in after.nodes] == ["matmul", "clip"]


def test_only_the_first_of_two_biases_and_activations_is_taken() -> None:
    def body(b: Builder, x: Value) -> Value:
        y = b("add", b("add", linear(b, x), parameter(b, "b1", 4)), parameter(b, "b2", 4))
        return b("silu", b("silu", y))

    assert [node.op for node in fused(body).nodes] == ["matmul", "add", "silu", "silu"]


def test_a_bias_after_an_activation_stays_after_it() -> None:
    def body(b: Builder, x: Value) -> Value:
        return b("add", b("silu", linear(b, x)), parameter(b, "bias", 4))

    assert [node.op for node in fused(body).nodes] == ["matmul", "add"]


def test_the_fused_node_has_the_origin_of_the_product() -> None:
    def body(b: Builder, x: Value) -> Value:
        b.origin = Origin("layer.conv")
        y = convolution(b, x)
        b.origin = Origin("layer.relu")
        return b("clip", y, low=0.0, high=inf)

    assert [node.origin.module for node in fused(body).nodes] == ["layer.conv"]


@pytest.mark.parametrize(("activation", "left"), [("clip", 0), ("gelu", 1), ("silu", 1)])
def test_the_backward_pass_decides_what_is_fused(activation: str, left: int) -> None:
    b = Builder()
    x = b.input("x", TensorType((2, 3)))
    y = ACTIVATIONS[activation](b, b("add", linear(b, x), parameter(b, "bias", 4)))
    forward = b.build({"loss": b("sum_squares", y)})
    before = differentiate.run(forward, recipe("w", "bias"))
    after = fuse.run(before, recipe("w", "bias"))
    check(before, after)
    counts = op_counts([node for node in after.nodes if node.origin.phase == "forward"])
    assert "add" not in counts
    assert counts.get(activation, 0) == left


def test_an_addition_that_updates_a_state_stays() -> None:
    b = Builder()
    x = b.input("x", TensorType((1, 3)))
    gradient = linear(b, x)
    accumulated = b.state("w.accumulated", "slot", np.zeros((1, 4), np.float32))
    b.origin = Origin(phase="update")
    before = b.build({}, {accumulated: b("add", accumulated, gradient)})
    assert [node.op for node in fuse.run(before, recipe()).nodes] == ["matmul", "add"]


def mobilenet_block() -> Graph:
    """Expand, depthwise, project, add: NCHW with a transpose around every convolution, norms in eval mode."""
    b = Builder()

    def layer(x: Value, name: str, filters: int, kernel: int, groups: int, relu: bool) -> Value:
        weight = parameter(b, f"{name}.weight", filters, x.type.shape[1] // groups, kernel, kernel)
        gamma, beta = (parameter(b, f"{name}.{s}", filters) for s in ("gamma", "beta"))
        mean = b.state(f"{name}.mean", "buffer", np.full(filters, 0.1, np.float32))
        variance = b.state(f"{name}.variance", "buffer", np.full(filters, 0.7, np.float32))
        y = b(
            "conv2d",
            b("transpose", x, permutation=(0, 2, 3, 1)),
            b("transpose", weight, permutation=(0, 2, 3, 1)),
            padding=(kernel // 2,) * 4,
            groups=groups,
        )
        y = b("transpose", b("transpose", y, permutation=(0, 3, 1, 2)), permutation=(0, 2, 3, 1))
        scale = b("mul", gamma, b("rsqrt", b("add", variance, b.constant(1e-5))))
        y = b("add", b("mul", y, scale), b("sub", beta, b("mul", mean, scale)))
        y = b("transpose", y, permutation=(0, 3, 1, 2))
        return b("clip", y, low=0.0, high=6.0) if relu else y

    x = b("transpose", b.input("x", TensorType((2, 6, 6, 4))), permutation=(0, 3, 1, 2))
    y = layer(x, "expand", 8, 1, 1, relu=True)
    y = layer(y, "depthwise", 8, 3, 8, relu=True)
    y = b("add", x, layer(y, "project", 4, 1, 1, relu=False))
    return b.build({"y": b("transpose", y, permutation=(0, 2, 3, 1))})


COMMON = (canonicalize.run, layout.run, canonicalize.run, fold_batchnorm.run, fold.run, cse.run, dce.run)


def test_a_frozen_mobilenet_block_is_three_convolutions_and_an_addition() -> None:
    before = after = mobilenet_block()
    for step in (*COMMON, fuse.run):
        after = step(after, recipe())
    check(before, after)
    assert [node.op for node in after.nodes] == ["conv2d", "conv2d", "conv2d", "add"]
    assert [node.attrs.get("activation") for node in after.nodes] == ["clip", "clip", "none", None]
    assert all(len(node.inputs) == 3 for node in after.nodes[:3])


def test_a_trained_depthwise_weight_adds_its_scaling_alone() -> None:
    before = after = mobilenet_block()
    for step in (*COMMON, fuse.run):
        after = step(after, recipe("depthwise.weight"))
    check(before, after)
    assert op_counts(after.nodes) == {"conv2d": 3, "add": 1, "mul": 1}
    assert after.states[after.state("depthwise.weight")].permutation == (0, 2, 3, 1)


def test_gradient_of_a_table_adds_to_the_one_that_is_there() -> None:
    b = Builder()
    ct, ids = b.input("ct", TensorType((4, 3))), b.constant(np.array([1, 0, 1, 4]), "i64")
    base = b("exp", b.input("base", TensorType((5, 3))))
    scatter = b("embedding_grad", ct, ids, rows=5)
    before = b.build({"y": b("add", base, scatter)})
    after = fuse.run(before, recipe())
    check(before, after)
    assert [node.op for node in after.nodes] == ["exp", "embedding_grad"]
    twice = b.build({"y": b("add", base, scatter), "gradient": scatter})
    assert op_counts(fuse.run(twice, recipe()).nodes)["add"] == 1

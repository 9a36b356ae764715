"""Channels-last without transposes, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Builder, Graph, Node, TensorType, Value, op_counts
from pockc.optim import SGD
from pockc.passes import canonicalize, layout
from pockc.passes.layout_rules import axis_groups
from pockc.recipe import Recipe
from pockc.verify import verify

RECIPE = Recipe(trained={}, optimizer=SGD(lr=0.1))
NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


class Network(Builder):
    """Builds graphs as the frontend does: NCHW, with a pair of transposes around every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)

    def parameter(self, name: str, *shape: int) -> Value:
        return self.state(name, "parameter", self.random.standard_normal(shape).astype(np.float32))

    def convolution(self, x: Value, filters: int, kernel: int = 1, groups: int = 1, stride: int = 1) -> Value:
        index = sum(state.kind == "parameter" for state in self.states.values())
        weight = self.parameter(f"conv{index}.weight", filters, x.type.shape[1] // groups, kernel, kernel)
        bias = self.parameter(f"conv{index}.bias", filters)
        return self.wrapped(x, weight, bias, groups=groups, stride=(stride, stride), padding=(kernel // 2,) * 4)

    def wrapped(self, x: Value, weight: Value, bias: Value, **attrs: Any) -> Value:
        weight = self("transpose", weight, permutation=NHWC)
        y = self("conv2d", self("transpose", x, permutation=NHWC), weight, **attrs)
        return self("transpose", self("add", y, bias), permutation=NCHW)

    def relu(self, x: Value) -> Value:
        return self("clip", x, low=0.0, high=inf)


Body = Callable[[Network, Value], Value]


def relaid(body: Body, shape: tuple[int, ...] = (2, 3, 8, 8)) -> Graph:
    """The graph after layout, which must compute what it did before."""
    network = Network()
    before = network.build({"y": body(network, network.input("x", TensorType(shape)))})
    after = canonicalize.run(layout.run(canonicalize.run(before, RECIPE), RECIPE), RECIPE)
    verify(after, "imported")
    x = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    expected, found = evaluate(before, x)[0]["y"], evaluate(after, x)[0]["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    return after


def transposes(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "transpose"]


def pooled(b: Network, x: Value) -> Value:
    return b("reduce_mean", x, axes=(2, 3))


def residual(b: Network, x: Value) -> Value:
    x = b.relu(b.convolution(x, 4, 3, stride=2))
    y = b.convolution(b.relu(b.convolution(x, 4, 3)), 4, 3)
    return pooled(b, b.relu(b("add", y, x)))


def squeeze_excitation(b: Network, x: Value) -> Value:
    x = b("hardswish", b.convolution(x, 6, 3))
    gate = b("silu", b.convolution(b("reduce_mean", x, axes=(2, 3), keepdims=True), 2))
    gate = b("sigmoid", b.convolution(gate, 6))
    return pooled(b, b.convolution(b("mul", gate, x), 4))


def dense_block(b: Network, x: Value) -> Value:
    x = b.convolution(x, 4)
    x = b("concat", x, b.relu(b.convolution(x, 3, 3)), axis=1)
    return pooled(b, b.convolution(b("slice", x, axis=1, start=2, stop=7), 2))


def layer_scale(b: Network, x: Value) -> Value:
    x = b.convolution(x, 4)
    return pooled(b, b("add", x, b("mul", b.convolution(x, 4), b.parameter("gamma", 4, 1, 1))))


def stochastic_depth(b: Network, x: Value) -> Value:
    x = b.convolution(x, 4)
    return pooled(b, b("mul", x, b.constant(np.array([0.0, 2.0]).reshape(2, 1, 1, 1))))


def upsampling(b: Network, x: Value) -> Value:
    x = b.convolution(x, 4)
    x = b("expand", b("reshape", x, shape=(2, 4, 8, 1, 8, 1)), shape=(2, 4, 8, 2, 8, 2))
    return pooled(b, b.convolution(b("reshape", x, shape=(2, 4, 16, 16)), 3))


def user_permutes(b: Network, x: Value) -> Value:
    x = b.convolution(x, 4)
    y = b("layer_norm", b("transpose", x, permutation=NHWC), epsilon=1e-5)
    return pooled(b, b("add", x, b("transpose", y, permutation=NCHW)))


def padded_in_between(b: Network, x: Value) -> Value:
    x = b("pad", b.relu(b.convolution(x, 4)), before=(0, 0, 0, 1), after=(0, 0, 1, 0))
    return pooled(b, b.convolution(x, 4, 3))


def unit_images(b: Network, x: Value) -> Value:
    x = b("reduce_mean", b.convolution(x, 4), axes=(2, 3), keepdims=True)
    x = b("reshape", b.convolution(x, 5), shape=(2, 5))
    return b("matmul", x, b.parameter("head", 3, 5), transpose_b=True)


def patches(b: Network, x: Value) -> Value:
    x = b("reshape", b.convolution(x, 4, 3, stride=2), shape=(2, 4, 16))
    return b("matmul", b("transpose", x, permutation=(0, 2, 1)), b.parameter("head", 3, 4), transpose_b=True)


def masked(b: Network, x: Value) -> Value:
    x, y = b.convolution(x, 4), b.convolution(x, 4)
    return pooled(b, b("where", b("less", x, y), b("maximum", x, b.constant(0.5)), b("neg", y)))


def normalised(b: Network, x: Value) -> Value:
    x = b.convolution(x, 4)
    largest = b("reduce_max", x, axes=(1,), keepdims=True)
    return pooled(b, b("div", x, b("add", b("exp", largest), b("reduce_sum", b("exp", x), axes=(1,), keepdims=True))))


def row_means(b: Network, x: Value) -> Value:
    return b("matmul", b("reduce_mean", b("exp", b.convolution(x, 4)), axes=(1,)), b.parameter("head", 8, 3))


@pytest.mark.parametrize(
    "body",
    [
        residual,
        squeeze_excitation,
        dense_block,
        layer_scale,
        stochastic_depth,
        upsampling,
        user_permutes,
        padded_in_between,
        unit_images,
        patches,
        masked,
        normalised,
        row_means,
    ],
)
def test_the_only_transpose_left_is_that_of_the_input(body: Body) -> None:
    after = relaid(body)
    assert [node.inputs for node in transposes(after)] == [(after.inputs[0],)]


def reshaped_within(b: Network, x: Value, shape: tuple[int, ...]) -> Value:
    return b("reshape", b("tanh", b("reshape", x, shape=shape)), shape=x.type.shape)


def column_means(b: Network, x: Value) -> Value:
    batch, channels, _, width = x.type.shape
    return b("reshape", b("reduce_mean", x, axes=(2,)), shape=(batch, channels, 1, width))


@pytest.mark.parametrize("seed", range(40))
def test_random_networks_compute_the_same(seed: int) -> None:
    choose = np.random.default_rng(seed)

    def same_size(x: Value, earlier: list[Value]) -> Value:
        candidates = [v for v in (x, *earlier) if v.type == x.type]
        return candidates[choose.integers(len(candidates))]

    def body(b: Network, x: Value) -> Value:
        channels: dict[str, Body] = {
            "vector": lambda b, x: b("mul", x, b.constant(choose.standard_normal((x.type.shape[1], 1, 1)))),
            "row": lambda b, x: b("add", x, b.constant(choose.standard_normal(x.type.shape[3]))),
            "image": lambda b, x: b("sub", b.constant(choose.standard_normal(x.type.shape[1:])), x),
            "batch": lambda b, x: b("mul", x, b("reduce_mean", x, axes=(1, 2, 3), keepdims=True)),
            "largest": lambda b, x: b("sub", x, b("reduce_max", x, axes=(2, 3), keepdims=True)),
            "rows": lambda b, x: b("add", x, b("reduce_mean", x, axes=(0, 1, 2))),
            "relu": lambda b, x: b.relu(x),
            "convolution": lambda b, x: b.convolution(x, 4, 3),
            "residual": lambda b, x: b("add", x, same_size(x, earlier)),
            "concat": lambda b, x: b("concat", x, same_size(x, earlier), axis=int(choose.integers(1, 3))),
            "slice": lambda b, x: b("slice", x, axis=1, start=1, stop=x.type.shape[1]),
            "pad": lambda b, x: b("pad", x, before=(0, 0, 1, 0), after=(0, 1, 0, 0), value=0.5),
            "cumsum": lambda b, x: b("cumsum", b("mul", x, b.constant(0.1)), axis=1),
            "column means": lambda b, x: b("add", x, column_means(b, x)),
            "swap": lambda b, x: b("transpose", x, permutation=(0, 1, 3, 2)),
            "merge": lambda b, x: reshaped_within(b, x, (2, x.type.shape[1], x.type.shape[2] * x.type.shape[3])),
            "flatten": lambda b, x: reshaped_within(b, x, (2, x.type.elements // 2)),
            "split": lambda b, x: reshaped_within(b, x, (1, *x.type.shape)),
        }
        earlier: list[Value] = []
        x = b.convolution(x, 4, 3)
        for name in choose.choice(list(channels), 12):
            earlier.append(x)
            x = channels[name](b, x)
            x = b.convolution(x, 4) if x.type.shape[1] < 2 else x
        return x

    relaid(body, (2, 3, 4, 5))


def test_a_flattened_image_keeps_one_transpose() -> None:
    def body(b: Network, x: Value) -> Value:
        x = b("reshape", b.relu(b.convolution(b.convolution(x, 4), 4)), shape=(2, 4 * 64))
        return b("matmul", x, b.parameter("head", 3, 256), transpose_b=True)

    after = relaid(body)
    assert len(transposes(after)) == 2
    assert [node.op for node in after.nodes][-3:] == ["transpose", "reshape", "matmul"]


def test_channel_shuffle_takes_one_transpose() -> None:
    def body(b: Network, x: Value) -> Value:
        x = b("reshape", b.convolution(x, 6), shape=(2, 2, 3, 8, 8))
        x = b("reshape", b("transpose", x, permutation=(0, 2, 1, 3, 4)), shape=(2, 6, 8, 8))
        return pooled(b, b.convolution(x, 4))

    assert len(transposes(relaid(body))) == 2


def test_split_attention_heads_take_no_more_transposes_than_before() -> None:
    def body(b: Network, x: Value) -> Value:
        x = b("transpose", b("reshape", x, shape=(2, 5, 3, 4)), permutation=(0, 2, 1, 3))
        x, _ = b.multi("attention", x, x, x, scale=0.5)
        x = b("reshape", b("transpose", x, permutation=(0, 2, 1, 3)), shape=(2, 5, 12))
        return b("matmul", x, b.parameter("out", 12, 12), transpose_b=True)

    assert len(transposes(relaid(body, (2, 5, 12)))) == 2


def test_dropout_sees_the_user_s_order_of_elements() -> None:
    def body(b: Network, x: Value) -> Value:
        x = b.convolution(x, 4)
        mask = b.constant(np.random.default_rng(3).integers(0, 256, 64), dtype="u8")
        return pooled(b, b.convolution(b("apply_mask", x, mask, scale=2.0), 4))

    assert len(transposes(relaid(body))) == 3


def test_an_image_as_result_comes_out_as_the_user_wrote_it() -> None:
    after = relaid(lambda b, x: b.relu(b.convolution(x, 4)))
    assert after.outputs["y"].type.shape == (2, 4, 8, 8)
    assert len(transposes(after)) == 2


def test_weights_are_stored_as_convolutions_read_them() -> None:
    after = relaid(lambda b, x: pooled(b, b.convolution(b.convolution(x, 4, 3), 4, 3, groups=4)))
    for name, shape in (("conv0.weight", (4, 3, 3, 3)), ("conv2.weight", (4, 3, 3, 1))):
        weight = after.state(name)
        state = after.states[weight]
        assert weight.type.shape == shape
        assert state.permutation == NHWC
        assert state.data is not None and state.data.flags.c_contiguous
    network = Network()
    original = network.parameter("conv0.weight", 4, 3, 3, 3)
    np.testing.assert_array_equal(after.states[after.state("conv0.weight")].original(), network.states[original].data)


def test_a_weight_that_is_shared_by_two_convolutions_is_stored_once() -> None:
    def body(b: Network, x: Value) -> Value:
        weight, bias = b.parameter("w", 3, 3, 3, 3), b.parameter("b", 3)
        for _ in range(2):
            x = b.wrapped(x, weight, bias, padding=(1, 1, 1, 1))
        return pooled(b, x)

    after = relaid(body)
    assert after.states[after.state("w")].permutation == NHWC
    assert op_counts(after.nodes)["transpose"] == 1


def test_a_weight_with_another_reader_keeps_its_transpose() -> None:
    def body(b: Network, x: Value) -> Value:
        weight, bias = b.parameter("w", 3, 3, 3, 3), b.parameter("b", 3)
        norm = b("sum_squares", weight)
        return b("mul", pooled(b, b.wrapped(x, weight, bias, padding=(1, 1, 1, 1))), norm)

    after = relaid(body)
    assert after.states[after.state("w")].permutation == ()
    assert len(transposes(after)) == 2


def test_a_weight_that_is_read_in_two_layouts_keeps_its_own() -> None:
    def body(b: Network, x: Value) -> Value:
        weight = b.parameter("w", 3, 3, 3, 3)
        x = b("transpose", x, permutation=NHWC)
        for permutation in (NHWC, (0, 3, 2, 1)):
            x = b("conv2d", x, b("transpose", weight, permutation=permutation), padding=(1, 1, 1, 1))
        return x

    after = relaid(body)
    assert after.states[after.state("w")].permutation == ()
    assert len(transposes(after)) == 3


@pytest.mark.parametrize("updated", [False, True])
def test_a_weight_that_is_itself_a_result_keeps_its_layout(updated: bool) -> None:
    network = Network()
    x = network.input("x", TensorType((1, 3, 4, 4)))
    weight, bias = network.parameter("w", 3, 3, 1, 1), network.parameter("b", 3)
    y = network.wrapped(x, weight, bias)
    new = network("neg", network.parameter("other", 3, 3, 1, 1))
    before = network.build({"y": y}, {weight: new}) if updated else network.build({"y": y, "w": weight})
    after = layout.run(before, RECIPE)
    assert after.states[after.state("w")].permutation == ()
    assert before.state("w") is after.state("w")


def test_origins_and_state_names_survive() -> None:
    network = Network()
    x = network.input("x", TensorType((1, 3, 4, 4)))
    before = network.build({"y": pooled(network, network.convolution(x, 4))})
    after = layout.run(before, RECIPE)
    assert [value.name for value in after.states] == [value.name for value in before.states]
    assert {node.origin for node in after.nodes} == {node.origin for node in before.nodes}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((2, 3, 4), (2, 12), [([0], [0]), ([1, 2], [1])]),
        ((6, 4), (2, 3, 4), [([0], [0, 1]), ([1], [2])]),
        ((2, 3), (3, 2), [([0, 1], [0, 1])]),
        ((2, 1, 3), (2, 3), [([0], [0]), ([1], []), ([2], [1])]),
        ((4, 1), (4, 1, 1), [([0], [0]), ([1], [1, 2])]),
        ((1, 1), (), [([0], []), ([1], [])]),
    ],
)
def test_a_reshape_splits_into_groups_of_axes(
    source: tuple[int, ...], target: tuple[int, ...], expected: list[tuple[list[int], list[int]]]
) -> None:
    assert axis_groups(source, target) == expected

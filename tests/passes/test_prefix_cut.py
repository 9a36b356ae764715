from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pockc.errors import UserError
from pockc.interp import evaluate
from pockc.ir import Builder, Graph, TensorType, Value
from pockc.optim import SGD
from pockc.passes import prefix_cut
from pockc.recipe import Recipe

RECIPE = Recipe(trained={"w": None}, optimizer=SGD(lr=0.1))
BATCH, WIDTH = 2, 4
RANDOM = np.random.default_rng(0)

Front = Callable[[Builder, Value], Value]


def product(build: Builder, x: Value, width: int = WIDTH) -> Value:
    weight = RANDOM.standard_normal((x.type.shape[-1], width)).astype(np.float32)
    return build("matmul", x, build.constant(weight), transpose_a=False, transpose_b=False)


def network(front: Front) -> Graph:
    """A frozen part, then a product with the trained `w`."""
    build = Builder()
    x = front(build, build.input("x", TensorType((BATCH, WIDTH))))
    w = build.state("w", "parameter", np.ones((x.type.shape[-1], 3), np.float32))
    return build.build({"logits": build("matmul", x, w, transpose_a=False, transpose_b=False)})


def boundary_of(graph: Graph) -> dict[str, Value]:
    return prefix_cut.find(graph, RECIPE).values


def made_by(graph: Graph) -> list[str]:
    makers = graph.producers()
    return [makers[value].op for value in boundary_of(graph).values()]


def test_both_parts_together_are_the_whole() -> None:
    graph = network(lambda build, x: build("clip", product(build, x), low=0.0, high=6.0))
    boundary = boundary_of(graph)
    encode, rest = prefix_cut.encoder(graph, boundary), prefix_cut.behind(graph, boundary)
    x = RANDOM.standard_normal((BATCH, WIDTH)).astype(np.float32)
    encoded, _ = evaluate(encode, {"x": x})
    expected = evaluate(graph, {"x": x})[0]["logits"]

    assert [value.name for value in rest.inputs] == ["encoded.0"]
    assert np.array_equal(evaluate(rest, encoded)[0]["logits"], expected)
    whole = prefix_cut.joined(encode, rest, ["x"])
    assert [value.name for value in whole.inputs] == ["x"]
    assert np.array_equal(evaluate(whole, {"x": x})[0]["logits"], expected)


def test_a_residual_stream_crosses_once() -> None:
    def front(build: Builder, x: Value) -> Value:
        x = product(build, x)
        return build("add", x, product(build, x))

    assert made_by(network(front)) == ["add"]


def test_a_sum_that_is_read_beside_one_of_its_terms_is_made_again() -> None:
    def front(build: Builder, x: Value) -> Value:
        wide = product(build, x, 8)
        total = build("add", wide, build.constant(np.ones(8, np.float32)))
        w = build.state("trained", "parameter", np.ones(8, np.float32))
        return build("add", build("mul", wide, w), total)

    recipe = Recipe(trained={"w": None, "trained": None}, optimizer=SGD(lr=0.1))
    graph = network(front)
    values = prefix_cut.find(graph, recipe).values
    assert [graph.producers()[value].op for value in values.values()] == ["matmul"]


def test_what_is_made_of_inputs_by_cheap_nodes_does_not_cross() -> None:
    def front(build: Builder, x: Value) -> Value:
        mask = build("cast", build.input("mask", TensorType((BATCH, 1), "i64")), dtype="f32")
        wide = build("expand", build("neg", mask), shape=(BATCH, 8))
        hidden = product(build, build("mul", product(build, x, 8), wide), 8)
        return build("mul", hidden, build("add", wide, build.state("w2", "parameter", np.ones((1, 8), np.float32))))

    recipe = Recipe(trained={"w": None, "w2": None}, optimizer=SGD(lr=0.1))
    graph = network(front)
    boundary = prefix_cut.find(graph, recipe).values
    assert [value.type.shape for value in boundary.values()] == [(BATCH, 8)]
    assert [value.name for value in prefix_cut.behind(graph, boundary).inputs] == ["encoded.0", "mask"]
    assert [value.name for value in prefix_cut.encoder(graph, boundary).inputs] == ["x", "mask"]


@pytest.mark.parametrize(
    ("op", "attrs", "crossing"),
    [("dequantize", {"scale": 0.1, "zero_point": 3}, "quantize"), ("reduce_mean", {"axes": (1,)}, "reduce_mean")],
)
def test_the_smaller_side_of_a_cheap_node_crosses(op: str, attrs: dict[str, Any], crossing: str) -> None:
    def front(build: Builder, x: Value) -> Value:
        x = product(build, x)
        if op == "dequantize":
            x = build("quantize", x, **attrs)
        x = build(op, x, **attrs)
        return build("reshape", x, shape=(BATCH, x.type.elements // BATCH))

    graph = network(front)
    maker = graph.producers()[next(iter(boundary_of(graph).values()))]
    assert crossing in (maker.op, graph.producers()[maker.inputs[0]].op if maker.op == "reshape" else "")


def test_nothing_expensive_in_front_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to cache"):
        boundary_of(network(lambda build, x: build("neg", x)))

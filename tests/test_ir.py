"""The builder, the graph and what passes use to rewrite it, and the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

from pockc.errors import InternalError, UserError
from pockc.interp import evaluate
from pockc.ir import Builder, Graph, Origin, State, TensorType, dtype_of, op_counts, substitute, uniquely_named


def linear_step() -> Graph:
    """y = x w^T, and w minus its plain gradient step towards smaller y."""
    builder = Builder()
    x = builder.input("x", TensorType((2, 3)))
    w = builder.state("layer.weight", "parameter", np.arange(6, dtype=np.float32).reshape(2, 3))
    y = builder("matmul", x, w, transpose_b=True)
    gradient = builder("matmul", y, x, transpose_a=True)
    new = builder("sgd", w, gradient, builder.constant(0.5))
    return builder.build({"y": y}, {w: new})


@pytest.mark.parametrize(
    ("type_", "text", "elements", "nbytes"),
    [
        (TensorType((8, 3)), "f32[8,3]", 24, 96),
        (TensorType((), "i64"), "i64[]", 1, 8),
        (TensorType((9,), "bool"), "bool[9]", 9, 9),
    ],
)
def test_tensor_type_knows_its_size(type_: TensorType, text: str, elements: int, nbytes: int) -> None:
    assert (str(type_), type_.elements, type_.nbytes) == (text, elements, nbytes)


def test_builder_completes_attributes_and_gives_nodes_its_origin() -> None:
    builder = Builder()
    builder.origin = Origin("head", "model.py", 3)
    builder("reduce_sum", builder.input("x", TensorType((2, 3))), axes=[1])
    (node,) = builder.nodes
    assert node.attrs == {"axes": (1,), "keepdims": False}
    assert node.origin == Origin("head", "model.py", 3)
    assert node.outputs[0].type == TensorType((2,))


def test_builder_names_the_origin_of_an_illegal_node() -> None:
    builder = Builder()
    builder.origin = Origin("head", "model.py", 3)
    x = builder.input("x", TensorType((2, 3)))
    with pytest.raises(UserError, match=r"head \(model.py:3\): matmul: the inner sizes 3 and 2"):
        builder("matmul", x, x)


def test_builder_call_refuses_an_op_with_several_outputs() -> None:
    builder = Builder()
    x = builder.input("x", TensorType((1, 4, 4, 1)))
    with pytest.raises(InternalError, match=r"use Builder\.multi"):
        builder("max_pool2d", x, kernel=(2, 2), stride=(2, 2), padding=(0, 0, 0, 0))


def test_equal_small_constants_are_shared_and_unused_ones_dropped() -> None:
    builder = Builder()
    x = builder.input("x", TensorType((2,)))
    one = builder.constant(1.0)
    assert builder.constant(1.0) is one
    assert builder.constant(1, dtype="i64") is not one
    builder.constant(2.0)
    graph = builder.build({"y": builder("add", x, one)})
    assert list(graph.states) == [one]


def test_build_makes_names_unique_and_keeps_those_of_inputs_and_states() -> None:
    builder = Builder()
    x = builder.input("neg", TensorType((2,)))
    y = builder("neg", builder("neg", x))
    graph = builder.build({"y": y})
    names = [v.name for n in graph.nodes for v in n.outputs]
    assert graph.inputs == (x,)
    assert len({"neg", *names}) == 3
    assert uniquely_named(graph) is graph


def test_two_states_of_one_name_are_an_internal_error() -> None:
    builder = Builder()
    for _ in range(2):
        builder.state("w", "parameter", np.zeros(2, np.float32))
    with pytest.raises(InternalError, match="'w'"):
        builder.build({})


def test_substitute_follows_chains_and_replaces_every_use() -> None:
    builder = Builder()
    x = builder.input("x", TensorType((2,)))
    a = builder("neg", x)
    b = builder("exp", a)
    c = builder("abs", b)
    graph = substitute(builder.build({"b": b, "c": c}), {b: a, a: x})
    assert graph.nodes[2].inputs == (x,)
    assert graph.outputs["b"] is x
    assert substitute(graph, {}) is graph


def test_graph_answers_who_produces_and_who_consumes() -> None:
    graph = linear_step()
    first, second, update = graph.nodes
    w = graph.state("layer.weight")
    assert graph.producers()[first.outputs[0]] is first
    assert graph.consumers()[w] == [first, update]
    assert graph.consumers()[graph.inputs[0]] == [first, second]
    assert graph.results() == (first.outputs[0], update.outputs[0])
    assert op_counts(graph.nodes) == {"matmul": 2, "sgd": 1}
    with pytest.raises(KeyError):
        graph.state("layer.bias")


def test_state_gives_its_contents_in_the_layout_of_the_user() -> None:
    original = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    permutation = (1, 2, 0)
    state = State("parameter", original.transpose(permutation), permutation)
    np.testing.assert_array_equal(state.original(), original)
    np.testing.assert_array_equal(State("parameter", original).original(), original)
    with pytest.raises(InternalError, match="no data"):
        State("parameter", None).original()


def test_numpy_dtype_that_the_ir_lacks_is_an_internal_error() -> None:
    with pytest.raises(InternalError, match="float64"):
        dtype_of(np.zeros(1))


# The interpreter


def test_interpreter_gives_outputs_and_new_states() -> None:
    x = np.array([[1, 0, 2], [0, 1, 1]], np.float32)
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs, states = evaluate(linear_step(), {"x": x})
    np.testing.assert_array_equal(outputs["y"], x @ w.T)
    np.testing.assert_array_equal(states["layer.weight"], w - 0.5 * (x @ w.T).T @ x)
    assert list(states) == ["layer.weight"]


def test_interpreter_starts_from_given_states() -> None:
    x = np.eye(2, 3, dtype=np.float32)
    outputs, _ = evaluate(linear_step(), {"x": x}, {"layer.weight": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(outputs["y"], np.ones((2, 2)))


def test_interpreter_keeps_double_precision() -> None:
    outputs, _ = evaluate(linear_step(), {"x": np.full((2, 3), 1 / 3)})
    assert outputs["y"].dtype == np.float64
    assert outputs["y"][0, 0] == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({}, "has no contents"), ({"x": np.zeros((3, 2), np.float32)}, r"shape \(3, 2\)")],
)
def test_interpreter_refuses_missing_or_misshapen_inputs(inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InternalError, match=message):
        evaluate(linear_step(), inputs)


def test_interpreter_names_the_node_whose_reference_failed() -> None:
    builder = Builder()
    builder.origin = Origin("tokens")
    weight = builder.state("weight", "parameter", np.zeros((3, 2), np.float32))
    ids = builder.input("ids", TensorType((1,), "i64"))
    graph = builder.build({"y": builder("embedding", weight, ids)})
    with pytest.raises(InternalError, match="tokens: the reference of embedding failed: an id lies outside the 3 rows"):
        evaluate(graph, {"ids": np.array([3])})

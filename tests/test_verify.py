"""The verifier finds every kind of broken graph, and names the node."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pockc.errors import InternalError
from pockc.ir import Builder, Graph, Node, Origin, State, TensorType, Value
from pockc.verify import Level, verify

VECTOR = TensorType((3,))


def forward() -> Graph:
    """exp(x) + w."""
    builder = Builder()
    x = builder.input("x", VECTOR)
    w = builder.state("w", "parameter", np.zeros(3, np.float32))
    builder.origin = Origin("block.act", "net.py", 5)
    y = builder("add", builder("exp", x), w)
    return builder.build({"y": y})


def broken(graph: Graph, level: Level = "training") -> str:
    with pytest.raises(InternalError) as error:
        verify(graph, level)
    return str(error.value)


@pytest.mark.parametrize("level", ["imported", "training", "lowered", "planned"])
def test_legal_graph_passes_every_level(level: Level) -> None:
    verify(forward(), level)


def test_value_defined_twice() -> None:
    graph = forward()
    first, second = graph.nodes
    message = broken(replace(graph, nodes=(first, replace(second, outputs=first.outputs)), outputs={}))
    assert "block.act (net.py:5): %exp: f32[3] = add(%exp, %w): %exp: f32[3] is defined twice" in message


def test_name_used_twice() -> None:
    graph = forward()
    first, second = graph.nodes
    second = replace(second, outputs=(Value("x", VECTOR),))
    assert "the name %x is taken" in broken(replace(graph, nodes=(first, second), outputs={}))


def test_operand_read_before_it_is_defined() -> None:
    graph = forward()
    message = broken(replace(graph, nodes=graph.nodes[::-1]))
    assert "operand %exp: f32[3] is not defined before" in message


def test_output_and_update_that_nothing_defines() -> None:
    stray = Value("stray", VECTOR)
    graph = forward()
    message = broken(replace(graph, outputs={"y": stray}, updates={graph.state("w"): stray}))
    assert "output y: %stray: f32[3] is not defined" in message
    assert "update of %w: %stray: f32[3] is not defined" in message


def test_output_type_that_is_not_that_of_the_rule() -> None:
    graph = forward()
    first, second = graph.nodes
    second = replace(second, outputs=(Value("add", TensorType((4,))),))
    assert "the outputs should be f32[3]" in broken(replace(graph, nodes=(first, second), outputs={}))


def test_operands_that_break_the_rule() -> None:
    graph = forward()
    node = Node("matmul", (graph.inputs[0], graph.inputs[0]), (Value("z", VECTOR),))
    assert "must have at least two axes" in broken(replace(graph, nodes=(*graph.nodes, node)))


def test_wrong_number_of_operands() -> None:
    graph = forward()
    node = Node("exp", (), (Value("z", VECTOR),))
    assert "missing 1 required positional argument" in broken(replace(graph, nodes=(*graph.nodes, node)))


def test_op_that_does_not_exist() -> None:
    graph = forward()
    node = Node("expo", graph.inputs, (Value("z", VECTOR),))
    assert "%z: f32[3] = expo(%x): there is no such op" in broken(replace(graph, nodes=(*graph.nodes, node)))


def test_attributes_that_are_incomplete_or_out_of_order() -> None:
    graph = forward()
    attrs = {"keepdims": True, "axes": (0,)}
    node = Node("reduce_sum", graph.inputs, (Value("z", TensorType((1,))),), attrs)
    assert "the attributes should be {'axes': (0,), 'keepdims': True}" in broken(
        replace(graph, nodes=(*graph.nodes, node))
    )


def test_update_of_what_is_no_state_is_a_constant_or_has_another_type() -> None:
    builder = Builder()
    x = builder.input("x", VECTOR)
    constant = builder.constant(1.0)
    w = builder.state("w", "parameter", np.zeros(2, np.float32))
    y = builder("add", x, constant)
    message = broken(builder.build({"y": y}, {x: y, constant: constant, w: y}))
    assert "update of %x: it is not a state" in message
    assert "update of %constant: it is a constant" in message
    assert "update of %w: %add: f32[3] has not its type f32[2]" in message


@pytest.mark.parametrize("data", [np.zeros(4, np.float32), np.zeros(3)])
def test_state_data_of_another_type(data: np.ndarray) -> None:
    graph = forward()
    w = graph.state("w")
    assert f"its data is {data.dtype}" in broken(replace(graph, states={w: State("parameter", data)}))


def test_imported_graph_holds_nothing_of_training() -> None:
    builder = Builder()
    w = builder.state("w", "parameter", np.zeros(3, np.float32))
    builder.origin = Origin("act", phase="backward")
    gradient = builder("tanh_grad", w, w)
    builder.origin = Origin("act")
    new = builder("sgd", w, gradient, builder.constant(0.1))
    graph = builder.build({}, {w: new})
    verify(graph, "training")
    message = broken(graph, "imported")
    assert "tanh_grad(%w, %w): such an op cannot come from a model" in message
    assert "it is in the backward phase" in message
    assert "sgd(%w, %tanh_grad, %constant): such an op cannot come from a model" in message
    assert "a model updates nothing but its own buffers" in message


def test_lowered_graph_holds_only_what_the_target_supports() -> None:
    verify(forward(), "training", lambda node: False)
    with pytest.raises(InternalError, match=r"exp\(%x\): the target has no kernel"):
        verify(forward(), "lowered", lambda node: node.op != "exp")


def test_every_violation_is_listed() -> None:
    graph = forward()
    strange = [Node(f"strange{i}", (), (Value(f"z{i}", VECTOR),)) for i in range(3)]
    message = broken(replace(graph, nodes=(*graph.nodes, *strange)))
    assert message.startswith("the graph breaks 3 invariant(s) of level 'training':\n")
    assert message.count("there is no such op") == 3

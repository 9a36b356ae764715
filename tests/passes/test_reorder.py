"""The schedule: still the same function, updates in place, and memory freed early."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, Node, TensorType, Value
from pockc.optim import SGD
from pockc.passes import attach_optimizer, differentiate, memory, reorder
from pockc.passes.lifetimes import updates_in_place
from pockc.recipe import Recipe


def network(layers: int) -> Graph:
    rng = np.random.default_rng(0)
    builder = Builder()
    hidden = builder.input("x", TensorType((8, 32)))
    for layer in range(layers):
        weight = builder.state(f"w{layer}", "parameter", rng.standard_normal((32, 32)).astype(np.float32) / 6)
        hidden = builder("clip", builder("matmul", hidden, weight, transpose_b=True), low=0.0, high=6.0)
    return builder.build({"loss": builder("reduce_mean", builder("mul", hidden, hidden), axes=(0, 1))})


def training_step(*trained: str) -> tuple[Graph, Recipe]:
    recipe = Recipe(trained=dict.fromkeys(trained), optimizer=SGD(lr=0.1, momentum=0.9))
    return attach_optimizer.run(differentiate.run(network(4), recipe), recipe), recipe


def step(graph: Graph) -> tuple[dict[str, Array], dict[str, Array]]:
    x = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)
    return evaluate(graph, {"x": x})


def is_topological(nodes: tuple[Node, ...], given: set[Value]) -> bool:
    known = set(given)
    for node in nodes:
        if not known.issuperset(node.inputs):
            return False
        known.update(node.outputs)
    return True


@pytest.mark.parametrize("seed", range(10))
def test_a_scheduled_step_computes_the_same_and_updates_in_place(seed: int) -> None:
    chosen = random.Random(seed).sample([f"w{i}" for i in range(4)], random.Random(seed).randint(1, 4))
    graph, recipe = training_step(*chosen)
    scheduled = reorder.run(graph, recipe)
    assert is_topological(scheduled.nodes, {*scheduled.inputs, *scheduled.states})
    assert set(updates_in_place(scheduled).values()) == set(scheduled.updates)
    for before, after in zip(step(graph), step(scheduled), strict=True):
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value)


def test_an_update_runs_before_the_next_weight_gradient_is_made() -> None:
    graph, recipe = training_step("w0", "w1", "w2", "w3")
    scheduled = reorder.run(graph, recipe)
    order = [node.op for node in scheduled.nodes if node.op == "momentum" or node.outputs[0].type.shape == (32, 32)]
    alive = max_gradients = 0
    for op in order:
        alive += 1 if op == "matmul" else -1
        max_gradients = max(max_gradients, alive)
    assert max_gradients <= 2


def test_scheduling_lowers_the_peak() -> None:
    graph, recipe = training_step("w0", "w1", "w2", "w3")

    def peak(scheduled: Graph) -> int:
        return memory.run(scheduled, lambda node: 0).max_live_bytes

    disabled = Recipe(trained=recipe.trained, optimizer=recipe.optimizer, disabled=frozenset({"reorder"}))
    assert peak(reorder.run(graph, recipe)) < peak(reorder.run(graph, disabled))


def test_swapped_states_are_updated_through_a_copy() -> None:
    builder = Builder()
    a = builder.state("a", "buffer", np.ones(3, np.float32))
    b = builder.state("b", "buffer", np.zeros(3, np.float32))
    x = builder.input("x", TensorType((3,)))
    graph = builder.build({"y": builder("add", x, a)}, {a: b, b: a})
    recipe = Recipe(trained={}, optimizer=SGD(lr=0.1))
    scheduled = reorder.run(graph, recipe)
    _, new = evaluate(scheduled, {"x": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(new["a"], np.zeros(3))
    np.testing.assert_array_equal(new["b"], np.ones(3))

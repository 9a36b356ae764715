"""Gradients row by row: the same new parameters, and never the whole gradient at once."""

from __future__ import annotations

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, op_counts
from pockc.ops.common import f32
from pockc.optim import SGD, Adam, Optimizer
from pockc.passes import attach_optimizer, dce, differentiate, memory, reorder, tile_updates
from pockc.passes.lifetimes import update_chains, updates_in_place
from pockc.recipe import Recipe
from pockc.verify import verify

SIZES = (16, 40, 200, 90)


def step(*trained: str, optimizer: Optimizer | None = None) -> tuple[Graph, Recipe]:
    """A training step of linear layers on three samples; the weight of the second one is the largest by far."""
    random = np.random.default_rng(0)
    builder = Builder()
    x = builder.input("x", f32(3, SIZES[0]))
    for layer, shape in enumerate(zip(SIZES[1:], SIZES[:-1], strict=True)):
        weight = builder.state(f"w{layer}", "parameter", random.standard_normal(shape).astype(np.float32) / 6)
        x = builder("clip", builder("matmul", x, weight, transpose_b=True), low=0.0, high=6.0)
    loss = builder("reduce_mean", builder("mul", x, x), axes=(0, 1))
    recipe = Recipe(trained=dict.fromkeys(trained), optimizer=optimizer or SGD(lr=0.1, weight_decay=0.01))
    graph = differentiate.run(builder.build({"loss": loss}), recipe)
    return dce.run(attach_optimizer.run(graph, recipe), recipe), recipe


def run(graph: Graph) -> tuple[dict[str, Array], dict[str, Array]]:
    return evaluate(graph, {"x": np.random.default_rng(1).standard_normal((3, SIZES[0])).astype(np.float32)})


def planned(graph: Graph, recipe: Recipe) -> int:
    return memory.run(reorder.run(graph, recipe), recipe.workspace).nbytes


@pytest.mark.parametrize("trained", [("w2",), ("w1", "w2"), ("w0", "w1", "w2")])
def test_the_update_is_the_same_in_parts(trained: tuple[str, ...]) -> None:
    graph, recipe = step(*trained)
    after = tile_updates.run(graph, recipe)
    verify(after, "lowered")
    assert op_counts(after.nodes)["sgd"] > len(trained)
    for expected, found in zip(run(graph), run(after), strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_the_whole_gradient_never_exists_and_every_part_is_written_in_place() -> None:
    graph, recipe = step("w2")
    after = reorder.run(tile_updates.run(graph, recipe), recipe)
    chain = update_chains(after)[after.state("w2")]
    assert len(chain) > 1
    assert set(chain) == {value for value, state in updates_in_place(after).items() if state.name == "w2"}
    whole = after.state("w2").type.nbytes
    made = [value for node in after.nodes for value in node.outputs if value not in chain]
    assert max(value.type.nbytes for value in made) <= whole / 8
    assert planned(after, recipe) < 0.3 * planned(graph, recipe)


def test_parts_wait_for_what_reads_the_old_weight() -> None:
    graph, recipe = step("w0", "w2")  # the gradient of w0 needs the old w2
    after = reorder.run(tile_updates.run(graph, recipe), recipe)
    weight = after.state("w2")
    readers = [index for index, node in enumerate(after.nodes) if weight in node.inputs]
    first = next(index for index, node in enumerate(after.nodes) if node.op == "sgd" and weight in node.inputs)
    assert len(readers) == 3
    assert max(readers) == first


def test_gradients_below_the_rest_stay_whole() -> None:
    graph, recipe = step("w2")
    builder = Builder(graph)
    wide = builder("matmul", builder.constant(np.ones((200, 1))), builder.constant(np.ones((1, 400))))
    graph = builder.build({**graph.outputs, "wide": builder("reduce_sum", wide, axes=(0, 1))}, graph.updates)
    assert tile_updates.run(graph, recipe) is graph


def gradient_read_too(graph: Graph) -> Graph:
    builder = Builder(graph)
    gradient = next(node.inputs[1] for node in graph.nodes if node.op == "sgd")
    return builder.build({**graph.outputs, "norm": builder("sum_squares", gradient)}, graph.updates)


def test_only_gradients_that_plain_gradient_descent_alone_reads_are_cut() -> None:
    graph, recipe = step("w2")
    read = gradient_read_too(graph)
    assert tile_updates.run(read, recipe) is read
    for optimizer in (SGD(lr=0.1, momentum=0.9), Adam(lr=0.1)):
        other, other_recipe = step("w2", optimizer=optimizer)
        assert tile_updates.run(other, other_recipe) is other


def test_what_reads_a_part_of_a_chain_comes_before_the_next_part() -> None:
    graph, recipe = step("w2")
    after = tile_updates.run(graph, recipe)
    part = update_chains(after)[after.state("w2")][0]
    builder = Builder(after)
    seen = builder.build({**after.outputs, "seen": builder("reduce_sum", part, axes=(0, 1))}, after.updates)
    ordered = reorder.run(seen, recipe)
    after_part = next(i for i, node in enumerate(ordered.nodes) if node.op == "sgd" and part in node.inputs)
    reader = next(i for i, node in enumerate(ordered.nodes) if node.op == "reduce_sum" and part in node.inputs)
    assert reader < after_part
    assert set(updates_in_place(ordered).values()) == set(ordered.updates)
    np.testing.assert_allclose(run(ordered)[1]["w2"], run(graph)[1]["w2"], rtol=1e-6, atol=1e-7)

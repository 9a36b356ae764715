"""The widest layers behind trained ones in micro-batches: the same step, with less alive at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, TensorType
from pockc.ops.common import f32
from pockc.optim import SGD, Adam, Optimizer
from pockc.passes import attach_optimizer, dce, differentiate, memory, reorder, split_backward
from pockc.recipe import Recipe
from pockc.verify import verify

BATCH = 4


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 4


def network(blocks: int) -> Graph:
    """Inverted residuals that expand to twelve times their channels."""
    builder = Builder()
    x = builder.input("x", f32(BATCH, 8, 8, 4))
    labels = builder.input("labels", TensorType((BATCH,), "i64"))
    for block in range(blocks):
        y = x
        for layer, shape in enumerate([(48, 1, 1, 4), (48, 3, 3, 1), (4, 1, 1, 48)]):
            weight = builder.state(f"w{block}{layer}", "parameter", normal(*shape))
            attrs: dict[str, Any] = {"groups": 48, "padding": (1, 1, 1, 1)} if layer == 1 else {}
            y = builder("conv2d", y, weight, **attrs)
            y = builder("add", y, builder.state(f"b{block}{layer}", "parameter", normal(shape[0])))
            y = builder("clip", y, low=0.0, high=6.0) if layer < 2 else y
        x = builder("add", x, y)
    head = builder.state("head", "parameter", normal(5, 4))
    logits = builder("matmul", builder("reduce_mean", x, axes=(1, 2)), head, transpose_b=True)
    return builder.build({"loss": builder("cross_entropy", logits, labels)})


def step(*trained: str, optimizer: Optimizer | None = None, blocks: int = 3) -> tuple[Graph, Recipe]:
    recipe = Recipe(trained=dict.fromkeys(trained), optimizer=optimizer or SGD(lr=0.1))
    graph = attach_optimizer.run(differentiate.run(network(blocks), recipe), recipe)
    return dce.run(graph, recipe), recipe


def run(graph: Graph) -> tuple[dict[str, Array], dict[str, Array]]:
    return evaluate(graph, {"x": normal(BATCH, 8, 8, 4), "labels": np.arange(BATCH, dtype=np.int64)})


def planned(graph: Graph, recipe: Recipe) -> int:
    return memory.run(reorder.run(graph, recipe), recipe.workspace).nbytes


SCHEMES = [
    ("b02", "b12", "b22", "head"),
    ("b00", "b11", "w20"),
    ("w00", "w10", "b10", "w22"),
    ("w01", "w11", "w21", "head"),
    ("b00",),
]


@pytest.mark.parametrize("trained", SCHEMES)
@pytest.mark.parametrize("optimizer", [SGD(lr=0.1), Adam(lr=0.01)], ids=["sgd", "adam"])
def test_the_step_is_the_same(trained: tuple[str, ...], optimizer: Optimizer) -> None:
    graph, recipe = step(*trained, optimizer=optimizer)
    after = split_backward.run(graph, recipe)
    verify(after, "lowered")
    for expected, found in zip(run(graph), run(after), strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_segment_computes_the_same_in_any_number_of_parts(count: int) -> None:
    graph, recipe = step("b00", "w10", "w20", "b21")
    ordered = reorder.run(graph, recipe)
    segments, _ = split_backward._segments(ordered, BATCH, recipe)
    assert len(segments) > 2
    after = split_backward.split(ordered, dict.fromkeys(segments, count), BATCH)
    assert after is not None
    verify(after, "lowered")
    for expected, found in zip(run(graph), run(after), strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_wide_gradients_of_all_samples_never_exist() -> None:
    graph, recipe = step("b00", "b10", "b20", blocks=3)
    after = split_backward.run(graph, recipe)
    wide = BATCH * 8 * 8 * 48
    assert any(value.type.elements == wide for node in graph.nodes for value in node.outputs)
    backward = [node for node in after.nodes if node.origin.phase == "backward"]
    assert not any(value.type.elements == wide for node in backward for value in node.outputs)
    assert planned(after, recipe) < 0.7 * planned(graph, recipe)


def test_a_step_on_one_sample_and_an_evaluation_stay_as_they_are() -> None:
    graph, recipe = step("b00")
    evaluation = network(2)
    assert split_backward.run(evaluation, recipe) is evaluation
    single = replace(graph, inputs=())
    assert split_backward.run(single, recipe) is single

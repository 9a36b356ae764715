"""The choice among kernels: by times, by the model, within memory, and the same numbers whatever is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, Node, op_counts
from pockc.ops.common import f32
from pockc.optim import SGD
from pockc.passes import memory, place
from pockc.recipe import Recipe
from pockc.targets.native import workspace_of
from pockc.verify import verify

WORKSPACE = workspace_of(1)
RECIPE = Recipe(trained={}, optimizer=SGD(lr=0.1), workspace=WORKSPACE, sufficient=1 << 30)
PAD = (1, 1, 1, 1)


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 5


def network(channels: int = 64, size: int = 24, **attrs: Any) -> Graph:
    """A 3x3 convolution with bias and activation, and an input gradient through the same weight."""
    b = Builder()
    weight = b.state("w", "parameter", normal(channels, 3, 3, channels))
    bias = b.state("b", "parameter", normal(channels))
    window = {"padding": PAD, **attrs}
    y = b("conv2d", b.input("x", f32(1, size, size, channels)), weight, bias, activation="silu", **window)
    dx = b("conv2d_grad_input", y, weight, size=(size, size), **window)
    return b.build({"y": y, "dx": dx})


def placed(graph: Graph, recipe: Recipe = RECIPE) -> list[tuple[str, int]]:
    """Op, and tile where it is Winograd's, of each node; the graph is checked meanwhile."""
    found = place.run(graph, recipe)
    verify(found, "lowered")
    assert [node.outputs for node in found.nodes] == [node.outputs for node in graph.nodes]
    return [(node.op, node.attrs.get("outputs", 0)) for node in found.nodes]


def timed(graph: Graph, **milliseconds: float) -> Mapping[str, Mapping[str, float]]:
    return {place.key(node): milliseconds for node in graph.nodes}


UNPLACED = [("conv2d", 0), ("conv2d_grad_input", 0)]


@pytest.mark.parametrize(("fastest", "tile"), [("direct", 0), ("winograd2", 2), ("winograd4", 4)])
def test_the_fastest_by_the_table_is_taken(fastest: str, tile: int) -> None:
    graph = network(size=5)  # the model would have left it
    times = timed(graph, **{"direct": 3.0, "winograd2": 3.0, "winograd4": 3.0, fastest: 2.0})
    expected = [("conv2d_winograd", tile)] * 2 if tile else UNPLACED
    assert placed(graph, replace(RECIPE, times=times)) == expected


def test_without_a_time_of_each_candidate_the_model_decides() -> None:
    graph = network()
    by_model = placed(graph)
    assert [op for op, _ in by_model] == ["conv2d_winograd"] * 2
    assert placed(graph, replace(RECIPE, times=timed(graph, direct=1.0, winograd2=2.0))) == by_model
    assert placed(graph, replace(RECIPE, times=timed(network(size=25), direct=1.0, winograd2=2.0))) == by_model


def test_the_model_leaves_what_has_few_pixels_for_its_weight() -> None:
    assert placed(network(channels=256, size=4)) == UNPLACED


@pytest.mark.parametrize("attrs", [{"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 64}])
def test_other_convolutions_have_one_candidate(attrs: dict[str, Any]) -> None:
    b = Builder()
    weight = b.state("w", "parameter", normal(64, 3, 3, 64 // attrs.get("groups", 1)))
    b("conv2d", b.input("x", f32(1, 24, 24, 64)), weight, padding=PAD, **attrs)
    assert list(place.candidates(b.nodes[0])) == ["direct"]


def test_trained_weights_are_left() -> None:
    assert placed(network(), replace(RECIPE, trained={"w": None})) == UNPLACED


def test_scratch_memory_never_raises_the_peak() -> None:
    graph = network()
    peak = memory.live_peak(graph, WORKSPACE)
    tight = replace(RECIPE, sufficient=0)
    assert placed(graph, tight) == UNPLACED

    b = Builder(graph)  # something large, elsewhere: beneath it there is room
    large = b("concat", *graph.inputs * 40, axis=0)
    roomy = b.build({**graph.outputs, "largest": b("reduce_sum", large, axes=(0,), keepdims=True)})
    found = place.run(roomy, tight)
    assert op_counts(found.nodes)["conv2d_winograd"] == 2
    assert peak < memory.live_peak(found, WORKSPACE) == memory.live_peak(roomy, WORKSPACE)


def test_switches_are_for_ablation() -> None:
    graph = network()
    assert placed(graph, replace(RECIPE, disabled=frozenset({"winograd"}))) == UNPLACED
    slow = replace(RECIPE, times=timed(graph, direct=1.0, winograd2=2.0, winograd4=2.0))
    assert placed(graph, slow) == UNPLACED
    assert placed(graph, replace(slow, disabled=frozenset({"place"}))) == [("conv2d_winograd", 2)] * 2


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), PAD, (2, 1, 0, 2)])
def test_every_candidate_is_the_same_function(padding: tuple[int, ...]) -> None:
    graph = network(channels=6, size=7, padding=padding)
    x = normal(1, 7, 7, 6)
    expected, _ = evaluate(graph, {"x": x})
    for name in ("winograd2", "winograd4"):
        times = timed(graph, **{"direct": 2.0, "winograd2": 2.0, "winograd4": 2.0, name: 1.0})
        found, _ = evaluate(place.run(graph, replace(RECIPE, times=times)), {"x": x})
        for output, value in expected.items():
            np.testing.assert_allclose(found[output], value, rtol=1e-5, atol=1e-6)


def gradient(padding: tuple[int, ...]) -> Node:
    b = Builder()
    weight = b.state("w", "parameter", normal(4, 3, 3, 4))
    height = 9 + padding[0] + padding[1] - 2
    width = 9 + padding[2] + padding[3] - 2
    b("conv2d_grad_input", b.input("ct", f32(1, height, width, 4)), weight, size=(9, 9), padding=padding)
    return b.nodes[0]


def test_a_gradient_that_would_need_negative_padding_has_one_candidate() -> None:
    assert list(place.candidates(gradient((2, 2, 2, 2)))) == ["direct", "winograd2", "winograd4"]
    assert list(place.candidates(gradient((3, 0, 0, 0)))) == ["direct"]


def test_keys_tell_calls_apart(golden: Callable[..., None]) -> None:
    graphs = network(), network(channels=32), network(padding=(0, 0, 0, 0))
    keys = [place.key(node) for graph in graphs for node in graph.nodes]
    assert len(set(keys)) == len(keys)
    golden("\n".join(keys[:2]) + "\n")

"""What is known at build time is computed at build time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pockc.interp import evaluate
from pockc.ir import Builder, Graph, TensorType
from pockc.optim import SGD
from pockc.passes import fold
from pockc.recipe import Recipe


def recipe(*trained: str) -> Recipe:
    return Recipe(trained=dict.fromkeys(trained), optimizer=SGD(lr=0.1))


def ones(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.ones(shape, np.float32)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_a_frozen_expression_becomes_a_constant_named_after_its_parameter() -> None:
    b = Builder()
    x = b.input("x", TensorType((4,)))
    variance = b.state("bn.running_var", "buffer", np.arange(4, dtype=np.float32))
    scale = b("rsqrt", b("add", variance, b.constant(1e-5)))
    before = b.build({"y": b("mul", x, scale)})
    after = fold.run(before, recipe())
    assert ops(after) == ["mul"]
    constant = after.nodes[0].inputs[1]
    assert constant.name == "bn.running_var.folded"
    assert after.states[constant].kind == "constant"
    inputs = {"x": ones(4)}
    np.testing.assert_array_equal(evaluate(after, inputs)[0]["y"], evaluate(before, inputs)[0]["y"])


def test_trained_and_updated_states_are_not_known() -> None:
    b = Builder()
    trained, mean = b.state("w", "parameter", ones(4)), b.state("mean", "buffer", ones(4))
    slot, counter = b.state("m", "slot", ones(4)), b.state("n", "counter", np.array(3, np.int64))
    results = [b("exp", v) for v in (trained, mean, slot)] + [b("cast", counter, dtype="f32")]
    graph = b.build({f"y{i}": v for i, v in enumerate(results)}, {mean: results[1]})
    assert ops(fold.run(graph, recipe("w"))) == ops(graph)


def test_statistics_that_another_entry_updates_are_not_known() -> None:
    b = Builder()
    graph = b.build({"y": b("rsqrt", b.state("bn.running_var", "buffer", ones(4)))})
    options = replace(recipe(), batchnorm="train", updated_buffers=frozenset({"bn.running_var"}))
    assert ops(fold.run(graph, options)) == ["rsqrt"]


def test_a_frozen_parameter_that_is_read_directly_stays_one() -> None:
    b = Builder()
    x, w = b.input("x", TensorType((4,))), b.state("w", "parameter", ones(4))
    after = fold.run(b.build({"y": b("mul", x, w)}), recipe())
    assert after.states[after.state("w")].kind == "parameter"


def test_large_expansions_are_left_to_run_time() -> None:
    b = Builder()
    row = b.state("row", "parameter", ones(1, 1024))
    small, large = (b("expand", row, shape=(rows, 1024)) for rows in (2, 1024))
    after = fold.run(b.build({"small": small, "large": b("exp", large)}), recipe())
    assert ops(after) == ["expand", "exp"]


def test_nodes_without_data_are_left_alone() -> None:
    b = Builder()
    w = b.state("w", "parameter", ones(2))
    graph = b.build({"y": b("exp", w)})
    empty = Graph(graph.inputs, {w: type(graph.states[w])("parameter", None)}, graph.nodes, graph.outputs)
    assert ops(fold.run(empty, recipe())) == ["exp"]


def test_results_have_the_dtype_and_layout_of_the_graph() -> None:
    b = Builder()
    w = b.state("w", "parameter", np.arange(6, dtype=np.float32).reshape(2, 3))
    y = b("add", b("transpose", w, permutation=(1, 0)), b.constant(1.0))
    where = b("greater", y, b.constant(2.0))
    after = fold.run(b.build({"y": y, "where": where}), recipe())
    assert ops(after) == []
    for value in after.outputs.values():
        data = after.states[value].data
        assert data is not None and data.flags.c_contiguous and data.shape == value.type.shape
    assert [str(value.type) for value in after.outputs.values()] == ["f32[3,2]", "bool[3,2]"]


def test_nodes_with_several_outputs_are_folded() -> None:
    b = Builder()
    image = b.state("image", "buffer", np.random.default_rng(0).standard_normal((1, 4, 4, 2)).astype(np.float32))
    pool, indices = b.multi("max_pool2d", image, kernel=(2, 2), stride=(2, 2), padding=(0, 0, 0, 0))
    before = b.build({"pool": pool, "indices": indices})
    after = fold.run(before, recipe())
    assert ops(after) == []
    for name, value in evaluate(before, {})[0].items():
        np.testing.assert_array_equal(evaluate(after, {})[0][name], value)

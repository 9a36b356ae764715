"""The prefix in micro-batches: still the same function, with a smaller peak."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, Node, Origin, TensorType, Value, dtype_of, op_counts
from pockc.ops import OPS, Sample, infer, load_families
from pockc.ops.common import f32, sample_operands
from pockc.optim import SGD
from pockc.passes import attach_optimizer, batch_rules, dce, differentiate, memory, reorder, split_prefix
from pockc.passes.micro_batches import Network, analyse, cut_behind, split
from pockc.recipe import Recipe
from pockc.verify import verify

load_families()

RECIPE = Recipe(trained={}, optimizer=SGD(lr=0.1))
BATCH = 6

# What the ops' own samples lack: a batch in axis 0, and masks whose samples fill their bytes.
EXTRA: dict[str, tuple[Sample, ...]] = {
    "range_mask": (Sample((f32(2, 3, 8),), {"low": -1.0, "high": 1.0}),),
    "apply_mask": (Sample((f32(2, 16), np.arange(4, dtype=np.uint8))),),
    "concat": (Sample((f32(4, 2), f32(4, 3)), {"axis": 1}),),
    "expand": (Sample((f32(4, 1, 3),), {"shape": (4, 5, 3)}),),
    "pad": (Sample((f32(4, 3),), {"before": (0, 1), "after": (0, 2)}),),
    "slice": (Sample((f32(4, 6),), {"axis": 1, "start": 1, "stop": 5, "step": 2}),),
    "cumsum": (Sample((f32(4, 6),), {"axis": 1}),),
    "transpose": (Sample((f32(2, 3, 4),), {"permutation": (0, 2, 1)}),),
    "max_pool2d": (Sample((f32(3, 4, 4, 2),), {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0)}),),
    "avg_pool2d": (Sample((f32(3, 4, 4, 2),), {"kernel": (2, 2), "stride": (1, 1), "padding": (1, 0, 0, 1)}),),
}


def selections(op: str) -> Iterator[tuple[Node, batch_rules.Roles, list[Array], int]]:
    """Sample calls of an op with every choice of batched operands that its rule accepts, and every batch size."""
    for sample in (*OPS[op].samples, *EXTRA.get(op, ())):
        operands = sample_operands(sample)
        values = tuple(Value("operand", TensorType(x.shape, dtype_of(x))) for x in operands)
        types, attrs = infer(op, [v.type for v in values], sample.attrs)
        node = Node(op, values, tuple(Value("result", t) for t in types), attrs)
        for count, batch in itertools.product(range(1, len(values) + 1), range(2, 9)):
            for batched in itertools.combinations(values, count):
                if any(not v.type.shape or v.type.shape[0] % batch for v in batched):
                    continue
                roles = batch_rules.roles(node, set(batched), batch)
                if roles is not None:
                    yield node, roles, operands, batch


def run_in_parts(node: Node, roles: batch_rules.Roles, operands: list[Array], batch: int) -> list[Array]:
    parts: list[tuple[Array, ...]] = []
    for i in range(batch):
        attrs = batch_rules.rescaled(node, batch, i, 1)
        rows = [np.split(x, batch)[i] if sliced else x for x, sliced in zip(operands, roles, strict=True)]
        results = OPS[node.op].reference(*rows, **attrs)
        parts.append(results if isinstance(results, tuple) else (results,))
    return [np.concatenate(results) for results in zip(*parts, strict=True)]


@pytest.mark.parametrize("op", sorted(batch_rules.RULES))
def test_an_op_that_is_called_batch_parallel_is(op: str) -> None:
    tried = 0
    for node, roles, operands, batch in selections(op):
        results = OPS[op].reference(*operands, **node.attrs)
        whole = results if isinstance(results, tuple) else (results,)
        for expected, found in zip(whole, run_in_parts(node, roles, operands, batch), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        tried += 1
    assert tried


@pytest.mark.parametrize("op", ["batch_norm", "cross_entropy", "sum_squares", "count_correct", "dropout_mask"])
def test_an_op_over_the_whole_batch_is_not_called_batch_parallel(op: str) -> None:
    assert op not in batch_rules.RULES


def test_a_mask_whose_samples_share_a_byte_is_made_for_the_whole_batch() -> None:
    assert not any(node.inputs[0].type.elements // batch % 8 for node, _, _, batch in selections("range_mask"))
    x = Value("x", f32(2, 12))
    node = Node("range_mask", (x,), (Value("mask", TensorType((3,), "u8")),), {"low": 0.0, "high": 1.0})
    assert batch_rules.roles(node, {x}, 2) is None


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network() -> Graph:
    """Layers that shrink: an image, convolutions, a table with a row per sample, a head."""
    builder = Builder()
    hidden = builder.input("x", f32(BATCH, 16, 16, 2))
    labels = builder.input("labels", TensorType((BATCH,), "i64"))
    for layer, (channels, wide) in enumerate([(2, 8), (8, 8), (8, 8)]):
        builder.origin = Origin(f"layer{layer}", "model.py", layer)
        weight = builder.state(f"w{layer}", "parameter", normal(wide, 3, 3, channels, seed=layer) / 4)
        weight = builder("mul", weight, builder.constant(normal(wide, 1, 1, 1)))
        hidden = builder("conv2d", hidden, weight, stride=(2, 2) if layer else (1, 1), padding=(1, 1, 1, 1))
        bias = builder.state(f"b{layer}", "parameter", normal(wide, seed=layer))
        hidden = builder("clip", builder("add", hidden, bias), low=0.0, high=6.0)
    hidden = builder("reshape", hidden, shape=(BATCH, 128))
    hidden = builder("add", hidden, builder.constant(normal(BATCH, 128), hint="table"))
    head = builder.state("head", "parameter", normal(5, 128) / 12)
    logits = builder("matmul", hidden, head, transpose_b=True)
    return builder.build({"loss": builder("cross_entropy", logits, labels), "logits": logits})


def training_step(*trained: str) -> tuple[Graph, Recipe]:
    recipe = Recipe(trained=dict.fromkeys(trained), optimizer=SGD(lr=0.1))
    graph = attach_optimizer.run(differentiate.run(network(), recipe), recipe)
    return dce.run(graph, recipe), recipe


def step(graph: Graph) -> tuple[dict[str, Array], dict[str, Array]]:
    return evaluate(graph, {"x": normal(BATCH, 16, 16, 2, seed=7), "labels": np.arange(BATCH, dtype=np.int64) % 5})


def assert_same_function(graph: Graph, other: Graph) -> None:
    for before, after in zip(step(graph), step(other), strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-6)


def peak(graph: Graph, recipe: Recipe) -> int:
    return memory.run(reorder.run(graph, recipe), lambda node: 0).max_live_bytes


def scheduled(graph: Graph, recipe: Recipe) -> Network:
    return analyse(reorder.run(graph, recipe), BATCH)


@pytest.mark.parametrize("trained", [(), ("head",), ("b1", "w2", "head"), ("w0", "w1")])
@pytest.mark.parametrize("parts", [[(0, 1), (1, 1), (2, 4)], [(0, 4), (4, 2)]])
def test_every_cut_computes_the_same(trained: tuple[str, ...], parts: list[tuple[int, int]]) -> None:
    graph, recipe = training_step(*trained) if trained else (network(), RECIPE)
    found = scheduled(graph, recipe)
    nodes = tuple(found.roles)
    assert len(nodes) > 8
    for count in range(1, len(nodes) + 1):
        result = split(found, cut_behind(found, nodes[:count]), parts, ahead=count % 2 == 0)
        verify(result, "lowered")
        assert_same_function(graph, result)


def test_a_frozen_prefix_lowers_the_peak_of_a_step() -> None:
    graph, recipe = training_step("head")
    after = split_prefix.run(graph, recipe)
    assert_same_function(graph, after)
    # An image, its first activation and the second are alive at once; without the split, for all samples.
    assert peak(after, recipe) < 0.45 * peak(graph, recipe)
    counts = op_counts(after.nodes)
    assert counts["conv2d"] == 3 * BATCH
    assert counts["insert"] == BATCH
    verify(reorder.run(after, recipe), "lowered")


def test_evaluation_runs_sample_by_sample_up_to_the_predictions() -> None:
    after = split_prefix.run(network(), RECIPE)
    assert_same_function(network(), after)
    assert peak(after, RECIPE) < 0.45 * peak(network(), RECIPE)


def test_a_large_input_is_taken_apart_first() -> None:
    builder = Builder()
    x = builder.input("x", f32(8, 64))
    wide = builder("matmul", x, builder.constant(normal(64, 1024)))
    graph = builder.build({"out": builder("reduce_max", wide, axes=(1,))})
    after = split_prefix.run(graph, RECIPE)
    assert [node.op for node in after.nodes if node.op != "slice"][:8] == ["copy"] * 8
    # Eight rows and what the first makes; were they cut out one by one, a ninth.
    assert peak(after, RECIPE) == 4 * (8 * 64 + 1024)


def test_nodes_of_a_micro_batch_keep_their_origin() -> None:
    graph, recipe = training_step("head")
    origins = {node.origin for node in graph.nodes}
    assert {node.origin for node in split_prefix.run(graph, recipe).nodes} <= origins


def test_the_micro_batch_is_the_largest_that_costs_nothing() -> None:
    """The peak, 5 KiB, lies behind the cut: two samples in front of it need less, four need 7 KiB."""
    builder = Builder()
    x = builder.input("x", f32(8, 64))
    early = builder("clip", builder("matmul", x, builder.constant(normal(64, 256))), low=0.0, high=1.0)
    narrow = builder("matmul", early, builder.constant(normal(256, 4)))
    centred = builder("sub", narrow, builder("reduce_mean", narrow, axes=(0,), keepdims=True))
    wide = builder("matmul", centred, builder.constant(normal(4, 160)))
    graph = builder.build({"out": builder("reduce_max", wide, axes=(0, 1))})

    after = split_prefix.run(graph, RECIPE)

    sizes = {node.inputs[0].type.shape[0] for node in after.nodes if node.op == "matmul"}
    assert sizes == {2, 8}
    assert peak(after, RECIPE) < peak(graph, RECIPE)


def test_what_needs_the_whole_batch_ends_the_prefix() -> None:
    builder = Builder()
    x = builder.input("x", f32(4, 128))
    scale, shift = builder.constant(np.ones(128, np.float32)), builder.constant(np.zeros(128, np.float32))
    normalised = builder.multi("batch_norm", builder("exp", x), scale, shift, epsilon=1e-5)[0]
    graph = builder.build({"out": builder("tanh", normalised)})
    found = analyse(graph, 4)
    assert [node.op for node in found.roles] == ["exp"]


def test_what_depends_on_late_values_is_not_in_the_prefix() -> None:
    graph, recipe = training_step("w1", "head")
    found = scheduled(graph, recipe)
    late = {"cross_entropy", "cross_entropy_grad", "conv2d_grad_weight", "apply_mask", "sgd"}
    assert late.isdisjoint(node.op for node in found.roles)
    assert tuple(found.roles)[-1].origin.phase == "forward"


def test_a_view_does_not_cross_beside_what_it_views() -> None:
    graph, recipe = training_step("head")
    found = scheduled(graph, recipe)
    nodes = tuple(found.roles)
    position = next(i for i, node in enumerate(nodes) if node.op == "reshape")
    cut = cut_behind(found, nodes[: position + 1])
    assert [value.type.shape for value in cut.boundary] == [(BATCH, 4, 4, 8)]


@pytest.mark.parametrize("trained", [("w0", "b0", "w1", "b1", "w2", "b2", "head")])
def test_a_step_that_would_gain_nothing_is_left_alone(trained: tuple[str, ...]) -> None:
    graph, recipe = training_step(*trained)
    after = split_prefix.run(graph, recipe)
    assert after is graph or peak(after, recipe) < peak(graph, recipe)


def test_a_batch_of_one_is_left_alone() -> None:
    builder = Builder()
    x = builder.input("x", f32(1, 64))
    graph = builder.build({"out": builder("reduce_sum", builder("exp", x), axes=(1,))})
    assert split_prefix.run(graph, RECIPE) is graph


def test_a_graph_without_inputs_is_left_alone() -> None:
    builder = Builder()
    graph = builder.build({"out": builder("exp", builder.constant(normal(4, 4)))})
    assert split_prefix.run(graph, RECIPE) is graph


SPLIT_MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("mobilenet_v2", "sparse", {"batch_size": 5, "image_size": 96}),
    ("mobilenet_v2", "head", {"batch_size": 4, "image_size": 96}),
    ("resnet50", "head", {"batch_size": 4, "image_size": 128, "width": 16}),
    ("bert_base", "head", {"batch_size": 4, "sequence_length": 64, "width": 96, "layers": 2}),
]


@pytest.mark.torch
@pytest.mark.native
@pytest.mark.parametrize(("model", "scheme", "sizes"), SPLIT_MODELS)
def test_a_session_gives_the_same_bits(model: str, scheme: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    import pockc
    from benchmarks import zoo

    network, inputs = zoo.ZOO[model](**zoo.SMALL[model] | sizes)
    batch = {name: np.asarray(x) for name, x in inputs.items()}
    labels = np.random.default_rng(0).integers(0, 2, sizes["batch_size"])
    outcomes: list[tuple[list[float], dict[str, Array], dict[str, Array]]] = []
    peaks: list[int] = []
    others = frozenset({"split-backward", "tile-channels"})  # they choose by what the prefix needs, and change sums
    for disabled in (others | {"split-prefix"}, others):
        program = pockc.build(
            network,
            inputs,
            scheme=scheme,
            optimizer=pockc.SGD(lr=1e-2),
            disabled=disabled,
            micro_batch=sizes["batch_size"],  # or the whole step may be split instead of its prefix
        )
        program.save(tmp_path / "model.pock")
        with pockc.Session(tmp_path / "model.pock") as session:
            losses = [session.train_step(**batch, labels=labels) for _ in range(2)]
            outcomes.append((losses, session.parameters(), session.run("infer", **batch)))
        peaks.append(program.placements["train_step"].max_live_bytes)
    (losses, parameters, predictions), (split_losses, split_parameters, split_predictions) = outcomes
    assert peaks[1] < 0.9 * peaks[0]
    assert split_losses == losses
    for name, value in (parameters | predictions).items():
        np.testing.assert_array_equal((split_parameters | split_predictions)[name], value)


def test_the_dtypes_of_a_boundary_are_kept() -> None:
    builder = Builder()
    x = builder.input("x", f32(4, 32))
    positive = builder("greater", builder("exp", x), builder.constant(1.0))
    chosen = builder("argmax", builder("exp", x), axis=1)
    graph = builder.build({"positive": positive, "chosen": chosen})
    found = analyse(graph, 4)
    result = split(found, cut_behind(found, tuple(found.roles)), [(0, 3), (3, 1)])
    data = {"x": normal(4, 32)}
    for name, value in evaluate(graph, data)[0].items():
        assert evaluate(result, data)[0][name].dtype == value.dtype
        np.testing.assert_array_equal(evaluate(result, data)[0][name], value)
    assert {node.outputs[0].type.dtype for node in result.nodes if node.op == "insert"} == {"bool", "i64"}

"""Chains in tiles of channels: the same function, without the wide values, and only where nothing reads those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import verify_zoo
from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, Value, op_counts
from pockc.ops.common import f32
from pockc.optim import SGD
from pockc.passes import attach_optimizer, dce, differentiate, fuse, memory, reorder, tile_channels
from pockc.passes.channel_chains import find, tiled, tiles_of, width_of
from pockc.passes.lifetimes import storages
from pockc.recipe import Recipe
from pockc.verify import verify

RECIPE = Recipe(trained={}, optimizer=SGD(lr=0.1))
Middle = Callable[[Builder, Value], Value]


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 3


def parameter(b: Builder, name: str, *shape: int) -> Value:
    return b.state(name, "parameter", normal(*shape))


def depthwise(b: Builder, x: Value, name: str = "deep", **attrs: Any) -> Value:
    channels = x.type.shape[3]
    weight, bias = parameter(b, f"{name}.w", channels, 3, 3, 1), parameter(b, f"{name}.b", channels)
    clip: dict[str, Any] = {"activation": "clip", "low": 0.0, "high": 6.0}
    return b("conv2d", x, weight, bias, groups=channels, padding=(1, 1, 1, 1), **clip, **attrs)


def expand(b: Builder, x: Value, channels: int, name: str = "wide", **attrs: Any) -> Value:
    weight, bias = parameter(b, f"{name}.w", channels, 1, 1, x.type.shape[3]), parameter(b, f"{name}.b", channels)
    return b("conv2d", x, weight, bias, activation="hardswish", **attrs)


def project(b: Builder, x: Value, channels: int, name: str = "narrow") -> Value:
    weight, bias = parameter(b, f"{name}.w", channels, 1, 1, x.type.shape[3]), parameter(b, f"{name}.b", channels)
    return b("conv2d", x, weight, bias)


def residual(channels: int = 96, middle: Middle = depthwise, size: int = 12) -> Graph:
    builder = Builder()
    x = builder.input("x", f32(1, size, size, 8))
    y = project(builder, middle(builder, expand(builder, x, channels)), 8)
    return builder.build({"y": builder("add", y, x)})


def feed_forward(*, gated: bool = False, transposed: bool = True) -> Graph:
    builder = Builder()
    x = builder.input("x", f32(2, 5, 24))

    def linear(name: str, operand: Value, out: int, **attrs: Any) -> Value:
        shape = (out, operand.type.shape[-1]) if transposed else (operand.type.shape[-1], out)
        bias = parameter(builder, f"{name}.b", out)
        return builder(
            "matmul", operand, parameter(builder, f"{name}.w", *shape), bias, transpose_b=transposed, **attrs
        )

    wide = linear("gate", x, 80, activation="silu" if gated else "gelu")
    if gated:
        wide = builder("mul", wide, linear("up", x, 80))
    return builder.build({"y": linear("down", wide, 24)})


def outputs(graph: Graph) -> dict[str, Array]:
    return evaluate(graph, {value.name: normal(*value.type.shape) for value in graph.inputs})[0]


def check(before: Graph, after: Graph, *, exactly: bool = False) -> None:
    verify(after, "lowered")
    for name, expected in outputs(before).items():
        found = outputs(after)[name]
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exactly else 1e-6 * scale, err_msg=name)


def cut(graph: Graph, count: int, recipe: Recipe = RECIPE) -> Graph:
    return tiled(graph, dict.fromkeys(find(graph, recipe), count))


def widest(graph: Graph) -> int:
    """Channels of the widest value that is no state."""
    return max(value.type.shape[-1] for node in graph.nodes for value in node.outputs if len(value.type.shape) > 2)


@pytest.mark.parametrize(("channels", "count", "width", "tiles"), [(96, 2, 48, 2), (96, 4, 32, 3), (90, 4, 32, 3)])
def test_no_wide_value_exists_whole(channels: int, count: int, width: int, tiles: int) -> None:
    before = residual(channels)
    after = cut(before, count)
    check(before, after)
    assert width_of(channels, count) == width
    assert widest(after) == width
    assert op_counts(after.nodes) == {"slice": 4 * tiles, "conv2d": 3 * tiles, "add": tiles}
    assert tiles_of(after) == {"narrow.w": tiles}


def test_only_the_last_weight_is_copied() -> None:
    after = cut(residual(), 2)
    root = storages(after)
    slices = [node for node in after.nodes if node.op == "slice"]
    assert {root[node.outputs[0]].name for node in slices} == {"wide.w", "wide.b", "deep.w", "deep.b"}
    read = {value.name for node in after.nodes for value in node.inputs}
    assert {"narrow.w.tile", "narrow.w.tile_1", "narrow.b"} <= read
    assert "narrow.w" not in read


def test_a_chain_in_one_tile_gives_the_same_bits() -> None:
    before = residual()
    check(before, cut(before, 1), exactly=True)


@pytest.mark.parametrize(
    "middle",
    [
        lambda b, x: x,
        lambda b, x: b("clip", b("avg_pool2d", x, kernel=(2, 2), stride=(2, 2), padding=(0,) * 4), low=0.0, high=1.0),
        lambda b, x: b.multi("max_pool2d", x, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1))[0],
        lambda b, x: b("mul", x, b("sigmoid", x)),
        lambda b, x: b("mul", b("add", x, parameter(b, "shift", 96)), parameter(b, "scale", 1)),
        lambda b, x: depthwise(b, depthwise(b, x, "first"), "second", dilation=(1, 1)),
    ],
    ids=["nothing", "average", "maximum", "swish", "scale", "two"],
)
def test_what_works_on_each_channel_alone_is_part_of_a_chain(middle: Middle) -> None:
    builder = Builder()
    x = builder.input("x", f32(1, 12, 12, 8))
    before = builder.build({"y": project(builder, middle(builder, expand(builder, x, 96)), 8)})
    after = cut(before, 4)
    check(before, after)
    assert widest(after) == 32


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_feed_forward_block_runs_on_some_features_at_a_time(gated: bool, transposed: bool) -> None:
    before = feed_forward(gated=gated, transposed=transposed)
    after = cut(before, 2)
    check(before, after)
    assert widest(after) == 48


def output_too(graph: Graph) -> Graph:
    return replace(graph, outputs={**graph.outputs, "wide": graph.nodes[1].outputs[0]})


def read_too(graph: Graph) -> Graph:
    builder = Builder(graph)
    return builder.build({**graph.outputs, "z": builder("reduce_max", graph.nodes[0].outputs[0], axes=(1,))})


def weight_read_too(graph: Graph) -> Graph:
    builder = Builder(graph)
    return builder.build({**graph.outputs, "z": builder("reduce_sum", graph.state("narrow.w"), axes=(0,))})


@pytest.mark.parametrize("change", [output_too, read_too, weight_read_too])
def test_what_something_else_reads_is_not_cut(change: Callable[[Graph], Graph]) -> None:
    assert not find(change(residual()), RECIPE)


@pytest.mark.parametrize("trained", ["wide.w", "wide.b", "deep.w", "narrow.w"])
def test_trained_weights_are_not_cut(trained: str) -> None:
    assert not find(residual(), replace(RECIPE, trained={trained: None}))


def test_a_chain_across_channels_is_none() -> None:
    assert not find(residual(middle=lambda b, x: b("softmax", x)), RECIPE)
    assert not find(residual(channels=16), RECIPE)


def training_step(*trained: str) -> tuple[Graph, Recipe]:
    """Two inverted residuals with unfused activations, and a loss."""
    builder = Builder()
    x = builder.input("x", f32(1, 12, 12, 8))
    for block in ("a", "b"):
        weights = [(48, 1, 1, 8), (48, 3, 3, 1), (8, 1, 1, 48)]
        for layer, shape in enumerate(weights):
            attrs: dict[str, Any] = {"groups": 48, "padding": (1, 1, 1, 1)} if layer == 1 else {}
            x = builder("conv2d", x, parameter(builder, f"{block}{layer}.w", *shape), **attrs)
            x = builder("add", x, parameter(builder, f"{block}{layer}.b", shape[0]))
            x = builder("clip", x, low=0.0, high=6.0) if layer < 2 else x
    loss = builder("reduce_mean", builder("mul", x, x), axes=(0, 1, 2, 3))
    recipe = replace(RECIPE, trained=dict.fromkeys(trained))
    graph = attach_optimizer.run(differentiate.run(builder.build({"loss": loss}), recipe), recipe)
    return fuse.run(dce.run(graph, recipe), recipe), recipe


@pytest.mark.parametrize(
    ("trained", "cuttable"),
    [(("b2.b",), ["a2.w", "b2.w"]), (("b1.w",), ["a2.w"]), (("a2.b",), ["a2.w"]), (("a0.b",), [])],
)
def test_what_the_backward_pass_reads_is_not_cut(trained: tuple[str, ...], cuttable: list[str]) -> None:
    graph, recipe = training_step(*trained)
    assert sorted(chain.name for chain in find(graph, recipe)) == cuttable
    after = cut(graph, 3, recipe)
    verify(after, "lowered")
    given = {"x": normal(1, 12, 12, 8)}
    for expected, found in zip(evaluate(graph, given), evaluate(after, given), strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def planned(graph: Graph) -> int:
    return memory.run(reorder.run(graph, RECIPE), RECIPE.workspace).nbytes


def test_chains_get_the_fewest_tiles_that_bring_them_below_the_rest() -> None:
    builder = Builder()
    x = builder.input("x", f32(1, 12, 12, 8))
    y = project(builder, depthwise(builder, expand(builder, x, 96)), 8)
    before = builder.build({"y": y})
    after = tile_channels.run(before, RECIPE)
    check(before, after)
    # x or y, and 16 channels of two values, of 12 times 12 floats each; and y once more while tiles are added up
    assert planned(before) == 4 * 144 * (96 + 96)
    assert tiles_of(after) == {"narrow.w": 6}
    assert planned(after) == 4 * 144 * (8 + 8 + 16 + 16)

    other = builder("tanh", builder("matmul", parameter(builder, "l", 144, 1), parameter(builder, "r", 1, 96)))
    rest = builder("add", other, builder("cumsum", other, axis=0))  # two values of 96 channels at once
    with_rest = builder.build({"y": y, "z": builder("reduce_sum", rest, axes=(0, 1))})
    assert tile_channels.run(with_rest, RECIPE) is with_rest


def test_other_entries_cut_what_the_first_one_did() -> None:
    graph = residual()
    follow = replace(RECIPE, tiles={"narrow.w": 3})
    assert tiles_of(tile_channels.run(graph, follow)) == {"narrow.w": 3}
    assert tile_channels.run(graph, replace(RECIPE, tiles={})) is graph


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_chains_in_tiles_compute_the_same(data: st.DataObject) -> None:
    builder = Builder()
    size, channels = data.draw(st.integers(4, 7)), data.draw(st.integers(17, 70))
    kernel = data.draw(st.sampled_from([1, 3]))
    value = builder.input("x", f32(data.draw(st.integers(1, 2)), size, size, 3))
    weight = parameter(builder, "w", channels, kernel, kernel, 3)
    bias = [parameter(builder, "b", channels)] if data.draw(st.booleans()) else []
    value = builder("conv2d", value, weight, *bias, stride=data.draw(st.sampled_from([(1, 1), (2, 1)])))
    for layer in range(data.draw(st.integers(0, 3))):
        kind = data.draw(st.sampled_from(["depthwise", "pool", "unary", "frozen", "twice"]))
        if kind == "depthwise":
            value = depthwise(builder, value, f"d{layer}")
        elif kind == "pool":
            value = builder("avg_pool2d", value, kernel=(2, 2), stride=(1, 1), padding=(1, 0, 0, 1))
        elif kind == "unary":
            value = builder(data.draw(st.sampled_from(["tanh", "silu", "hardswish", "abs"])), value)
        elif kind == "frozen":
            value = builder("add", parameter(builder, f"f{layer}", channels), value)
        else:
            value = builder("mul", value, builder("sigmoid", value))
    before = builder.build({"y": project(builder, value, 5)})
    count = data.draw(st.integers(1, 5))
    after = cut(before, count)
    check(before, after, exactly=count == 1)
    assert widest(after) <= max(width_of(channels, count), 5)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.native
@pytest.mark.parametrize("model", ["mobilenet_v2", "mcunet_5fps"])
def test_ten_steps_in_tiles_agree_with_pytorch(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[int] = []

    def everywhere(graph: Graph, recipe: Recipe) -> dict[str, int]:
        counts = {chain.name: 2 for chain in find(graph, recipe)}
        decided.append(len(counts))
        return counts

    monkeypatch.setattr(tile_channels, "_choose", everywhere)
    result = verify_zoo.check_parity(model, "sparse", "sgd", steps=10, small=True)
    assert not [str(bar) for bar in result.bars() if not bar.met]
    assert decided[0] > 2

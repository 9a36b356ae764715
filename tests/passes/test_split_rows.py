"""Images in strips of rows: the same numbers from less memory, and only where that is worth its time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pockc
from benchmarks import zoo
from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, Value, op_counts
from pockc.ops.common import f32
from pockc.optim import SGD
from pockc.passes import memory, split_rows
from pockc.passes.row_strips import analyse, fits, in_strips, strips
from pockc.recipe import Recipe, no_workspace
from pockc.verify import verify

RECIPE = Recipe(trained={}, optimizer=SGD(lr=0.1))


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 3


def conv(b: Builder, x: Value, channels: int, kernel: int, **attrs: Any) -> Value:
    inputs = x.type.shape[3] // attrs.get("groups", 1)
    weight = b.state(f"w{len(b.nodes)}", "parameter", normal(channels, kernel, kernel, inputs))
    bias = b.state(f"b{len(b.nodes)}", "parameter", normal(channels))
    return b("conv2d", x, weight, bias, activation="clip", low=0.0, high=6.0, **attrs)


def network(size: int = 24, batch: int = 1) -> Graph:
    """A stem, a pool, an inverted residual and a strided layer over images as PyTorch has them, and their mean."""
    b = Builder()
    image = b("transpose", b.input("image", f32(batch, 3, size, size)), permutation=(0, 2, 3, 1))
    stem = conv(b, image, 8, 3, stride=(2, 2), padding=(1, 1, 1, 1))
    pooled, _ = b.multi("max_pool2d", stem, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1))
    deep = conv(b, conv(b, pooled, 16, 1), 16, 5, padding=(2, 2, 2, 2), groups=16)
    scale = b.state("scale", "parameter", normal(8))
    joined = b("add", pooled, b("mul", conv(b, deep, 8, 1), scale))
    last = conv(b, joined, 12, 3, stride=(2, 2), padding=(0, 1, 0, 1), dilation=(2, 1))
    return b.build({"y": b("reduce_mean", last, axes=(1, 2))})


def results(graph: Graph) -> dict[str, Array]:
    image = normal(*graph.inputs[0].type.shape)
    return evaluate(graph, {"image": image})[0]


def test_strips_cover_the_rows_once() -> None:
    for height in range(1, 20):
        for count in range(1, height + 1):
            rows = strips(height, count)
            assert [row for first, end in rows for row in range(first, end)] == list(range(height))
            assert len(rows) <= count


@pytest.mark.parametrize("size", [17, 24])
def test_every_cut_in_every_number_of_strips_is_the_same_function(size: int) -> None:
    graph = network(size)
    images = analyse(graph)
    modules = [cut.nodes[-1].op for cut in images.cuts]
    assert modules.count("add") == 1 and len(images.cuts) >= 4
    expected = results(graph)["y"]
    for cut in images.cuts:
        for count in {2, 3, cut.height}:
            if not fits(images, cut, count):  # as many strips are not of equal height
                assert len(strips(cut.height, count)) < count
                continue
            after = in_strips(graph, images, cut, count)
            verify(after, "lowered")
            np.testing.assert_allclose(results(after)["y"], expected, rtol=1e-6, atol=1e-7)
            assert op_counts(after.nodes)["insert"] == len(strips(cut.height, count))


def test_a_cut_is_where_one_value_crosses() -> None:
    graph = network()
    inside = {cut.boundary: set(cut.nodes) for cut in analyse(graph).cuts}
    for boundary, nodes in inside.items():
        made = {value for node in nodes for value in node.outputs}
        read = {value for node in graph.nodes if node not in nodes for value in node.inputs}
        assert made & read == {boundary}


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    size=st.integers(9, 14),
    count=st.integers(2, 5),
    pool=st.sampled_from([None, "max_pool2d", "avg_pool2d"]),
)
def test_any_window_reads_the_rows_that_it_needs(
    kernel: int, stride: int, dilation: int, padding: tuple[int, ...], size: int, count: int, pool: str | None
) -> None:
    b = Builder()
    image = b("transpose", b.input("image", f32(2, 3, size, size)), permutation=(0, 2, 3, 1))
    y = conv(b, image, 4, kernel, stride=(stride, 1), dilation=(dilation, 1), padding=padding)
    if pool == "max_pool2d":
        y, _ = b.multi(pool, y, kernel=(2, 2), stride=(1, 2), padding=(1, 0, 0, 1))
    if pool == "avg_pool2d":
        y = b(pool, y, kernel=(2, 2), stride=(1, 2), padding=(1, 0, 0, 1), count_include_pad=False)
    graph = b.build({"y": b("neg", y)})
    images = analyse(graph)
    values = {"image": normal(2, 3, size, size)}
    expected = evaluate(graph, values)[0]["y"]
    assert images.cuts
    for cut in images.cuts:
        if not fits(images, cut, count):
            assert len(strips(cut.height, count)) < count or padding[0] or padding[1]
            continue
        found = evaluate(in_strips(graph, images, cut, count), values)[0]["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_what_the_whole_image_decides_is_not_cut() -> None:
    """A squeeze-and-excitation gate: every row is multiplied by a mean over all of them."""
    b = Builder()
    image = b("transpose", b.input("image", f32(1, 3, 16, 16)), permutation=(0, 2, 3, 1))
    x = conv(b, image, 8, 3, padding=(1, 1, 1, 1))
    gate = b("sigmoid", b("reduce_mean", x, axes=(1, 2), keepdims=True))
    graph = b.build({"y": conv(b, b("mul", x, gate), 4, 3)})
    assert [cut.nodes[-1].op for cut in analyse(graph).cuts] == ["transpose", "conv2d"]


def test_the_peak_falls_and_the_choice_is_noted() -> None:
    graph = network(size=64)
    recipe = replace(RECIPE, transient_target=1)  # any time is well spent
    after = split_rows.run(graph, recipe)
    verify(after, "lowered")
    before_peak, after_peak = (memory.live_peak(g, no_workspace) for g in (graph, after))
    assert after_peak < 0.8 * before_peak
    assert recipe.decisions["strips"]["count"] > 1
    np.testing.assert_allclose(results(after)["y"], results(graph)["y"], rtol=1e-6, atol=1e-7)


def test_nothing_is_cut_where_another_entry_needs_more_anyway() -> None:
    graph = network(size=64)
    sufficient = replace(RECIPE, sufficient=memory.live_peak(graph, no_workspace))
    assert split_rows.run(graph, sufficient) is graph


def test_a_training_step_in_strips_has_the_same_bits_and_a_smaller_arena(tmp_path: Path) -> None:
    model, inputs = zoo.mcunet_5fps(batch_size=1, image_size=128, num_classes=4)
    batch = {**{name: tensor.numpy() for name, tensor in inputs.items()}, "labels": np.array([1])}
    losses: list[list[float]] = []
    arenas: list[int] = []
    options: dict[str, Any] = {"optimizer": SGD(lr=0.05), "scheme": "sparse", "entries": ("train_step",)}
    for off in ({"tile-channels"}, {"tile-channels", "split-rows"}):
        program = pockc.build(model, inputs, disabled=frozenset(off), **options)
        program.save(path := tmp_path / f"{len(arenas)}.pock")
        arenas.append(program.arena_bytes)
        with pockc.Session(path) as session:
            losses.append([session.train_step(**batch) for _ in range(4)])
    assert losses[0] == losses[1]
    assert arenas[0] < 0.95 * arenas[1]

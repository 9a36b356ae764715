"""The memory planner: properties on random intervals, and the lifetimes that graphs give it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pockc.errors import InternalError
from pockc.ir import Builder, Graph, TensorType
from pockc.passes import memory
from pockc.passes.lifetimes import buffers, updates_in_place
from pockc.passes.memory import ALIGNMENT, Interval


def no_workspace(node: object) -> int:
    return 0


intervals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(1, 5000)).map(
        lambda t: Interval(t[0], t[0] + t[1], t[2])
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(intervals)
def test_no_two_live_intervals_overlap_and_the_bound_holds(items: list[Interval]) -> None:
    offsets, total = memory.plan(items)
    memory.check(items, offsets)
    bound = int(memory.live_bytes(items).max())
    assert bound <= total
    assert total == max(offset + memory.aligned(item.nbytes) for offset, item in zip(offsets, items, strict=True))
    assert all(offset % ALIGNMENT == 0 for offset in offsets)


@settings(max_examples=100, deadline=None)
@given(intervals, st.data())
def test_check_finds_a_planted_overlap(items: list[Interval], data: st.DataObject) -> None:
    offsets, _ = memory.plan(items)
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(items)), 2)
        if items[i].first <= items[j].last and items[j].first <= items[i].last
    ]
    if not pairs:
        return
    i, j = data.draw(st.sampled_from(pairs))
    offsets[i] = offsets[j]
    with pytest.raises(InternalError, match="memory plan"):
        memory.check(items, offsets)


def test_the_plan_is_deterministic() -> None:
    rng = np.random.default_rng(3)
    items = [Interval(int(a), int(a + b), int(c)) for a, b, c in rng.integers(1, 60, (80, 3))]
    assert memory.plan(items) == memory.plan(items)


def test_a_chain_of_elementwise_ops_lives_in_one_buffer() -> None:
    builder = Builder()
    value = builder.input("x", TensorType((1000,)))
    for _ in range(5):
        value = builder("tanh", value)
    graph = builder.build({"y": value})
    assert memory.run(graph, no_workspace).nbytes == memory.aligned(4000)
    assert memory.run(graph, no_workspace, in_place=False).nbytes == 2 * memory.aligned(4000)


def test_searching_for_places_never_costs_bytes_and_often_saves_some() -> None:
    rng = np.random.default_rng(0)
    saved = []
    for _ in range(20):
        items = [Interval(int(a), int(a + b), 64 * int(c)) for a, b, c in rng.integers(1, 60, (40, 3))]
        plain, searched = memory.plan(items, search=False), memory.plan(items)
        memory.check(items, plain[0])
        saved.append(plain[1] - searched[1])
    assert min(saved) >= 0 and max(saved) > 0


def test_an_operand_that_is_read_later_is_not_overwritten() -> None:
    builder = Builder()
    x = builder.input("x", TensorType((1000,)))
    y = builder("tanh", x)
    graph = builder.build({"z": builder("add", y, x)})
    owner = buffers(graph)
    assert owner[graph.nodes[0].outputs[0]] is not owner[graph.inputs[0]]


def test_a_view_keeps_what_it_views_alive() -> None:
    builder = Builder()
    x = builder.input("x", TensorType((10, 10)))
    y = builder("tanh", x)
    view = builder("reshape", y, shape=(100,))
    other = builder("tanh", builder("mul", x, x))
    graph = builder.build({"a": builder("reduce_sum", view, axes=(0,)), "b": other})
    owner = buffers(graph)
    assert owner[view] is owner[y]
    assert owner[view].last >= 4


def update_graph(read_after: bool) -> Graph:
    builder = Builder()
    x = builder.input("x", TensorType((8,)))
    weight = builder.state("w", "parameter", np.ones(8, np.float32))
    new = builder("sub", weight, x)
    later = builder("mul", weight if read_after else x, x)
    return builder.build({"y": later}, {weight: new})


@pytest.mark.parametrize("read_after", [False, True])
def test_an_update_is_in_place_only_when_every_reader_of_the_old_value_came_before(read_after: bool) -> None:
    graph = update_graph(read_after)
    assert bool(updates_in_place(graph)) is not read_after

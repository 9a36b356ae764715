"""The memory planner: properties on random intervals, and the lifetimes that graphs give it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pockc.errors import InternalError
from pockc.interp import evaluate
from pockc.ir import Array, Builder, Graph, TensorType, Value
from pockc.ops import OPS
from pockc.ops.common import f32
from pockc.optim import SGD
from pockc.passes import memory, reorder
from pockc.passes.lifetimes import buffers, extents, storages, unread_fills, updates_in_place
from pockc.passes.memory import ALIGNMENT, Interval
from pockc.recipe import Recipe


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


def slices_of(source: str) -> Graph:
    """Slices of an input, of a state, or of a value that is made."""
    builder = Builder()
    x = builder.input("x", TensorType((4, 32)))
    state = builder.state("w", "parameter", np.ones((4, 32), np.float32))
    value = {"input": x, "state": state, "made": builder("tanh", x)}[source]
    flat = builder("reshape", value, shape=(128,))
    rows = builder("slice", value, axis=0, start=1, stop=3, hint="rows")
    parts = [
        rows,
        builder("slice", builder("reshape", rows, shape=(64,)), axis=0, start=16, stop=30, hint="inner"),
        builder("slice", value, axis=1, start=0, stop=16, hint="columns"),
        builder("slice", value, axis=0, start=0, stop=4, step=2, hint="every"),
        builder("slice", flat, axis=0, start=8, stop=24, hint="unaligned"),
    ]
    return builder.build({part.name: builder("abs", part) for part in parts})


@pytest.mark.parametrize("source", ["input", "state", "made"])
def test_contiguous_slices_of_inputs_and_states_are_read_where_they_lie(source: str) -> None:
    graph = slices_of(source)
    found = extents(graph)
    slices = [node.outputs[0] for node in graph.nodes if node.op == "slice"]
    offsets = {value.name: found[value].offset for value in slices if found[value].storage is not value}
    assert offsets == ({} if source == "made" else {"rows": 128, "inner": 192})


@pytest.mark.parametrize(
    ("starts", "read", "unread"),
    [
        ((0, 2, 4), "last", True),
        ((4, 0, 2), "last", True),
        ((0, 1, 3, 4), "last", True),
        ((0, 2), "last", False),  # rows 4 and 5 keep their zeros
        ((0, 2, 4), "filled", False),
        ((0, 2, 4), "first", False),
    ],
)
def test_a_tensor_of_zeros_that_parts_overwrite_need_not_be_filled(
    starts: tuple[int, ...], read: str, unread: bool
) -> None:
    b = Builder()
    part = b.input("part", f32(2, 3))
    values = {"filled": b("expand", b.constant(0.0), shape=(6, 3))}
    values["last"] = values["filled"]
    for start in starts:
        values["last"] = b("insert", values["last"], part, axis=0, start=start)
        values.setdefault("first", values["last"])
    graph = b.build({"y": values["last"], "z": b("exp", values[read])})
    assert bool(unread_fills(graph)) == unread
    as_result = b.build({"y": values["last"], "z": values[read]})
    assert bool(unread_fills(as_result)) == unread


def test_parts_along_different_axes_do_not_make_a_whole() -> None:
    b = Builder()
    filled = b("expand", b.constant(0.0), shape=(2, 2))
    row = b("insert", filled, b.input("row", f32(1, 2)), axis=0, start=0)
    column = b("insert", row, b.input("column", f32(2, 1)), axis=1, start=1)
    assert not unread_fills(b.build({"y": column}))


def test_part_of_a_buffer_is_not_overwritten() -> None:
    builder = Builder()
    x = builder.input("x", TensorType((4, 32)))
    first = builder("tanh", builder("slice", x, axis=0, start=0, stop=2))
    graph = builder.build({"y": builder("mul", first, builder("slice", x, axis=0, start=2, stop=4))})
    owner = buffers(graph)
    assert owner[first] is not owner[x]
    assert owner[x].last == 3


@st.composite
def graphs_with_views(draw: st.DrawFn) -> Graph:
    """Reshapes and slices of inputs, states and of each other, read by ops that work in place."""
    builder = Builder()
    shape = (draw(st.integers(2, 4)), 16)
    values = [builder.input(name, TensorType(shape)) for name in ("x", "y")]
    weight = builder.state("w", "parameter", np.arange(shape[0] * 16, dtype=np.float32).reshape(shape))
    values.append(weight)
    for _ in range(draw(st.integers(1, 14))):
        value = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["slice", "slice", "reshape", "unary", "binary"]))
        if kind == "slice":
            axis = draw(st.integers(0, len(value.type.shape) - 1))
            size = value.type.shape[axis]
            start = draw(st.integers(0, size - 1))
            values.append(builder("slice", value, axis=axis, start=start, stop=draw(st.integers(start + 1, size))))
        elif kind == "reshape":
            values.append(
                builder("reshape", value, shape=draw(st.sampled_from([(value.type.elements,), (1, *value.type.shape)])))
            )
        elif kind == "unary":
            values.append(builder("tanh", value))
        else:
            other = draw(st.sampled_from([v for v in values if v.type == value.type]))
            values.append(builder("add", value, other))
    kept = draw(st.lists(st.sampled_from(values[3:]), min_size=1, max_size=3))
    new = builder("sub", weight, draw(st.sampled_from([v for v in values if v.type == weight.type])))
    return builder.build({f"o{i}": value for i, value in enumerate(kept)}, {weight: new})


def run_in_arena(graph: Graph, inputs: dict[str, Array]) -> dict[str, Array]:
    """What the runtime does: every value lies where the plan puts it, and views are no calls."""
    placement = memory.run(graph, no_workspace)
    arena = np.full(placement.nbytes, 255, np.uint8)
    homes = {value: arena_of_state(state.data) for value, state in graph.states.items()}

    def place(value: Value) -> Array:
        buffer, shift = placement.buffer[value], placement.shift.get(value, 0)
        block = arena[placement.offset[buffer] :] if buffer.state is None else homes[buffer.state]
        return block[shift : shift + value.type.nbytes].view(np.float32).reshape(value.type.shape)

    for value in graph.inputs:
        place(value)[...] = inputs[value.name]
    storage = storages(graph)
    for node in graph.nodes:
        if storage[node.outputs[0]] is node.outputs[0]:
            result = OPS[node.op].reference(*(place(value) for value in node.inputs), **node.attrs)
            place(node.outputs[0])[...] = result
    return {**{name: place(value) for name, value in graph.outputs.items()}, "w": place(graph.state("w"))}


def arena_of_state(data: Array | None) -> Array:
    assert data is not None
    return data.copy().reshape(-1).view(np.uint8)


@settings(max_examples=200, deadline=None)
@given(graphs_with_views())
def test_views_in_one_arena_hold_what_they_should(graph: Graph) -> None:
    shape = graph.inputs[0].type.shape
    inputs = {name: np.random.default_rng(len(name)).random(shape, np.float32) for name in ("x", "y")}
    ordered = reorder.run(graph, Recipe(trained={}, optimizer=SGD(lr=0.1)))
    outputs, states = evaluate(graph, inputs)
    for name, found in run_in_arena(ordered, inputs).items():
        np.testing.assert_array_equal(found, {**outputs, **states}[name], err_msg=name)

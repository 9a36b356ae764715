"""The searches over orders: the cost model is the planner's, small graphs get the best order of all."""

from __future__ import annotations

import gc
import heapq
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pockc.interp import evaluate
from pockc.ir import Builder, Graph, Node, TensorType, Value
from pockc.optim import SGD
from pockc.passes import (
    attach_optimizer,
    canonicalize,
    cse,
    dce,
    differentiate,
    duplicate,
    fuse,
    memory,
    reorder,
    schedule_exact,
    schedule_greedy,
    schedule_window,
)
from pockc.passes.schedule_model import Problem, problem_of
from pockc.recipe import Recipe

BUDGET = 1_000_000  # sets of nodes: far more than any graph of this file needs


def workspace(node: Node) -> int:
    return {"tanh": 100, "mul": 300, "matmul": 640, "conv2d": 200}.get(node.op, 0)


PLAIN = Recipe(trained={}, optimizer=SGD(lr=0.1), workspace=workspace)


def random_graph(seed: int, nodes: int) -> Graph:
    """Any ops on vectors: chains, fan-out, views, slices, operators that work in place, states that are updated."""
    rng = random.Random(seed)
    widths = (16, 32, 64, 160)
    builder = Builder()
    values = [builder.input(f"x{i}", TensorType((rng.choice(widths),))) for i in range(rng.randint(1, 3))]
    states = [builder.state(f"s{w}", "buffer", np.full(w, 0.5, np.float32)) for w in rng.sample(widths, 2)]
    while len(builder.nodes) < nodes:
        value = rng.choice((values[-6:] if rng.random() < 0.6 else values) + states)
        values.append(random_node(rng, builder, value, values + states, widths))
    read = {value for node in builder.nodes for value in node.inputs}
    outputs = {f"y{i}": v for i, v in enumerate(values) if v not in read and rng.random() < 0.7}
    updates = {}
    for state in states:
        made = [o for node in builder.nodes for o in node.outputs if o.type == state.type]
        if made and rng.random() < 0.8:
            updates[state] = rng.choice(made)
    return builder.build(outputs or {"y": values[-1]}, updates)


def random_node(
    rng: random.Random, builder: Builder, value: Value, known: list[Value], widths: tuple[int, ...]
) -> Value:
    (width,) = value.type.shape
    match rng.choice(("tanh", "reshape", "binary", "binary", "expand", "slice")):
        case "tanh":
            return builder("tanh", value)
        case "reshape":
            return builder("reshape", value, shape=(width,))
        case "binary":
            other = rng.choice([v for v in known if v.type == value.type])
            return builder(rng.choice(("add", "mul")), value, other)
        case "expand":
            return builder("expand", builder("reduce_mean", value, axes=(0,)), shape=(rng.choice(widths),))
        case _:
            return builder("slice", value, axis=0, start=0, stop=rng.choice([w for w in widths if w <= width]))


def training_graph(seed: int) -> tuple[Graph, Recipe]:
    """A training step of a small network: one to three layers with biases, activations, residuals, in part frozen."""
    rng = random.Random(seed)
    numbers = np.random.default_rng(seed)
    builder = Builder()
    batch, width, convolutional = rng.choice((2, 4, 16)), rng.choice((8, 16, 32)), rng.random() < 0.4
    trained: list[str] = []

    def parameter(name: str, *shape: int) -> Value:
        if rng.random() < 0.7:
            trained.append(name)
        return builder.state(name, "parameter", (numbers.standard_normal(shape) / 4).astype(np.float32))

    hidden = builder.input("x", TensorType((batch, 6, 6, width) if convolutional else (batch, width)))
    for layer in range(rng.randint(1, 3)):
        skip, channels, kernel = hidden, rng.choice((width, width, 3 * width)), rng.choice((1, 3))
        incoming = hidden.type.shape[-1]
        if convolutional:
            weight = parameter(f"w{layer}", channels, kernel, kernel, incoming)
            hidden = builder("conv2d", hidden, weight, stride=(1, 1), padding=(kernel // 2,) * 4)
        else:
            hidden = builder("matmul", hidden, parameter(f"w{layer}", channels, incoming), transpose_b=True)
        if rng.random() < 0.6:
            hidden = builder("add", hidden, parameter(f"b{layer}", channels))
        activation = rng.choice(("clip", "tanh", "gelu", "silu", "none"))
        if activation == "clip":
            hidden = builder("clip", hidden, low=0.0, high=6.0)
        elif activation != "none":
            hidden = builder(activation, hidden)
        if skip.type == hidden.type and rng.random() < 0.6:
            hidden = builder("add", hidden, skip)
    loss = builder("reduce_mean", builder("mul", hidden, hidden), axes=tuple(range(len(hidden.type.shape))))
    names = trained or [next(state.name for state in builder.states if state.name.startswith("w"))]
    optimizer = SGD(lr=0.1, momentum=rng.choice((0.0, 0.9)))
    recipe = replace(PLAIN, trained=dict.fromkeys(names), optimizer=optimizer)
    graph = builder.build({"loss": loss, **({"y": hidden} if rng.random() < 0.5 else {})})
    for step in (differentiate, attach_optimizer, canonicalize, cse, dce, fuse, duplicate):
        graph = step.run(graph, recipe)
    return graph, recipe


def reordered(graph: Graph, order: tuple[int, ...]) -> Graph:
    return replace(graph, nodes=tuple(graph.nodes[index] for index in order))


def planned_peak(graph: Graph) -> int:
    """By the planner's own lifetimes."""
    return memory.run(graph, workspace).max_live_bytes


def random_order(problem: Problem, rng: random.Random) -> tuple[int, ...]:
    order: list[int] = []
    done = 0
    while len(order) < problem.count:
        order.append(rng.choice(problem.ready(done)))
        done |= 1 << order[-1]
    return tuple(order)


def all_orders(problem: Problem, done: int = 0, order: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if len(order) == problem.count:
        yield order
    for index in problem.ready(done):
        yield from all_orders(problem, done | 1 << index, (*order, index))


def least_peak(problem: Problem) -> int:
    """The best peak by Dijkstra's algorithm over all sets of nodes, without any rule that saves work."""
    start = max(problem.floor, problem.initial)
    queue = [(start, 0, problem.initial)]
    seen: set[int] = set()
    while queue:
        peak, done, live = heapq.heappop(queue)
        if done == (1 << problem.count) - 1:
            return peak
        if done in seen:
            continue
        seen.add(done)
        for index in problem.ready(done):
            call, after = problem.step(index, done, live)
            heapq.heappush(queue, (max(peak, call), done | 1 << index, after))
    raise AssertionError("the graph has a cycle")


@pytest.mark.parametrize("seed", range(40))
def test_the_cost_of_an_order_is_what_the_planner_finds_alive(seed: int) -> None:
    graph = reorder.run(random_graph(seed, 5 + seed), PLAIN) if seed % 2 else reorder.run(*training_graph(seed))
    problem = problem_of(graph, workspace)
    for order in (random_order(problem, random.Random(i)) for i in range(4)):
        assert problem.peak(order) == planned_peak(reordered(graph, order))
        assert problem.lower_bound() <= problem.peak(order)


@pytest.mark.parametrize("seed", range(30))
def test_exact_search_equals_brute_force(seed: int) -> None:
    graph = reorder.run(random_graph(seed, 3 + seed % 4), PLAIN)
    problem = problem_of(graph, workspace)
    assert problem.count <= 9  # all orders are tried
    peaks = {order: problem.peak(order) for order in all_orders(problem)}
    worst = max(peaks, key=peaks.__getitem__)
    order, complete = schedule_exact.optimum(problem, worst, BUDGET)
    assert complete
    assert problem.peak(order) == planned_peak(reordered(graph, order)) == min(peaks.values())


@pytest.mark.parametrize("seed", range(40))
def test_exact_search_equals_a_search_without_shortcuts(seed: int) -> None:
    graph = reorder.run(random_graph(1000 + seed, 10 + seed % 6), PLAIN)
    problem = problem_of(graph, workspace)
    order, complete = schedule_exact.optimum(problem, random_order(problem, random.Random(seed)), BUDGET)
    assert complete
    assert problem.peak(order) == least_peak(problem)


def assert_nothing_is_better(graph: Graph) -> None:
    problem = problem_of(graph, workspace)
    peak = problem.peak(range(problem.count))
    assert peak == planned_peak(graph)
    outcome = schedule_exact.within(problem, peak - 1, BUDGET)
    assert outcome.complete
    assert outcome.order is None


@pytest.mark.parametrize("block", range(10))
def test_small_training_steps_get_the_best_order_of_all(block: int) -> None:
    for seed in range(12 * block, 12 * block + 12):
        graph = reorder.run(*training_graph(seed))
        assert len(graph.nodes) <= reorder.EXACT_NODES
        assert_nothing_is_better(graph)


@pytest.mark.parametrize("seed", range(12))
def test_small_random_graphs_get_the_best_order_of_all(seed: int) -> None:
    assert_nothing_is_better(reorder.run(random_graph(2000 + seed, 14 + 2 * seed), PLAIN))


@pytest.mark.parametrize("seed", range(10))
def test_large_graphs_compute_the_same_in_the_new_order(seed: int) -> None:
    graph = random_graph(3000 + seed, 60)
    scheduled = reorder.run(graph, PLAIN)
    inputs = {value.name: np.linspace(-1, 1, value.type.elements, dtype=np.float32) for value in graph.inputs}
    for before, after in zip(evaluate(graph, inputs), evaluate(scheduled, inputs), strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value)
    assert [str(n.outputs) for n in reorder.run(graph, PLAIN).nodes] == [str(n.outputs) for n in scheduled.nodes]


@pytest.mark.parametrize("seed", range(10))
def test_list_schedule_and_windows_keep_the_order_legal_and_never_worsen_it(seed: int) -> None:
    graph = reorder.run(random_graph(4000 + seed, 70), replace(PLAIN, disabled=frozenset({"reorder"})))
    problem = problem_of(graph, workspace)
    start = tuple(range(problem.count))
    bent = schedule_greedy.improved(problem, start, problem.lower_bound())
    refined = schedule_window.refined(problem, bent, problem.lower_bound())
    for order in (bent, refined):
        done = 0
        for index in order:
            assert not problem.before[index] & ~done
            done |= 1 << index
        assert done == (1 << problem.count) - 1
    assert problem.peak(refined) <= problem.peak(bent) <= problem.peak(start)


def test_a_weight_gradient_waits_where_memory_is_short() -> None:
    """Its operands are small and it is large: it is made when the activation is gone."""
    builder = Builder()
    x = builder.input("x", TensorType((4, 4096)))
    small = builder("reduce_sum", x, axes=(1,))
    weight = builder.state("w", "parameter", np.zeros((4, 3000), np.float32))
    gradient = builder("expand", builder("reshape", small, shape=(4, 1)), shape=(4, 3000))
    new = builder("sub", weight, gradient)
    product = builder("mul", x, builder("reshape", small, shape=(4, 1)))
    graph = builder.build({"y": builder("reduce_sum", product, axes=(0, 1))}, {weight: new})
    scheduled = reorder.run(graph, replace(PLAIN, workspace=lambda node: 0))
    assert memory.run(scheduled, lambda node: 0).max_live_bytes < x.type.nbytes + gradient.type.nbytes


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_of_a_list_schedule_knows_the_first_place_with_little_weight(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 40)
    queue, weights = schedule_greedy.Queue(count), dict[int, int]()
    for _ in range(200):
        place = rng.randrange(count)
        if rng.random() < 0.3:
            queue.remove(place)
            weights.pop(place, None)
        else:
            weights[place] = rng.randint(-5, 20)
            queue.put(place, weights[place])
        if weights:
            assert queue.least == min(weights.values())
            most = max(queue.least, rng.randint(-5, 20))
            assert queue.first(most) == min(place for place, weight in weights.items() if weight <= most)


@pytest.mark.parametrize("seed", range(12))
def test_a_list_schedule_runs_what_fits_first(seed: int) -> None:
    """Where no chain is free: the first ready node by priority that fits, else the one that exceeds the bound least."""
    builder = Builder()
    x, rng = builder.input("x", TensorType((16,))), random.Random(seed)
    for _ in range(30):  # results outlive all nodes, so that nothing is freed
        builder("expand", builder("reduce_mean", x, axes=(0,)), shape=(rng.choice((100, 200, 400, 800)),))
    wide = [node.outputs[0] for node in builder.nodes if node.op == "expand"]
    graph = builder.build({f"y{i}": value for i, value in enumerate(wide)})
    problem = problem_of(graph, workspace)
    priority = random_order(problem, rng)
    bound = rng.randint(problem.initial, problem.peak(priority))
    done, live = 0, problem.initial
    for node in schedule_greedy.order_under(problem, priority, bound):
        ready = [other for other in priority if other in problem.ready(done)]
        calls = [problem.step(other, done, live) for other in ready]
        free = [other for other, (_, after) in zip(ready, calls, strict=True) if after <= live + schedule_greedy.FREE]
        fitting = [other for other, (call, _) in zip(ready, calls, strict=True) if call <= bound]
        least = min(range(len(ready)), key=lambda i: calls[i][0])
        assert node in free or node == (fitting[0] if fitting else ready[least])
        _, live = problem.step(node, done, live)
        done |= 1 << node


def test_the_order_of_a_graph_is_searched_once_while_the_graph_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[Problem] = []
    least = reorder._least

    def counting(problem: Problem, enough: int) -> tuple[int, ...]:
        searches.append(problem)
        return least(problem, enough)

    monkeypatch.setattr(reorder, "_least", counting)
    graph = random_graph(1, 20)
    first, again = reorder.searched(graph, PLAIN), reorder.searched(graph, PLAIN)
    assert first is again and len(searches) == 1
    assert reorder.searched(graph, replace(PLAIN, sufficient=1 << 20)) is not first and len(searches) == 2
    gone = weakref.ref(graph)
    del graph
    gc.collect()
    assert gone() is None

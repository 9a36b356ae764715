"""Reorder: the order of the nodes that needs the least memory at once."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from pockc.ir import Builder, Graph, Node, Origin
from pockc.passes import memory, schedule_exact, schedule_greedy, schedule_window
from pockc.passes.lifetimes import storage_readers, storages, unread_fills, update_chains, updates_in_place
from pockc.passes.schedule_model import Problem, Workspace, problem_of
from pockc.recipe import Recipe

EXACT_NODES = 40  # graphs up to this size get the best order of all,
EXACT_BUDGET = 50_000  # unless the search has to visit more sets of nodes than this
FITS_WELL = 1.003  # planned by live bytes, from which on another order is tried


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Make every update in place, or an explicit `copy`, and schedule the nodes for the lowest peak.

    Pre:  any topological order; ``recipe.workspace`` knows the kernels.
    Post: a topological order in which every update can be written in place. Small graphs get the order of least peak
          memory; large ones the best of a bound-driven list schedule, with the calls around the peak ordered again
          by exact search. Deterministic: searches stop by counts, not by time.
    """
    if "reorder" in recipe.disabled:
        return _materialise_updates(graph)
    return _fill_late(_smallest(_search(graph, recipe), recipe))


def searched(graph: Graph, recipe: Recipe) -> Graph:
    """As `run`, but for live bytes alone: how well buffers fit together is not tried. For passes that only weigh."""
    if "reorder" in recipe.disabled:
        return _materialise_updates(graph)
    return _search(graph, recipe).ordered


def prepared(graph: Graph) -> Graph:
    """The nodes in an order in which every update is in place, or an explicit `copy`."""
    return _materialise_updates(by_updates(_sink_cheap(graph)))


def least_peak(graph: Graph, recipe: Recipe) -> int:
    """Live bytes that every order of the graph needs at some call: much faster than to search for the best order."""
    return problem_of(_materialise_updates(by_updates(graph)), recipe.workspace).lower_bound()


def _fill_late(graph: Graph) -> Graph:
    """Move fills that no call makes (`unread_fills`) to right before the part that begins their bytes."""
    readers = graph.consumers()
    fills = {readers[node.outputs[0]][0]: node for node in unread_fills(graph)}
    late = set(fills.values())
    order: list[Node] = []
    for node in graph.nodes:
        if node in fills:
            order.append(fills[node])
        if node not in late:
            order.append(node)
    return replace(graph, nodes=tuple(order))


def _sink_cheap(graph: Graph) -> Graph:
    """Move nodes that read only states, or nothing that dies, to right before their first reader."""
    producers = graph.producers()
    lazy: set[Node] = set()
    for node in graph.nodes:
        if all(value in graph.states or producers.get(value) in lazy for value in node.inputs):
            lazy.add(node)
    placed: set[Node] = set()
    order: list[Node] = []

    def place(node: Node) -> None:
        for value in node.inputs:
            producer = producers.get(value)
            if producer in lazy and producer not in placed:
                place(producer)
        placed.add(node)
        order.append(node)

    for node in graph.nodes:
        if node not in lazy:
            place(node)
    for node in graph.nodes:
        if node not in placed:
            place(node)
    return replace(graph, nodes=tuple(order))


def by_updates(graph: Graph) -> Graph:
    """Move every node that makes the new value of a state behind the readers of the old one, where that is possible.

    It is not where one of them needs the new value itself; such an update is left to a copy.
    """
    maker = {output: i for i, node in enumerate(graph.nodes) for output in node.outputs}
    before = [{maker[value] for value in node.inputs if value in maker} for node in graph.nodes]
    followers: list[list[int]] = [[] for _ in graph.nodes]
    for index, earlier in enumerate(before):
        for i in earlier:
            followers[i].append(index)
    known = storage_readers(graph)
    chains = update_chains(graph).items()
    replaced = [pair for state, chain in chains for pair in zip((state, *chain[:-1]), chain, strict=True)]
    for old, value in replaced:
        if value not in maker:
            continue
        others = set(known[old]) - {maker[value]}
        if others.isdisjoint(_reachable(maker[value], followers)):
            for reader in others - before[maker[value]]:
                before[maker[value]].add(reader)
                followers[reader].append(maker[value])
    waiting = [len(earlier) for earlier in before]
    ready = [index for index, count in enumerate(waiting) if count == 0]  # sorted, hence a heap
    order: list[Node] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(graph.nodes[index])
        for follower in followers[index]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heapq.heappush(ready, follower)
    return replace(graph, nodes=tuple(order))


def _reachable(start: int, followers: list[list[int]]) -> set[int]:
    """The nodes that need ``start`` to have run."""
    seen = {start}
    stack = [start]
    while stack:
        for follower in followers[stack.pop()]:
            if follower not in seen:
                seen.add(follower)
                stack.append(follower)
    return seen - {start}


@dataclass(frozen=True, slots=True)
class _Searched:
    """A prepared graph as a problem, the order that the searches found, and the graph in that order."""

    graph: Graph
    problem: Problem
    order: tuple[int, ...]
    ordered: Graph


# By graph, workspace and what is sufficient: passes that only weigh ask for the order of one graph after the other.
_known: WeakKeyDictionary[Graph, dict[tuple[Workspace, int], _Searched]] = WeakKeyDictionary()


def _search(graph: Graph, recipe: Recipe) -> _Searched:
    """The graph prepared, in the order with the least live bytes that the searches find."""
    known, key = _known.setdefault(graph, {}), (recipe.workspace, recipe.sufficient)
    if key not in known:
        before = prepared(graph)
        problem = problem_of(before, recipe.workspace)
        order = _least(problem, max(problem.lower_bound(), recipe.sufficient))
        known[key] = _Searched(before, problem, order, _ordered(before, order))
    return known[key]


def _smallest(found: _Searched, recipe: Recipe) -> Graph:
    """The graph in the order that was found, or, where buffers do not fit together well in it, in a similar one."""
    problem, order, best = found.problem, found.order, found.ordered
    placement = memory.run(best, recipe.workspace)
    if placement.nbytes <= max(placement.max_live_bytes * FITS_WELL, recipe.sufficient):
        return best
    similar = _ordered(found.graph, schedule_greedy.order_under(problem, order, problem.peak(order)))
    return min(best, similar, key=lambda ordered: memory.run(ordered, recipe.workspace).nbytes)


def _least(problem: Problem, least: int) -> tuple[int, ...]:
    """The order with the least live bytes that the searches find; they stop where it needs no more than ``least``."""
    order = schedule_greedy.improved(problem, tuple(range(problem.count)), least)
    if problem.count > EXACT_NODES:
        return schedule_window.refined(problem, order, least)
    if problem.peak(order) > least:
        order, _ = schedule_exact.optimum(problem, order, EXACT_BUDGET)
    return order


def _ordered(graph: Graph, order: Iterable[int]) -> Graph:
    return replace(graph, nodes=tuple(graph.nodes[index] for index in order))


def _materialise_updates(graph: Graph) -> Graph:
    """Append a `copy` for every update that cannot be written in place, and for outputs that are operands or parts.

    A copy into one state may itself have to wait for a copy out of it (two states that swap): hence the loop.
    """
    bare = {*graph.inputs, *graph.states}
    while True:
        homes = updates_in_place(graph)
        late = {state: value for state, value in graph.updates.items() if homes.get(value) is not state}
        storage = storages(graph)
        outputs = {name: value for name, value in graph.outputs.items() if storage[value] in bare}
        if not late and not outputs:
            return graph
        builder = Builder(graph)
        builder.origin = Origin(module="<states>", phase="update")
        copies = {state: builder("copy", value, hint=f"{state.name}.new") for state, value in late.items()}
        copied_outputs = {name: builder("copy", value, hint=name) for name, value in outputs.items()}
        graph = builder.build({**graph.outputs, **copied_outputs}, {**graph.updates, **copies})

"""Reorder: free memory as soon as possible, allocate it as late as possible."""

from __future__ import annotations

import heapq
from dataclasses import replace

from pockc.ir import Builder, Graph, Node, Origin, Value
from pockc.passes.lifetimes import readers_of_states, updates_in_place
from pockc.recipe import Recipe

FREE = 64  # a node that adds no more bytes than this runs as soon as it can: counters and rates are not worth waiting


def run(graph: Graph, recipe: Recipe) -> Graph:
    """Schedule the nodes, then make every update in place, or an explicit `copy` at the end.

    Pre:  any topological order.
    Post: a topological order in which every node that frees at least what it allocates (an optimizer update, a
          1-bit mask, a channel slice) runs as soon as it can, other nodes in their old order, and what depends on
          states alone right before its first reader. Every update can be written in place.
    """
    if "reorder" not in recipe.disabled:
        graph = replace(graph, nodes=_schedule(_sink_cheap(graph)))
    return _materialise_updates(graph)


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


def _schedule(graph: Graph) -> tuple[Node, ...]:
    """List scheduling: the old order, interrupted by every ready node whose net allocation is not positive."""
    return _ListScheduler(graph).order()


class _ListScheduler:
    """Which nodes are ready, and what running one would allocate and free now."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = graph.nodes
        self.predecessors, self.followers = _dependencies(graph)
        self.waiting = [len(before) for before in self.predecessors]
        self.homes = set(graph.updates.values())
        self.never_freed = {*graph.states, *graph.results()}
        self.unread: dict[Value, set[int]] = {}  # value -> nodes that have still to read it
        for index, node in enumerate(graph.nodes):
            for value in node.inputs:
                self.unread.setdefault(value, set()).add(index)
        self.done = [False] * len(graph.nodes)

    def order(self) -> tuple[Node, ...]:
        ready = [index for index, count in enumerate(self.waiting) if count == 0]  # sorted, hence a heap
        eager = list(ready)
        order: list[int] = []
        while ready:
            while eager:
                candidate = eager.pop()
                if not self.done[candidate] and self._net_bytes(candidate) <= FREE:
                    order.append(candidate)
                    eager.extend(self._complete(candidate, ready))
            following = heapq.heappop(ready)
            if not self.done[following]:
                order.append(following)
                eager = self._complete(following, ready)
        return tuple(self.nodes[index] for index in order)

    def _complete(self, index: int, ready: list[int]) -> list[int]:
        """Mark a node as run; returns the ready nodes whose cost that may have changed."""
        self.done[index] = True
        touched: list[int] = []
        for value in dict.fromkeys(self.nodes[index].inputs):
            self.unread[value].discard(index)
            if len(self.unread[value]) == 1:
                touched.extend(self.unread[value])
        for follower in self.followers[index]:
            self.waiting[follower] -= 1
            if self.waiting[follower] == 0:
                heapq.heappush(ready, follower)
                touched.append(follower)
        return [i for i in touched if self.waiting[i] == 0]

    def _net_bytes(self, index: int) -> int:
        """Bytes that running this node now allocates, minus those that it frees."""
        node = self.nodes[index]
        allocated = sum(output.type.nbytes for output in node.outputs if output not in self.homes)
        freed = sum(
            value.type.nbytes
            for value in dict.fromkeys(node.inputs)
            if value not in self.never_freed and len(self.unread[value]) == 1
        )
        return allocated - freed


def _dependencies(graph: Graph) -> tuple[list[set[int]], list[list[int]]]:
    """Per node, the nodes it waits for and the nodes that wait for it.

    Besides data, a node that makes the new value of a state waits for the readers of the old one, unless one of
    them needs that new value itself; such an update is left to a copy.
    """
    maker = {output: i for i, node in enumerate(graph.nodes) for output in node.outputs}
    predecessors: list[set[int]] = [set() for _ in graph.nodes]
    followers: list[list[int]] = [[] for _ in graph.nodes]

    def after(index: int, before: int) -> None:
        if before not in predecessors[index]:
            predecessors[index].add(before)
            followers[before].append(index)

    for index, node in enumerate(graph.nodes):
        for value in node.inputs:
            if value in maker:
                after(index, maker[value])
    readers = readers_of_states(graph)
    for state, value in graph.updates.items():
        if value not in maker:
            continue
        others = set(readers[state]) - {maker[value]}
        if others.isdisjoint(_reachable(maker[value], followers)):
            for reader in others:
                after(maker[value], reader)
    return predecessors, followers


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


def _materialise_updates(graph: Graph) -> Graph:
    """Append a `copy` for every update that cannot be written in place, and for outputs that are bare operands.

    A copy into one state may itself have to wait for a copy out of it (two states that swap): hence the loop.
    """
    bare = {*graph.inputs, *graph.states}
    while True:
        homes = {state: value for value, state in updates_in_place(graph).items()}
        late = {state: value for state, value in graph.updates.items() if homes.get(state) is not value}
        outputs = {name: value for name, value in graph.outputs.items() if value in bare}
        if not late and not outputs:
            return graph
        builder = Builder(graph)
        builder.origin = Origin(module="<states>", phase="update")
        copies = {state: builder("copy", value, hint=f"{state.name}.new") for state, value in late.items()}
        copied_outputs = {name: builder("copy", value, hint=name) for name, value in outputs.items()}
        graph = builder.build({**graph.outputs, **copied_outputs}, {**graph.updates, **copies})
